"""One label for an image, a waveform, a piece of DNA, or any other sequence."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    AUROC,
    AveragePrecision,
    F1Score,
    MatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassCalibrationError,
)

from mambakit.backbone import is_sequence_model
from mambakit.embeddings.rc import COMPLEMENT, complement_table
from mambakit.heads.classify import ClassifierState, PoolName, SequenceClassifier, mask_of
from mambakit.models.caduceus import reverse_complement
from mambakit.optim import OptimConfig
from mambakit.tasks.base import Task, start_anew
from mambakit.tasks.pretrained import discriminative_rates, freeze_backbone, load_pretrained
from mambakit.tasks.timm_model import spare_from_decay, timm_model

MetricName = Literal["mcc", "auroc", "auprc", "f1"]
FURTHER_METRICS = {"mcc": MatthewsCorrCoef, "auroc": AUROC, "auprc": AveragePrecision, "f1": F1Score}


class Classify(Task):
    """Train a model to give one of K labels.

    A batch is a dictionary: ``inputs``, images (B, C, H, W) or sequences (B, L, C) of floats, or ids (B, L) int64;
    ``labels``, (B,) int64, in training also (B, K) floats that sum to 1, as mixup and CutMix make them; for sequences
    of different lengths ``mask`` (B, L) bool, True at real elements, or ``lengths`` (B,).

    Logs ``{train,validation,test}/loss``, the cross-entropy in nats an example (in training with label smoothing); in
    validation and test also, over the whole split, ``accuracy``, ``accuracy_top5`` where K > 5, and
    ``calibration_error``: how far confidence is from accuracy, |accuracy - confidence| averaged over 15 bins of
    confidence by their numbers (ECE; Guo et al. 2017, arXiv 1706.04599). ``metrics`` adds what biology reports.

    Fine-tuning: ``weights`` begins with a backbone that another task has trained, ``freeze`` keeps that as it is, and
    ``layer_decay`` lets it change the less the nearer a layer is to the input.

    Args:
        backbone: a :class:`mambakit.Backbone`, SaShiMi or WaveNet, around which an embedding and a head are put
            (:class:`mambakit.heads.SequenceClassifier`); the name of a timm model, ours among them
            (``vim_tiny_patch16_224``); or any module from ``inputs`` to logits (B, K).
        num_classes: K; the command line takes it from the data.
        in_chans: C; the command line takes it from the data.
        vocab_size: V, where the inputs are ids; the command line takes it from the data.
        pool: of a Backbone's output: "mean", "max", "last", "cls" or "flatten".
        places: with "flatten", the vectors of a sequence, at most.
        dropout: of a Backbone's pooled output.
        timm_options: of a timm model: ``img_size``, ``patch_size``, ``drop_path_rate``, ``pretrained``, ...
        weights: a file of weights for a timm model, such as an earlier run's checkpoint; or for another backbone the
            checkpoint of a CausalLM, MaskedLM, NextNucleotide, NextSample or Classify with the same one. The classifier
            stays new where the file has none or one of other classes.
        freeze: train the head alone, and leave the backbone, its embedding and its dropout out.
        layer_decay: ratio of a layer's learning rate to that of the layer after it, up to 1: 0.65 to 0.9 is usual, 1
            trains all at one rate (:func:`mambakit.tasks.pretrained.discriminative_rates`).
        rate: sampling interval of the data over that in training, for a finished model of S4's family: 2.0 where it
            learnt at 8 kHz and is validated, tested or asked at 4 kHz. A fit takes 1.0 alone.
        conjoin: of DNA: validate, test and predict with the mean of a sequence's logits and its reverse complement's,
            (m(x) + m(rc x)) / 2, which is the same for either strand: post-hoc conjoining, as Caduceus-Ph is used
            (Schiff et al. 2024, arXiv 2403.03234). Training and the calls of the module read the one strand given.
        metrics: further ones, over the whole split: ``mcc``, the Matthews correlation; ``auroc`` and ``auprc``, the
            areas under the receiver's curve and under that of precision over recall; ``f1``. With two classes they are
            of class 1, with more the mean over classes (the Matthews correlation is of all classes at once).
            ``auroc`` and ``auprc`` keep every prediction of the split in memory.
        label_smoothing: e; labels become (1 - e) of themselves and e / K of every class, in training.
        optim: optimiser and schedule.

    Raises:
        ValueError: options of one kind of backbone given with another, an unknown model, weights that do not fit.
    """

    complement_map: Tensor

    def __init__(
        self,
        backbone: nn.Module | str,
        num_classes: int,
        in_chans: int = 3,
        vocab_size: int | None = None,
        pool: PoolName = "mean",
        places: int | None = None,
        dropout: float = 0.0,
        timm_options: dict[str, Any] | None = None,
        weights: str | None = None,
        freeze: bool = False,
        layer_decay: float = 1.0,
        rate: float = 1.0,
        conjoin: bool = False,
        metrics: list[MetricName] | None = None,
        label_smoothing: float = 0.0,
        optim: OptimConfig | None = None,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters(ignore=["backbone"])
        if not isinstance(backbone, str) and timm_options:
            raise ValueError("timm_options: of effect only where backbone is the name of a timm model")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: {label_smoothing}, expected at least 0 and under 1")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay: {layer_decay}, expected above 0, at most 1")
        if conjoin and vocab_size != len(COMPLEMENT):
            raise ValueError(
                f"conjoin: of effect only with ids of nucleotides, and vocab_size is {vocab_size}, expected "
                f"{len(COMPLEMENT)}; leave it out"
            )
        if conjoin and getattr(backbone, "rcps", False):
            raise ValueError("conjoin: the backbone (rcps) gives one answer for both strands already; leave it out")
        self.further = tuple(metrics or ())
        for name in self.further:
            if name not in FURTHER_METRICS:
                raise ValueError(f"metrics: {name!r}, expected some of {', '.join(get_args(MetricName))}")
        self.num_classes = num_classes
        self.conjoin = conjoin
        if conjoin:
            self.register_buffer("complement_map", complement_table(None, len(COMPLEMENT)), persistent=False)
        self.frozen = freeze
        self.label_smoothing = label_smoothing
        if isinstance(backbone, str):
            options = {"num_classes": num_classes, "in_chans": in_chans, **(timm_options or {})}
            self.model = timm_model(backbone, weights, **options)
        elif is_sequence_model(backbone):
            self.model = SequenceClassifier(backbone, num_classes, in_chans, vocab_size, pool, dropout, places)
        else:
            self.model = backbone
        if weights is not None and not isinstance(backbone, str):
            load_pretrained(self._sequences("weights"), weights)
        if freeze:
            freeze_backbone(self._sequences("freeze"))
        if layer_decay != 1:
            discriminative_rates(self._sequences("layer_decay"), self.optim.lr, layer_decay)
        self.rate = 1.0
        if rate != 1:
            self.set_rate(rate)
        spare_from_decay(self.model)
        self.metrics = nn.ModuleDict({stage: self._new_metrics() for stage in ("validation", "test")})

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, K)."""
        return self.model(inputs) if mask is None else self.model(inputs, mask=mask)

    def train(self, mode: bool = True) -> Classify:
        """As of ``nn.Module``; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self._sequences("freeze").backbone.eval()
        return self

    def init_state(self, batch_size: int) -> ClassifierState:
        """Before the first element of ``batch_size`` streams (:meth:`mambakit.heads.SequenceClassifier.init_state`)."""
        return self._sequences("init_state").init_state(batch_size)

    def extend(self, inputs: Tensor, state: ClassifierState) -> tuple[Tensor, ClassifierState]:
        """Logits (B, K) of the streams so far, of which ``inputs`` (B, k, C) or (B, k) is the next piece; the state."""
        return self._sequences("extend").extend(inputs, state)

    def set_rate(self, rate: float) -> None:
        """Read signals whose sampling interval is ``rate`` times that of training, as the option of that name says."""
        self._sequences("rate").set_rate(rate)
        self.rate = rate

    def on_fit_start(self) -> None:
        if self.rate != 1:
            raise ValueError(
                f"rate: {self.rate} in a fit, expected 1: it adapts a finished model to another sampling rate; leave "
                "it out here, and give it to 'mambakit test'"
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self._logits(batch)
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(logits))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._measure(batch, "validation")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._measure(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Probabilities (B, K) float32."""
        return self._logits(batch).float().softmax(-1)

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _sequences(self, asked: str) -> SequenceClassifier:
        """The model, where it is one of ours for sequences."""
        if not isinstance(self.model, SequenceClassifier):
            raise ValueError(
                f"{asked}: of effect only where backbone is a mambakit.Backbone, SaShiMi or WaveNet, and this one is a "
                f"{type(self.model).__name__}"
            )
        return self.model

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        inputs, mask = batch["inputs"], batch.get("mask")
        if mask is None and "lengths" in batch:
            mask = mask_of(batch["lengths"], inputs.shape[1])
        logits = self(inputs, mask)
        if logits.shape != (len(inputs), self.num_classes):
            raise ValueError(
                f"backbone: it gave {tuple(logits.shape)}, expected logits (batch, num_classes) = "
                f"{(len(inputs), self.num_classes)}; leave its classifier in, with num_classes={self.num_classes}"
            )
        if self.conjoin and not self.training:
            logits = (logits + self(reverse_complement(inputs, self.complement_map, mask), mask)) / 2
        return logits

    def _new_metrics(self) -> MetricCollection:
        classes = self.num_classes
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "calibration_error": MulticlassCalibrationError(classes, n_bins=15, norm="l1"),
            "loss": MeanMetric(),
        }
        if classes > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        kind: dict[str, Any] = (
            {"task": "binary"} if classes == 2 else {"task": "multiclass", "num_classes": classes, "average": "macro"}
        )
        for name in self.further:
            options = {key: value for key, value in kind.items() if (name, key) != ("mcc", "average")}
            metrics[name] = FURTHER_METRICS[name](**options)
        return MetricCollection(metrics, compute_groups=False)

    def _measure(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        logits, labels = self._logits(batch).float(), batch["labels"]
        probabilities = logits.softmax(-1)
        for name, metric in self.metrics[stage].items():  # type: ignore[operator, union-attr]
            if name == "loss":
                metric.update(F.cross_entropy(logits, labels), weight=len(labels))
            elif name in self.further and self.num_classes == 2:
                metric.update(probabilities[:, 1], labels)
            else:
                metric.update(probabilities, labels)
        return {"logits": logits}

    def _report(self, stage: str) -> None:
        metrics = self.metrics[stage]
        shown = ("loss", "accuracy")
        for name, value in metrics.compute().items():  # type: ignore[operator]
            self.log(f"{stage}/{name}", value.float(), prog_bar=name in shown)
        start_anew(metrics)  # type: ignore[arg-type]
