"""Each option of augmentation does what it says to training images, and nothing to others."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision.transforms import v2

from mambakit.datamodules.vision import Augment, VisionDataModule
from mambakit.datamodules.vision.augment import erasing, mixing, training_transform
from mambakit.datamodules.vision.normalization import CONVENTIONS


def first_batch(data: VisionDataModule, epoch: int = 0) -> dict[str, torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return next(iter(loader))


def module(tree, **augment) -> VisionDataModule:
    return VisionDataModule(str(tree), batch_size=8, normalization="unit", augment=Augment(**augment))


@pytest.mark.parametrize(
    "options",
    [
        {"crop": "pad"},
        {"crop": "resized"},
        {"flip": 0.5},
        {"color_jitter": 0.4},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "augmix-m5-w3"},
        {"auto_augment": "original"},
        {"random_erasing": 0.5},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0, "mix_mode": "elem"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_each_option_changes_training_only(tree, options):
    plain, changed = module(tree), module(tree, **options)
    batches = [first_batch(data, epoch) for data in (plain, changed, module(tree, **options)) for epoch in (0, 1)]
    assert (
        torch.equal(batches[0]["index"], batches[2]["index"])
        and batches[0]["inputs"].shape == batches[2]["inputs"].shape
    )
    assert not torch.equal(batches[0]["inputs"], batches[2]["inputs"])
    assert all(torch.equal(batches[2][name], batches[4][name]) for name in batches[2]), "the seed decides"
    assert all(torch.equal(batches[3][name], batches[5][name]) for name in batches[3])
    one, other = (next(iter(data.val_dataloader())) for data in (plain, changed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_draws_of_an_image_depend_on_its_epoch_and_not_on_its_batch(tree):
    data = module(tree, crop="resized", flip=0.5, color_jitter=0.4)
    dataset = data.train_dataloader().dataset
    n = len(dataset)
    alone = [dataset[item]["inputs"] for item in (3, 3 + n, 3 + 2 * n)]
    assert torch.equal(dataset.__getitems__([1, 7, 3])["inputs"][2], alone[0])
    assert dataset[3 + n]["index"] == dataset[3]["index"]
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[1], alone[2])


def test_pad_shifts_by_up_to_the_padding(tree):
    plain, padded = (first_batch(module(tree, **options))["inputs"] for options in ({}, {"crop": "pad", "padding": 2}))
    shifts = set()
    for image, moved in zip(plain, padded, strict=True):
        wide = torch.nn.functional.pad(image, (2, 2, 2, 2))
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(wide[:, y : y + 6, x : x + 8], moved)]
        assert found
        shifts.add(found[0])
    assert len(shifts) > 2


def test_flip_is_a_mirror(tree):
    plain, flipped = (first_batch(module(tree, flip=flip))["inputs"] for flip in (0.0, 1.0))
    assert torch.equal(plain.flip(-1), flipped)


def test_mixup_mixes_inputs_and_labels_alike(tree):
    plain = first_batch(module(tree))
    mixed = first_batch(module(tree, mixup=5.0))
    assert mixed["labels"].shape == (8, 4) and mixed["labels"].dtype == torch.float32
    one_hot = torch.eye(4)[plain["labels"]]
    difference = plain["inputs"] - plain["inputs"].flip(0)
    weight = ((mixed["inputs"] - plain["inputs"].flip(0)) * difference).sum() / difference.square().sum()
    assert 0.05 < weight < 0.95
    assert torch.allclose(mixed["inputs"], weight * plain["inputs"] + (1 - weight) * plain["inputs"].flip(0), atol=1e-5)
    assert torch.allclose(mixed["labels"], weight * one_hot + (1 - weight) * one_hot.flip(0), atol=1e-5)


def test_cutmix_labels_follow_the_area(tree):
    plain = first_batch(module(tree))
    mixed = first_batch(module(tree, cutmix=1.0), epoch=0)
    kept = (mixed["inputs"] == plain["inputs"]).all(1)  # (B, H, W)
    pasted = (mixed["inputs"] == plain["inputs"].flip(0)).all(1)
    assert (kept | pasted).all() and pasted.any() and kept.any()
    share = kept[0].float().mean()
    one_hot = torch.eye(4)[plain["labels"]]
    assert torch.allclose(mixed["labels"], share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-5)


def test_a_single_image_is_not_mixed(tree):
    dataset = module(tree, mixup=1.0).train_dataloader().dataset
    assert dataset[0]["labels"].dtype == torch.int64 and dataset[0]["inputs"].shape == (3, 6, 8)


def test_mixing_is_off_at_probability_zero():
    assert mixing(Augment(mixup=1.0, mix_probability=0.0), 3) is None


def test_erasing_clears_a_rectangle(tree):
    plain, erased = (
        first_batch(module(tree, **options))["inputs"]
        for options in ({}, {"random_erasing": 1.0, "erasing_mode": "const"})
    )
    changed = (plain != erased).any(1)
    assert (erased.permute(0, 2, 3, 1)[changed] == 0).all()
    for mask in changed[changed.flatten(1).any(1)]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_repeats_show_an_image_again_in_another_guise(tree):
    data = module(tree, crop="resized", repeats=2)
    loader = data.train_dataloader()
    batches = list(loader)
    index = torch.cat([batch["index"] for batch in batches])
    assert torch.equal(index[::2], index[1::2]) and len(set(index.tolist())) == len(index) // 2
    inputs = torch.cat([batch["inputs"] for batch in batches])
    assert not (inputs[::2] == inputs[1::2]).flatten(1).all(1).any()
    assert len(loader) == len(module(tree).train_dataloader())


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_rand_augment_runs(channels):
    """At every level, on grey images too; Pillow 13 refuses timm's posterize to 0 bits."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    constants = CONVENTIONS["half"]
    for policy in ("rand-m0-n1-p1.0-inc1", "rand-m10-n1-p1.0-inc1"):
        options = Augment(auto_augment=policy)
        transform = training_transform(options, (channels, 16, 16), None, "bicubic", constants)
        (step,) = [part for part in transform.transforms if isinstance(part, auto_augment.RandAugment)]
        assert len(step.ops) > 10
        for operation in step.ops:
            assert operation(image).mode == image.mode, operation
        posterize = next(operation for operation in step.ops if operation.name == "PosterizeIncreasing")
        if policy.startswith("rand-m10"):
            assert not np.asarray(posterize(image)).any(), "0 bits of it are left"


