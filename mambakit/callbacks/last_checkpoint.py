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
    """

    def __init__(self) -> None:
        self.saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Before the first step there is nothing to save, and the trainer may not even have a model yet.
        if self.saved_step >= 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        directory = trainer.log_dir
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if directory is None or dry or trainer.global_step == self.saved_step:
            return
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(Path(directory, "checkpoints", "last.ckpt"), weights_only=False)
