"""Draws the loss over the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]


class LossCurve(Callback):
    """Saves ``loss.png`` in the log directory: training and validation loss over optimiser steps.

    Written at the end of a fit and when an exception ends it. The points are part of the callback's state, so a
    resumed run draws the whole curve.

    Args:
        train: name of the logged training loss; read at every ``log_every_n_steps``.
        validation: name of the logged validation loss.
        unit: of both, for the axis.
    """

    def __init__(self, train: str = "train/loss", validation: str = "validation/loss", unit: str = "nats") -> None:
        self.names = {"train": train, "validation": validation}
        self.unit = unit
        self.points: dict[str, Points] = {"train": [], "validation": []}
        self.path: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here every process takes part: finding the log directory is a broadcast.
        directory, dry = trainer.log_dir, trainer.fast_dev_run  # type: ignore[attr-defined]
        self.path = None if directory is None or dry else Path(directory, "loss.png")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Reading a value waits for the device, so not at every step.
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._read("train", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read("validation", trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A sanity check of a few batches is no measurement of the validation loss.
        if sum(trainer.num_sanity_val_batches) != sum(trainer.num_val_batches):
            self.points["validation"].clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = {key: [tuple(point) for point in points] for key, points in state_dict["points"].items()}

    def _read(self, curve: str, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(self.names[curve])
        points = self.points[curve]
        if value is not None and (not points or points[-1][0] != trainer.global_step):
            points.append((trainer.global_step, float(value)))

    def _save(self, trainer: Trainer) -> None:
        drawn = any(step > 0 for points in self.points.values() for step, _ in points)
        if drawn and self.path is not None and trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            title = f"{type(trainer.lightning_module).__name__}: {self.path.parent}"
            losses_figure(self.points["train"], self.points["validation"], self.unit, title).savefig(self.path)
            print(f"loss curve: {self.path}", flush=True)


def losses_figure(train: Points, validation: Points, unit: str, title: str) -> Figure:
    """A figure of (step, loss) points; the lowest validation loss is marked and written out."""
    # Without pyplot it needs no display, and leaves a notebook's figures and backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.6, linewidth=1, label="train")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", linewidth=2, marker="o", ms=4, label="validation")
        step, best = min(validation, key=lambda point: point[1])
        axes.plot(step, best, "*", color="tab:red", markersize=14, label=f"best validation: {best:.4f} at step {step}")
    axes.set(xlabel="optimiser steps", ylabel=f"loss ({unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
