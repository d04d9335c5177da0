"""VisionDataModule as a whole: determinism, views, several processes, bad images, the command line, digits learned."""

import inspect
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mambakit.datamodules.vision import Augment, Normalization, VisionDataModule
from mambakit.datamodules.vision.pixels import pixel_order

SHARED = Path(os.environ.get("MAMBAKIT_DATA", Path(__file__).resolve().parents[4] / "shared/data"))
EVERYTHING = {
    "crop": "pad",
    "flip": 0.5,
    "color_jitter": 0.2,
    "auto_augment": "rand-m9-mstd0.5",
    "random_erasing": 0.5,
    "mixup": 0.5,
    "cutmix": 1.0,
}


def module(data="digits", **options) -> VisionDataModule:
    return VisionDataModule(str(data), **{"batch_size": 4, **options})


def batches(loader, epoch: int = 0, limit: int | None = None) -> list[dict[str, torch.Tensor]]:
    loader.sampler.set_epoch(epoch)
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == limit:
            break
    return found


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


def indices(loader) -> list[int]:
    return torch.cat([batch["index"] for batch in loader]).tolist()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_seed_and_epoch_decide_the_batches(tree, pack, kind):
    path = tree if kind == "folder" else pack(tree, kind)

    def make(**options):
        return module(path, augment=Augment(**EVERYTHING), **options).train_dataloader()

    loader = make()
    first = batches(loader)
    assert len(first) == 6 and same(first, batches(make()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's hint that there are few processors
        workers = make(num_workers=2)
        assert same(first, batches(workers)) and same(batches(loader, epoch=1), batches(workers, epoch=1))
    copy = pickle.loads(pickle.dumps(loader.dataset))  # what a worker gets that is not forked
    assert same([loader.dataset.__getitems__([5, 6])], [copy.__getitems__([5, 6])])
    assert not same(first, batches(loader, epoch=1))
    assert not same(first, batches(make(seed=1)))
    if kind != "folder":
        assert same(first, batches(module(tree, augment=Augment(**EVERYTHING)).train_dataloader()))


def test_batches_leave_the_generators_alone(tree):
    """Otherwise the dropout of a model would begin anew with each batch, and depend on num_workers."""
    dataset = module(tree, augment=Augment(**EVERYTHING)).train_dataloader().dataset

    def draws(between):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        found = []
        for _ in range(3):
            between([0, 1])
            found.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return found

    assert draws(dataset.__getitems__) == draws(list)


def test_an_epoch_is_every_training_image_once(tree):
    data = module(tree, batch_size=2)
    loader = data.train_dataloader()
    orders = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        orders.append(indices(loader))
    assert all(sorted(order) == list(range(26)) for order in orders) and orders[0] != orders[1] != orders[2]
    assert indices(data.val_dataloader()) == list(range(8)) == indices(data.predict_dataloader())


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        ({}, (1, 8, 8), torch.float32),
        ({"color": "rgb"}, (3, 8, 8), torch.float32),
        ({"image_size": 12}, (1, 12, 12), torch.float32),
        ({"view": "pixels"}, (64, 1), torch.float32),
        ({"view": "pixels", "color": "rgb"}, (64, 3), torch.float32),
        ({"view": "pixels", "pixel_values": "token"}, (64,), torch.int64),
        ({"view": "pixels", "pixel_values": "token", "color": "rgb"}, (192,), torch.int64),
    ],
)
def test_shapes(options, shape, dtype):
    data = module(batch_size=6, validation_batch_size=5, test_fraction=0.1, **options)
    assert data.input_shape == shape and data.num_classes == 10
    assert data.in_chans == (3 if options.get("color") == "rgb" else 1)
    for loader, size in ((data.train_dataloader(), 6), (data.val_dataloader(), 5), (data.test_dataloader(), 5)):
        batch = next(iter(loader))
        assert batch["inputs"].shape == (size, *shape) and batch["inputs"].dtype == dtype
        assert batch["labels"].shape == batch["index"].shape == (size,)
        assert batch["labels"].dtype == batch["index"].dtype == torch.int64


def test_values_are_normalised(tree):
    unit, half, own = (
        next(iter(module(tree, normalization=name).val_dataloader()))["inputs"]
        for name in ("unit", "half", Normalization((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)))
    )
    stored = module(tree)._part("validation").source.image(0, 3)
    assert torch.equal((unit[0] * 255).round(), torch.from_numpy(np.array(stored)).permute(2, 0, 1).float())
    assert torch.allclose(half, unit * 2 - 1, atol=1e-6)
    assert torch.allclose(own[:, 2], (unit[:, 2] - 0.3) / 2, atol=1e-6)
    default = next(iter(module(tree).val_dataloader()))["inputs"]
    assert torch.allclose(default[:, 0], (unit[:, 0] - 0.485) / 0.229, atol=1e-5)


