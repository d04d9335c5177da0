"""Segmentation: which maps serve, metrics over all pixels of the split, pixels that do not count."""

import lightning
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from mambakit.callbacks import ConfusionMatrix, PredictionGrid
from mambakit.heads import SegmentHead
from mambakit.optim import OptimConfig
from mambakit.tasks import Segment
from mambakit.tasks.segment import levels

VIM = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2}


def task(**options):
    lightning.seed_everything(0, verbose=False)
    return Segment("vim_tiny_patch16_224", num_classes=3, width=16, timm_options=VIM, **options)


def scenes(batches, seed=0):
    """Noise around a mean of -1, 0 or 1: three classes, in patches of 2 x 2; the first row does not count."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(batches):
        labels = torch.randint(3, (4 - i % 2, 4, 4), generator=draw).repeat_interleave(2, 1).repeat_interleave(2, 2)
        inputs = labels[:, None] - 1 + 0.2 * torch.randn(len(labels), 3, 8, 8, generator=draw)
        labels[:, 0] = 255
        made.append({"inputs": inputs, "labels": labels})
    return DataLoader(made, batch_size=None)


def trainer(tmp_path, **options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, **quiet, **options)


def test_metrics_are_over_all_pixels_that_count(tmp_path):
    model, loader = task().eval(), scenes(3)
    matrix = ConfusionMatrix()
    (measured,) = trainer(tmp_path, callbacks=[matrix]).validate(model, loader, verbose=False)
    with torch.no_grad():
        logits = torch.cat([model(batch["inputs"]) for batch in loader])
    labels = torch.cat([batch["labels"] for batch in loader])
    guesses, counts = logits.argmax(1), labels != 255
    union = [((guesses == k) | (labels == k))[counts].sum() for k in range(3)]
    both = [((guesses == k) & (labels == k))[counts].sum() for k in range(3)]
    miou = sum(float(a / b) for a, b in zip(both, union, strict=True) if b) / sum(bool(b) for b in union)
    nats = nn.functional.cross_entropy(logits, labels, ignore_index=255)
    assert measured["validation/miou"] == pytest.approx(miou, rel=1e-5)
    assert measured["validation/accuracy"] == pytest.approx(float((guesses == labels)[counts].float().mean()))
    assert measured["validation/loss"] == pytest.approx(float(nats), rel=1e-5)
    assert matrix.counts["validation"].sum() == counts.sum()
    assert matrix.counts["validation"].diag().tolist() == [int(one) for one in both]


def test_training_learns_and_the_grid_shows_classes(tmp_path):
    model, grid = task(optim=OptimConfig(lr=1e-2)), PredictionGrid(images=2)
    run = trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0, callbacks=[grid])
    run.fit(model, scenes(40), scenes(2))
    (measured,) = trainer(tmp_path).test(model, scenes(3, seed=9), verbose=False)
    assert measured["test/miou"] > 0.5
    shown = {name: torch.cat([part[name] for part in grid.kept]) for name in grid.kept[0]}
    assert [[title for _, title, _ in group] for group in grid._panels(run, shown)] == [
        ["image", "true", "predicted"]
    ] * 2
    assert (tmp_path / "predictions_validation.png").is_file()


def test_a_batch_without_a_pixel_that_counts_weighs_nothing(tmp_path):
    loader = list(scenes(3))
    loader[1]["labels"][:] = 255
    (measured,) = trainer(tmp_path).validate(task(), DataLoader(loader, batch_size=None), verbose=False)
    (without,) = trainer(tmp_path).validate(task(), DataLoader([loader[0], loader[2]], batch_size=None), verbose=False)
    assert measured == pytest.approx(without, rel=1e-5)


def test_which_maps_serve():
    assert levels([2, 4, 8, 16, 32]) == [0, 1, 2, 3, 4]
    assert levels([4, 4, 8, 8]) == [1, 3]
    assert levels([16] * 24) == [5, 11, 17, 23]
    assert levels([16] * 2) == [0, 1]


def test_a_pyramid_gives_every_resolution():
    model = Segment("resnet18", num_classes=5, width=8)
    assert len(model.head.levels) == 5
    assert model(torch.randn(1, 3, 32, 40)).shape == (1, 5, 32, 40)


def test_the_head_brings_maps_to_the_finest():
    head = SegmentHead([3, 2], num_classes=4, width=8)
    fused = []
    head.fuse.register_forward_hook(lambda _, args, out: fused.append(args[0].shape))
    assert head([torch.randn(2, 3, 4, 6), torch.randn(2, 2, 2, 3)], (16, 24)).shape == (2, 4, 16, 24)
    assert fused == [(2, 16, 4, 6)]


def test_bad_input():
    with pytest.raises(ValueError, match=r"labels: shape \(2,\), expected a class for every pixel.*\(2, 8, 8\)"):
        task().validation_step({"inputs": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2).long()}, 0)
    with pytest.raises(ValueError, match="Linear gives no feature maps"):
        Segment(nn.Linear(2, 2), num_classes=3)
