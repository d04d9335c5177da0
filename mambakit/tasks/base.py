"""What every task shares: the optimiser and its schedule."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from mambakit.optim import OptimConfig, describe_groups, parameter_groups, warmup_cosine


class Task(LightningModule):
    """A LightningModule with AdamW, parameter groups and warm-up with cosine. Holds no data.

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
        total = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, total, self.optim.warmup, self.optim.min_lr_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