@pytest.mark.parametrize("order", ["sequential", "bit_reversal", "random"])
def test_both_views_hold_the_same_pixels(tree, order):
    options = {"augment": Augment(flip=0.5, random_erasing=0.5, mixup=0.5), "color": "rgb"}
    image = next(iter(module(tree, **options).train_dataloader()))
    data = module(tree, view="pixels", pixel_order=order, permutation_seed=7, **options)
    pixels = next(iter(data.train_dataloader()))
    assert torch.equal(pixels["labels"], image["labels"])
    rows = image["inputs"].flatten(2).transpose(1, 2)
    assert torch.equal(pixels["inputs"], rows[:, torch.from_numpy(pixel_order(48, order, 7))])


def test_tokens_are_the_8_bits_themselves():
    tokens = next(iter(module(view="pixels", pixel_values="token").val_dataloader()))["inputs"]
    floats = next(iter(module(normalization="unit").val_dataloader()))["inputs"]
    assert (
        torch.equal(tokens, (floats.flatten(1) * 255).round().long())
        and module(view="pixels", pixel_values="token").vocab_size == 256
    )
    with pytest.raises(AttributeError, match="vocab_size: the pixels are floats"):
        _ = module().vocab_size


def test_evaluation_resizes_the_short_side_and_cuts_the_middle(tree):
    image = module(tree)._part("validation").source.image(0, 3)  # 8 x 6
    data = module(tree, image_size=3, crop_pct=0.75, normalization="unit", interpolation="bilinear")
    wanted = np.asarray(image.resize((5, 4), 2))[:3, 1:4]  # round(0.5) and round(1.0) off the top and the left
    found = (next(iter(data.val_dataloader()))["inputs"][0] * 255).round().permute(1, 2, 0)
    assert np.array_equal(found.numpy(), wanted)


def test_parts_of_digits_share_no_image():
    data = module(test_fraction=0.2, batch_size=1)
    parts = [set(indices(loader)) for loader in (data.val_dataloader(), data.test_dataloader())]
    parts.append(set(data.train_dataloader().dataset.indices.tolist()))
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    other = module(test_fraction=0.2, batch_size=1, seed=5, num_workers=0)
    assert set(indices(other.test_dataloader())) == parts[1], "the seed of training does not move the parts"
    assert set(indices(module(test_fraction=0.2, split_seed=1).test_dataloader())) != parts[1]
    assert "images train 1,259, validation 179, test 359; 10 classes; inputs (1, 8, 8)" in data.describe()


def test_the_data_s_own_parts_are_kept(tree):
    data = module(tree)
    data.setup()
    assert "images train 26, validation 8, test 8; 4 classes; inputs (3, 6, 8)" in data.describe()
    assert data.image_name("test", 3).endswith("images/test/9/1.png")
    assert data.classes == ["10", "9", "cat", "dog"]
    split = module(tree / "train", validation_data=str(tree / "val"), test_data=str(tree / "test"))
    assert same(batches(split.test_dataloader()), batches(data.test_dataloader()))
    assert same(batches(split.val_dataloader()), batches(data.val_dataloader()))


def test_the_jpeg_copies_of_cifar10():
    if not (SHARED / "vision/cifar10_jpg_small.tar").is_file():
        pytest.skip(f"no vision/cifar10_jpg_small.tar under {SHARED} (set MAMBAKIT_DATA)")
    data = VisionDataModule("cifar10_jpg_small.tar", str(SHARED / "vision"), normalization="cifar10", batch_size=256)
    assert "images train 4,500, validation 500, test 1,000; 10 classes; inputs (3, 32, 32)" in data.describe()
    assert data.image_name("test", 999).endswith("cifar10_jpg_small.tar/test/truck/0099.jpg")
    assert torch.bincount(torch.cat([batch["labels"] for batch in data.val_dataloader()])).tolist() == [50] * 10
    inputs = next(iter(data.train_dataloader()))["inputs"]
    assert inputs.mean().abs() < 0.1 and (inputs.std() - 1).abs() < 0.1


class World:
    """Stands for a trainer of ``size`` processes."""

    def __init__(self, rank: int, size: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": size, "rank": rank}
        self.fit_loop = SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(processed=1)))
        )