def test_original_policies_are_mended_too():
    transform = training_transform(Augment(auto_augment="v0"), (3, 8, 8), None, "bicubic", CONVENTIONS["half"])
    (step,) = [part for part in transform.transforms if isinstance(part, auto_augment.AutoAugment)]
    assert all(one.aug_fn is not auto_augment.posterize for policy in step.policy for one in policy)


def test_the_order_of_steps():
    options = Augment(crop="pad", flip=0.5, color_jitter=0.1, auto_augment="rand-m9")
    transform = training_transform(options, (3, 8, 8), 8, "bilinear", CONVENTIONS["half"])
    kinds = [type(step) for step in transform.transforms]
    assert kinds == [v2.Compose, v2.RandomCrop, v2.RandomHorizontalFlip, auto_augment.RandAugment, v2.ColorJitter]


def test_a_policy_resamples_as_asked_and_moves_the_mean_into_the_picture():
    options = Augment(auto_augment="rand-m9-n1-p1.0")
    transform = training_transform(options, (3, 40, 40), None, "nearest", CONVENTIONS["imagenet"])
    translate = next(step for step in transform.transforms[-1].ops if step.name == "TranslateXRel")
    pixels = {
        tuple(pixel) for pixel in np.asarray(translate(Image.new("RGB", (40, 40), "red"))).reshape(-1, 3).tolist()
    }
    assert pixels == {(255, 0, 0), (124, 116, 104)}
    assert translate.kwargs["resample"] == Image.Resampling.NEAREST
    assert translate.hparams["translate_const"] == 18, "as timm: 45 % of the shorter side"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_evaluation_is_timms(tree, interpolation, crop_pct):
    options = {"image_size": 5, "interpolation": interpolation, "crop_pct": crop_pct}
    data = VisionDataModule(str(tree), validation_batch_size=8, normalization="imagenet", **options)
    timms = create_transform(5, interpolation=interpolation, crop_pct=crop_pct)
    source = data._part("validation").source
    wanted = torch.stack([timms(source.image(index, 3)) for index in range(8)])
    assert torch.allclose(next(iter(data.val_dataloader()))["inputs"], wanted, atol=1e-6)


