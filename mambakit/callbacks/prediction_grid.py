"""Shows what a vision task makes of some of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mambakit.callbacks.pictures import as_shown, class_names, run_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = tuple[Tensor, str, str]  # (H, W, C) of 0 to 1 or (H, W) class numbers, a title, the colour of title and frame


class PredictionGrid(Callback):
    """Saves ``predictions_validation.png`` at the end of a fit and ``predictions_test.png`` at the end of a test.

    The images are taken at even distances over the whole split, neither chosen nor sorted by success. What is shown
    follows from what the task's step returns, as of the last validation or of the test:

    - ``logits`` (B, K): the image, the predicted class and its probability, in red with the true one where wrong;
    - ``logits`` (B, K, H, W): the image, its true classes pixel by pixel, the predicted ones;
    - ``masked`` and ``restored`` (B, C, H, W): the image, what the model saw of it, what it made of that.

    Args:
        images: how many.
        columns: how many stand side by side.
    """

    def __init__(self, images: int = 40, columns: int = 10) -> None:
        if images < 1 or columns < 1:
            raise ValueError(f"PredictionGrid: images={images}, columns={columns}, expected at least 1 of each")
        self.images = images
        self.columns = columns
        self.kept: list[dict[str, Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._keep(outputs, batch, batch_idx, int(sum(trainer.num_val_batches)))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._keep(outputs, batch, batch_idx, int(sum(trainer.num_test_batches)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save("validation", trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save("test", trainer)

    def _keep(self, outputs: dict[str, Tensor], batch: dict[str, Tensor], batch_idx: int, batches: int) -> None:
        """Keep this batch's share of the images, evenly spread over its rows."""
        share = (batch_idx + 1) * self.images // batches - batch_idx * self.images // batches
        inputs = batch["inputs"]
        share = min(share, len(inputs))
        if share:
            rows = torch.arange(share, device=inputs.device) * len(inputs) // share
            wanted = {"inputs": inputs, "labels": batch.get("labels"), **outputs}
            self.kept.append({name: value[rows].cpu() for name, value in wanted.items() if value is not None})

    def _save(self, stage: str, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        if not self.kept or folder is None or not trainer.is_global_zero:
            return
        shown = {name: torch.cat([part[name] for part in self.kept]) for name in self.kept[0]}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"predictions_{stage}.png"
        grid_figure(self._panels(trainer, shown), self.columns, f"{stage}, {folder}").savefig(path)
        print(f"predictions: {path}", flush=True)

    def _panels(self, trainer: Trainer, shown: dict[str, Tensor]) -> list[list[Panel]]:
        """For each image the panels that belong together."""
        images = as_shown(trainer, shown["inputs"])
        if "restored" in shown:
            masked, restored = (as_shown(trainer, shown[name]) for name in ("masked", "restored"))
            titles = ("image", "seen", "restored")
            return [
                [(one, title, "black") for one, title in zip(row, titles, strict=True)]
                for row in zip(images, masked, restored, strict=True)
            ]
        logits, labels = shown["logits"], shown["labels"]
        if logits.dim() == 4:
            guesses = logits.argmax(1)
            return [
                [(image, "image", "black"), (truth, "true", "black"), (guess, "predicted", "black")]
                for image, truth, guess in zip(images, labels, guesses, strict=True)
            ]
        names = class_names(trainer, logits.shape[1])
        sure, guesses = logits.float().softmax(1).max(1)
        panels: list[list[Panel]] = []
        for image, label, guess, certainty in zip(
            images, labels.tolist(), guesses.tolist(), sure.tolist(), strict=True
        ):
            right = label == guess
            title = f"{names[guess]} {certainty:.0%}" + ("" if right else f"\nis {names[label]}")
            panels.append([(image, title, "black" if right else "tab:red")])
        return panels


def grid_figure(groups: Sequence[Sequence[Panel]], columns: int, title: str) -> Figure:
    """A figure of panels, ``columns`` a row, those of one group side by side."""
    from matplotlib.figure import Figure

    together = len(groups[0])
    across = max(1, min(columns // together, len(groups))) * together
    panels = [panel for group in groups for panel in group]
    down = -(-len(panels) // across)
    figure = Figure(figsize=(1.3 * across, 1.65 * down + 0.5), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes in (grid := figure.subplots(down, across, squeeze=False)).flat:
        axes.axis("off")
    for axes, (picture, text, color) in zip(grid.flat, panels, strict=False):
        if picture.dim() == 2:
            axes.imshow(picture.numpy(), cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
        else:
            axes.imshow(picture.expand(-1, -1, 3).numpy(), interpolation="nearest")
        axes.set_title(text, fontsize=8, color=color)
        if color != "black":
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=color, linewidth=2.5)
    return figure