def test_processes_share_the_images(tree):
    def take(part: str, rank: int, size: int) -> list[int]:
        data = module(tree, batch_size=1)
        data.trainer = World(rank, size)
        return indices(data.train_dataloader() if part == "train" else data.val_dataloader())

    for part, count in (("train", 26), ("validation", 8)):
        alone, shares = take(part, 0, 1), [take(part, rank, 3) for rank in range(3)]
        together = [index for share in shares for index in share]
        assert len(set(together)) == len(together) == (count // 3 * 3 if part == "train" else count)
        assert shares[1] == alone[1::3][: len(shares[1])]


def test_a_batch_that_training_has_not_finished_comes_again(tree):
    data = module(tree)
    data.trainer = World(0, 1)
    loader = data.train_dataloader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert loader.state_dict()["batches"] == 1


def test_preparing_fetches(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: asked.append(self.root))
    module("digits", root=str(tmp_path), download=True).prepare_data()
    module("cifar10", root=str(tmp_path)).prepare_data()
    assert asked == []
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        module(test_data="cifar10", root=str(tmp_path), download=True).prepare_data()
    assert asked == [tmp_path]


def test_without_a_trainer_the_loader_resumes(tree):
    def make():
        loader = module(tree, augment=Augment(**EVERYTHING)).train_dataloader()
        loader.sampler.set_epoch(1)
        return loader

    loader = make()
    whole = list(loader)
    for count, _ in enumerate(loader, 1):
        if count == 3:
            state = loader.state_dict()
            break
    again = make()
    again.load_state_dict(state)
    assert same(list(again), whole[3:])


def test_the_command_line_has_every_option(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VisionDataModule, "data")
    config = tmp_path / "data.yaml"
    config.write_text(
        "class_path: mambakit.datamodules.vision.VisionDataModule\n"
        "init_args:\n  view: pixels\n  normalization: {mean: [0.1], std: [0.2]}\n"
        "  augment: {crop: pad, scale: [0.5, 1.0], repeats: 2}\n"
    )
    arguments = [f"--data={config}", "--data.augment.flip=0.5", "--data.pixel_order=random"]
    made = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert made.augment == Augment(crop="pad", scale=(0.5, 1.0), repeats=2, flip=0.5)
    assert made._normalization() == Normalization((0.1,), (0.2,)) and made.pixel_order == "random"
    named = parser.parse_args([f"--data={config}", "--data.normalization=mnist"])
    assert parser.instantiate_classes(named).data.normalization == "mnist"
    documented = inspect.getdoc(VisionDataModule)
    assert all(f"    {name}: " in documented for name in list(inspect.signature(VisionDataModule).parameters))


class Linear(LightningModule):
    """The least that learns digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.hits: list[torch.Tensor] = []

    def training_step(self, batch, batch_index):
        return torch.nn.functional.cross_entropy(self.layer(batch["inputs"].flatten(1)), batch["labels"])

    def validation_step(self, batch, batch_index):
        self.hits.append(self.layer(batch["inputs"].flatten(1)).argmax(1) == batch["labels"])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fit(folder, data, resume=None, **options):
    torch.manual_seed(0)
    model = Linear()
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings |= {"enable_checkpointing": "callbacks" in options, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = Trainer(default_root_dir=folder, **settings, **options)
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    return model, trainer


def test_two_runs_of_a_seed_end_alike_also_when_one_was_stopped(tmp_path):
    def data(**options):
        return module(batch_size=32, validation_fraction=0.9, augment=Augment(**EVERYTHING), **options)

    whole, _ = fit(tmp_path, data(), max_steps=8)  # 5 steps an epoch
    again, _ = fit(tmp_path, data(num_workers=1), max_steps=8)
    assert torch.equal(whole.layer.weight, again.layer.weight)
    fit(tmp_path, data(), max_steps=7, callbacks=[ModelCheckpoint(tmp_path, "seven", every_n_train_steps=7)])
    resumed, _ = fit(tmp_path, data(), resume=tmp_path / "seven.ckpt", max_steps=8)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    other, _ = fit(tmp_path, data(seed=1), max_steps=8)
    assert not torch.equal(whole.layer.weight, other.layer.weight)


@pytest.mark.parametrize("augment", [Augment(), Augment(mixup=0.2)], ids=["plain", "mixup"])
def test_digits_are_learned(tmp_path, augment):
    data = module(batch_size=32, test_fraction=0.1, augment=augment)
    model, trainer = fit(tmp_path, data, max_epochs=3)
    trainer.test(model, datamodule=data, verbose=False)
    assert torch.cat(model.hits).float().mean() > 0.85


def test_the_checkpoint_holds_classes_and_normalisation(tmp_path, tree):
    data = module()
    _, trainer = fit(tmp_path, data, max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["VisionDataModule"]
    assert saved == {"classes": list("0123456789"), "mean": [0.5], "std": [0.5]}
    module().load_state_dict(saved)
    with pytest.raises(
        ValueError, match="normalization: the checkpoint was trained with mean 0.5, and the data has 0.0"
    ):
        module(normalization="unit").load_state_dict(saved)
    with pytest.raises(ValueError, match="classes: the checkpoint was trained with classes 0, 1, 2, 3, ..., and the"):
        module(tree).load_state_dict(saved)
    assert module(view="pixels", pixel_values="token").state_dict() == {"classes": list("0123456789")}


def test_the_package_loads_lazily():
    heavy = ("lightning", "torchvision", "timm", "sklearn", "PIL")
    code = f"import sys, mambakit.datamodules.vision; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
