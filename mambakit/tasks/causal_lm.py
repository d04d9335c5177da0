"""Next-token prediction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from mambakit.backbone import Backbone
from mambakit.models import LanguageModel, PresetBackbone, PresetName
from mambakit.optim import OptimConfig
from mambakit.tasks.base import Task, start_anew


class BitsPerByte(Metric):
    """Total nats over ln 2 and the bytes they stand for: comparable between tokenizers."""

    full_state_update = False
    nats: Tensor
    n_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, n_bytes: Tensor) -> None:
        self.nats += nats
        self.n_bytes += n_bytes

    def compute(self) -> Tensor:
        return self.nats / (math.log(2) * self.n_bytes)


class CausalLM(Task):
    """Train a language model to predict the next token.

    A batch is a dictionary: ``input_ids`` and ``labels`` (B, L) int64, labels already shifted and -100 where nothing is
    asked; optionally ``seq_idx`` (B, L) int32 for packed documents, ``mask`` (B, L) bool for padding, and ``n_bytes``,
    the bytes the labels stand for, which gives bits per byte.

    Logs ``{train,validation,test}/loss`` in nats a token; in validation and test also ``perplexity`` = exp(loss) and
    ``bits_per_byte``, each over all labels of the split, not over batches.

    Args:
        vocab_size: V; the command line takes it from the data.
        backbone: the stack of mixers, or the name of a preset (:mod:`mambakit.models.presets`).
        tie_embeddings: embedding and head share one matrix.
        optim: optimiser and schedule.
        balance_weight: weight in the training loss of how unevenly a backbone's experts are used, where it has some;
            ``train/loss`` is logged with it, validation and test go without.
    """

    def __init__(
        self,
        vocab_size: int,
        backbone: Backbone | PresetName,
        tie_embeddings: bool = True,
        optim: OptimConfig | None = None,
        balance_weight: float = 0.01,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters(ignore=["backbone"])
        self.balance_weight = balance_weight
        stack = PresetBackbone(backbone) if isinstance(backbone, str) else backbone
        self.model = LanguageModel(vocab_size, stack, tie_embeddings)
        self.loss_metrics = nn.ModuleDict({"validation": MeanMetric(), "test": MeanMetric()})
        self.byte_metrics = nn.ModuleDict({"validation": BitsPerByte(), "test": BitsPerByte()})

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Logits (B, L, V), as of :meth:`LanguageModel.forward`."""
        return self.model(input_ids, **kwargs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch, "mean", self.balance_weight)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch["labels"].shape[0])
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure(batch, "validation")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy in nats of every label (B, L), 0 where nothing is asked."""
        return self._loss(batch, "none")

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _loss(self, batch: dict[str, Tensor], reduction: str, balance_weight: float = 0.0) -> Tensor:
        return self.model.loss(
            batch["input_ids"],
            batch["labels"],
            seq_idx=batch.get("seq_idx"),
            mask=batch.get("mask"),
            reduction=reduction,
            balance_weight=balance_weight,
        )

    def _measure(self, batch: dict[str, Tensor], stage: str) -> None:
        nats = self._loss(batch, "sum").double()
        count = (batch["labels"] != -100).sum()
        if count > 0:
            self.loss_metrics[stage].update(nats / count, weight=count)  # type: ignore[operator]
        if "n_bytes" in batch:
            self.byte_metrics[stage].update(nats, batch["n_bytes"].sum())  # type: ignore[operator]

    def _report(self, stage: str) -> None:
        loss = self.loss_metrics[stage].compute()  # type: ignore[operator]
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp())
        bits = self.byte_metrics[stage]
        if bits.n_bytes > 0:  # type: ignore[operator]
            self.log(f"{stage}/bits_per_byte", bits.compute().float(), prog_bar=True)  # type: ignore[operator]
        start_anew(self.loss_metrics[stage], bits)  # type: ignore[arg-type]
