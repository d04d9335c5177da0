"""A class for every pixel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mambakit.heads.segment import SegmentHead
from mambakit.optim import OptimConfig
from mambakit.tasks.base import Task, start_anew
from mambakit.tasks.timm_model import check_features, spare_from_decay, timm_model


class Segment(Task):
    """Semantic segmentation: a timm model's feature maps and a small head (:class:`mambakit.heads.SegmentHead`).

    A batch is a dictionary: ``inputs``, images (B, C, H, W) of floats, and ``labels``, (B, H, W) int64, with
    ``ignore_index`` where nothing is asked.

    Logs ``{train,validation,test}/loss``, the cross-entropy in nats a pixel that counts; in validation and test also
    ``miou``, over all pixels of the split the intersection of predicted and true pixels of a class over their union,
    averaged over the classes that occur, and ``accuracy``, of pixels.

    A pyramid gives the last map of each of its resolutions, a model of one resolution those of up to four layers at
    even distances.

    Args:
        backbone: name of a timm model, or a model of timm's protocol (``forward_intermediates``, ``feature_info``).
        num_classes: K.
        in_chans: C.
        width: channels of the head.
        ignore_index: the label of pixels that do not count.
        timm_options: of a timm model: ``img_size``, ``drop_path_rate``, ``pretrained``, ...
        weights: a file of weights for a timm model.
        optim: optimiser and schedule.

    Raises:
        ValueError: a model without feature maps, or what :func:`mambakit.tasks.timm_model.timm_model` refuses.
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        num_classes: int,
        in_chans: int = 3,
        width: int = 128,
        ignore_index: int = 255,
        timm_options: dict[str, Any] | None = None,
        weights: str | None = None,
        optim: OptimConfig | None = None,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters(ignore=["backbone"])
        self.num_classes, self.ignore_index = num_classes, ignore_index
        if isinstance(backbone, str):
            backbone = timm_model(backbone, weights, **{"num_classes": 0, "in_chans": in_chans, **(timm_options or {})})
        self.model = check_features(backbone)
        spare_from_decay(self.model)
        self.indices = levels([one["reduction"] for one in self.model.feature_info])
        self.head = SegmentHead([self.model.feature_info[i]["num_chs"] for i in self.indices], num_classes, width)
        options: dict[str, Any] = {"num_classes": num_classes, "ignore_index": ignore_index}
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict(
                    {
                        "loss": MeanMetric(),
                        "miou": MulticlassJaccardIndex(**options),
                        "accuracy": MulticlassAccuracy(**options, average="micro"),
                    }
                )
                for stage in ("validation", "test")
            }
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, C, H, W)."""
        maps = self.model.forward_intermediates(inputs, indices=self.indices, intermediates_only=True)
        return self.head(maps, tuple(inputs.shape[2:]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, _ = self._loss(self(batch["inputs"]), batch["labels"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["inputs"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._measure(batch, "validation")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._measure(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Classes (B, H, W) int64."""
        return self(batch["inputs"]).argmax(1)

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the pixels that count, and their number."""
        if labels.shape != (len(logits), *logits.shape[2:]):
            raise ValueError(
                f"labels: shape {tuple(labels.shape)}, expected a class for every pixel, (batch, height, width) = "
                f"{(len(logits), *logits.shape[2:])}"
            )
        count = (labels != self.ignore_index).sum()
        total = F.cross_entropy(logits.float(), labels, ignore_index=self.ignore_index, reduction="sum")
        return total / count.clamp(min=1), count

    def _measure(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        logits, labels = self(batch["inputs"]), batch["labels"]
        metrics: Any = self.metrics[stage]
        loss, count = self._loss(logits, labels)
        metrics["loss"].update(loss, weight=count)
        for name in ("miou", "accuracy"):
            metrics[name].update(logits.argmax(1), labels)
        return {"logits": logits}

    def _report(self, stage: str) -> None:
        metrics: Any = self.metrics[stage]
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric.compute().float(), prog_bar=name != "accuracy")
            start_anew(metric)


def levels(reductions: list[int]) -> list[int]:
    """Which maps serve: the last of each resolution; of a single resolution, up to four at even distances."""
    last = {reduction: i for i, reduction in enumerate(reductions)}
    if len(last) > 1:
        return sorted(last.values())
    count = min(4, len(reductions))
    return torch.linspace(0, len(reductions), count + 1)[1:].round().int().sub(1).tolist()