@pytest.mark.parametrize("mode", ["constant", "reflect", "symmetric"])
def test_padding(mode):
    options = Augment(crop="pad", padding=2, padding_mode=mode)
    transform = training_transform(options, (1, 4, 4), None, "nearest", CONVENTIONS["half"])
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
    wide = np.pad(image, 2, mode=mode)
    cuts = {wide[y : y + 4, x : x + 4].tobytes() for y in range(5) for x in range(5)}
    found = {np.asarray(transform(Image.fromarray(image))).tobytes() for _ in range(40)}
    assert found <= cuts and len(found) > 5


def test_resized_pieces_have_the_area_asked_for():
    """A ramp whose value is the place: the range of values tells how wide the piece was."""
    ramp = Image.fromarray(np.tile(np.arange(0, 200, dtype=np.uint8), (200, 1)))
    options = Augment(crop="resized", scale=(0.25, 0.25), ratio=(1.0, 1.0))
    transform = training_transform(options, (1, 200, 200), None, "nearest", CONVENTIONS["half"])
    widths = [int(np.ptp(np.asarray(transform(ramp)).astype(int))) for _ in range(10)]
    assert all(98 <= width <= 101 for width in widths)


@pytest.mark.parametrize(("mode", "rows", "within"), [("const", 1, 1), ("rand", 3, 1), ("pixel", 3, 9)])
def test_erasing_modes(mode, rows, within):
    """How many values fill the hole: none but zero, one a channel, one a pixel."""
    torch.manual_seed(0)
    erase = erasing(Augment(random_erasing=1.0, erasing_mode=mode))
    (image,) = erase(torch.full((1, 3, 40, 40), 7.0))
    hole = image[:, (image != 7.0).any(0)]
    assert hole.shape[1] > 9 and len({tuple(row.tolist()) for row in hole}) == rows
    assert min(len(set(row.tolist())) for row in hole) >= within and (within > 1 or len(set(hole[0].tolist())) == 1)


def test_mixup_and_cutmix_share():
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])

    def ratios(**options):
        mixed, _ = mixing(Augment(mixup=1.0, cutmix=1.0, **options), 4)(images.clone(), labels)
        return torch.stack(
            [
                ((row == image) | (row == other)).float().mean()
                for row, image, other in zip(mixed, images, images.flip(0), strict=True)
            ]
        )

    np.random.seed(0)
    assert all((ratios(cutmix_share=1.0) == 1).all() for _ in range(8)), "each pixel is one image's or the other's"
    assert all((ratios(cutmix_share=0.0) < 0.1).all() for _ in range(8))


@pytest.mark.parametrize(("mode", "weights"), [("batch", 1), ("pair", 2), ("elem", 4)])
def test_mix_modes(mode, weights):
    np.random.seed(0)
    mix = mixing(Augment(mixup=1.0, mix_mode=mode), 4)
    _, labels = mix(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert torch.allclose(labels.sum(1), torch.ones(4))
    assert len({round(float(labels[row, row]), 5) for row in range(4)}) == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "augment.flip: 1.5, expected a probability"),
        ({"repeats": 0}, "augment.repeats: 0, expected at least 1"),
        ({"mixup": -1.0}, "augment.mixup: -1.0, expected at least 0"),
        ({"scale": (1.0, 0.5)}, "augment.scale: 1.0 to 0.5, expected two positive numbers, the smaller first"),
        ({"crop": "five"}, "augment.crop: 'five', expected none, pad, resized"),
        ({"mix_mode": "half"}, "augment.mix_mode: 'half', expected batch, pair, elem"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Augment(**options)


@pytest.mark.parametrize("name", ["randm9", "rand-x9", "nothing", "augmix-q", "rand-m9-mstd"])
def test_a_policy_timm_does_not_know(tree, name):
    with pytest.raises(
        ValueError, match=rf"augment.auto_augment: timm does not know '{name}' .*expected something like"
    ):
        module(tree, auto_augment=name).train_dataloader()
