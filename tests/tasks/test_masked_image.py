"""Masked-image pretraining: what is hidden, what counts, and what becomes of the weights."""

import lightning
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from mambakit.callbacks import PredictionGrid
from mambakit.optim import OptimConfig
from mambakit.tasks import Classify, MaskedImage

VIM = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1}
SWIN = {"img_size": 32, "window_size": 2, "depths": (1, 1), "embed_dim": 8, "num_heads": (1, 1), "patch_size": 2}


def task(**options):
    lightning.seed_everything(0, verbose=False)
    return MaskedImage("vim_tiny_patch16_224", **{"timm_options": VIM, "mask_size": 2, **options})


def stripes(batches, seed=0):
    """Images of horizontal stripes of two shades: what is hidden follows from what is seen."""
    draw = torch.Generator().manual_seed(seed)
    shades = torch.rand(batches, 16, 3, 4, 1, 1, generator=draw) * 2 - 1
    return DataLoader(
        [{"inputs": one.expand(-1, -1, -1, 2, 8).reshape(16, 3, 8, 8)} for one in shades], batch_size=None
    )


def trainer(tmp_path, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, **quiet, **options)


def test_as_many_squares_are_hidden_in_each_image():
    mask = task(mask_ratio=0.6).hide(torch.zeros(5, 3, 8, 8))
    assert mask.shape == (5, 4, 4) and mask.flatten(1).sum(1).tolist() == [10] * 5
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_only_hidden_pixels_count_and_the_model_does_not_see_them():
    model = task().eval()
    inputs, mask = torch.randn(2, 3, 8, 8), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3, 0] = True
    hidden = inputs.clone()
    hidden[0, :, 2:4, 4:6] = hidden[1, :, 6:8, 0:2] = 100.0
    masked, restored = model(inputs, mask)
    torch.testing.assert_close(model(hidden, mask), (masked, restored))
    assert torch.equal(masked[0, :, 2:4, 4:6], model.mask_square) and torch.equal(masked[0, :, :2], inputs[0, :, :2])
    model.hide = lambda *_: mask
    wanted = torch.stack(
        [(inputs - restored)[0, :, 2:4, 4:6].abs().mean(), (inputs - restored)[1, :, 6:8, 0:2].abs().mean()]
    ).mean()
    assert model.training_step({"inputs": inputs}, 0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_validation_hides_the_same_squares_each_time_and_training_learns(tmp_path):
    model = task(optim=OptimConfig(lr=1e-2))
    first, again = (trainer(tmp_path).validate(model, stripes(3, 9), verbose=False)[0] for _ in range(2))
    assert first == again
    trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0).fit(model, stripes(60), stripes(1))
    (after,) = trainer(tmp_path).test(model, stripes(3, 9), verbose=False)
    # Shades are uniform in -1 to 1: their middle, which no look at the image tells, is off by 0.5.
    assert first["validation/loss"] > 0.45 and after["test/loss"] < 0.4


def test_every_parameter_learns():
    model = task()
    model.log = lambda *_, **__: None
    model.training_step({"inputs": torch.randn(2, 3, 8, 8)}, 0).backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []
    assert model.mask_square.grad.abs().sum() > 0


def test_a_pyramid_is_restored_from_its_last_map():
    model = MaskedImage("swin_tiny_patch4_window7_224", mask_size=8, timm_options=SWIN)
    inputs = torch.randn(2, 3, 32, 32)
    _, restored = model(inputs, model.hide(inputs))
    assert model.stride == 4 and restored.shape == inputs.shape


def test_a_classifier_begins_with_the_weights(tmp_path):
    model = task()
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, stripes(1))
    run.save_checkpoint(tmp_path / "pretrained.ckpt")
    options = {"num_classes": 4, "timm_options": VIM, "weights": str(tmp_path / "pretrained.ckpt")}
    classifier = Classify("vim_tiny_patch16_224", **options)
    torch.testing.assert_close(classifier.model.layers.state_dict(), model.model.layers.state_dict())
    assert classifier.model.head.weight.shape == (4, 16)


def test_the_grid_shows_the_image_what_was_seen_and_what_was_made_of_it(tmp_path):
    grid = PredictionGrid(images=3)
    run = trainer(tmp_path, max_steps=1, callbacks=[grid])
    run.fit(task(), stripes(1), stripes(2))
    shown = {name: torch.cat([part[name] for part in grid.kept]) for name in grid.kept[0]}
    panels = grid._panels(run, shown)
    assert [[title for _, title, _ in group] for group in panels] == [["image", "seen", "restored"]] * 3
    assert (tmp_path / "predictions_validation.png").is_file()


def test_bad_input():
    with pytest.raises(ValueError, match="mask_ratio: 1.0, expected between 0 and 1"):
        task(mask_ratio=1.0)
    with pytest.raises(ValueError, match="mask_size: 3 does not divide images of 8 x 8 pixels"):
        task(mask_size=3).hide(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="hides 1 of the 1 squares of mask_size 8.*lower mask_size"):
        task(mask_size=8).hide(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="Linear gives no feature maps"):
        MaskedImage(nn.Linear(2, 2))
    overlapping = task(timm_options={**VIM, "patch_size": 4, "stride": 2})
    with pytest.raises(ValueError, match=r"at a stride of 2, covers 6 x 6 of 8 x 8 pixels"):
        overlapping(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 4, dtype=torch.bool))
