"""Which classes are taken for which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mambakit.callbacks.pictures import class_names, run_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 20  # with more classes the cells are too small for their counts


class ConfusionMatrix(Callback):
    """Saves ``confusion_validation.png`` at the end of a fit and ``confusion_test.png`` at the end of a test.

    Row i, column j: how many examples of class i were taken for class j, in the last validation or in the test; the
    colour is the part of the row. For tasks whose steps return ``{"logits": (B, K, ...)}`` and whose batches hold
    ``labels`` (B, ...), such as :class:`mambakit.tasks.Classify` and, pixel by pixel, :class:`mambakit.tasks.Segment`.
    Counts of several processes are added up.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.pop("validation", None)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.pop("test", None)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._count("validation", outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._count("test", outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_up("validation", pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_up("test", pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save("validation", trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save("test", trainer)

    def _count(self, stage: str, outputs: Any, batch: Any) -> None:
        logits, labels = outputs["logits"], batch["labels"]
        classes = logits.shape[1]
        asked = (labels >= 0) & (labels < classes)  # segmentation marks pixels that do not count by another number
        cells = (labels * classes + logits.argmax(1))[asked]
        cells = torch.bincount(cells, minlength=classes**2).view(classes, classes)
        self.counts[stage] = self.counts.get(stage, 0) + cells

    def _add_up(self, stage: str, pl_module: LightningModule) -> None:
        if stage in self.counts and pl_module.trainer.world_size > 1:
            self.counts[stage] = pl_module.all_gather(self.counts[stage]).sum(0)  # type: ignore[union-attr]

    def _save(self, stage: str, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        if stage not in self.counts or folder is None or not trainer.is_global_zero:
            return
        counts = self.counts[stage].cpu()
        title = f"{stage}: {int(counts.trace()):,} of {int(counts.sum()):,} right ({Path(folder)})"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"confusion_{stage}.png"
        confusion_figure(counts, class_names(trainer, len(counts)), title).savefig(path)
        print(f"confusion matrix: {path}", flush=True)


def confusion_figure(counts: Tensor, names: list[str], title: str) -> Figure:
    """A figure of counts (K, K), rows the true classes, coloured by the part of their row."""
    # Without pyplot it needs no display, and leaves a notebook's figures and backend alone.
    from matplotlib.figure import Figure

    classes = len(counts)
    side = min(16.0, 3.5 + 0.5 * classes)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    parts = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(parts.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="part of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    every = max(1, -(-classes // 50))
    places = list(range(0, classes, every))
    axes.set_xticks(places, [names[i] for i in places], rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(places, [names[i] for i in places])
    if classes <= NUMBERED:
        for i in range(classes):
            for j in range(classes):
                if counts[i, j]:
                    color = "white" if parts[i, j] > 0.5 else "black"
                    axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", color=color, fontsize=8)
    return figure
