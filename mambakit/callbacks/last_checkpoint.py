"""Keeps the newest state of a run, whatever ends it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` in the log directory: after each validation, at the end, and at an exception.

    Lightning writes a new file first and then moves it into place, so the one before stays whole until then.
    ModelCheckpoint's own ``save_last`` is written only when another checkpoint is, which with ``save_top_k=1`` means
    only when the model has just improved.

    With several processes an exception may have come to one of them alone, while saving waits for all: then the
    checkpoint of the last validation stands.
    """

    def __init__(self) -> None:
        self.saved_step = -1
        self.path: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = trainer.global_step
        # Here every process takes part: finding the log directory is a broadcast.
        directory, dry = trainer.log_dir, trainer.fast_dev_run  # type: ignore[attr-defined]
        self.path = None if directory is None or dry else Path(directory, "checkpoints", "last.ckpt")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        # Without a path training has not begun: there is nothing to save, and perhaps not even a model.
        if self.path is not None and trainer.global_step != self.saved_step:
            self.saved_step = trainer.global_step
            trainer.save_checkpoint(self.path, weights_only=False)
