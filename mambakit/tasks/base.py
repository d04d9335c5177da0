"""What every task shares: the optimiser and its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from torchmetrics import Metric, MetricCollection

from mambakit.optim import OptimConfig, describe_groups, parameter_groups, warmup_cosine


class Task(LightningModule):
    """A LightningModule with AdamW, parameter groups and warm-up with cosine. Holds no data.

    The cosine ends with the run: with its last step, or with ``Trainer(max_time=...)``, whichever comes first.

    Args:
        optim: optimiser and schedule.
    """

    def __init__(self, optim: OptimConfig | None = None) -> None:
        super().__init__()
        self.optim = optim or OptimConfig()

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self, self.optim.weight_decay)
        rank_zero_info(f"optimiser groups:\n{describe_groups(groups)}")
        for group in groups:
            group.pop("names")
        optimizer = torch.optim.AdamW(groups, lr=self.optim.lr, betas=self.optim.betas, eps=self.optim.eps)
        total = self.trainer.estimated_stepping_batches
        schedule = warmup_cosine(optimizer, total, self.optim.warmup, self.optim.min_lr_ratio, self._elapsed())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _elapsed(self) -> Callable[[], float] | None:
        """Tells the part of the allowed time that is over; None where steps alone end the run."""
        timers = [one for one in self.trainer.callbacks if isinstance(one, Timer)]  # type: ignore[attr-defined]
        timer = next((one for one in timers if one.time_remaining() is not None), None)
        if timer is None:
            return None

        def elapsed() -> float:
            gone, left = timer.time_elapsed(), timer.time_remaining()
            assert left is not None
            # Clocks differ a little between processes, and with them the rates would.
            return self.trainer.strategy.broadcast(min(1.0, gone / (gone + left)) if gone + left > 0 else 1.0)

        return elapsed


def start_anew(*metrics: Metric | MetricCollection) -> None:
    """Reset metrics so that any later stage can use them.

    ``Trainer.validate`` runs in inference mode and the validation of a fit does not: a state that was made in the first
    cannot be added to in the second.
    """
    with torch.inference_mode(False):
        for metric in metrics:
            metric.reset()
