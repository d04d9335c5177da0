"""Pretraining without labels: restore what was hidden of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mambakit.optim import OptimConfig
from mambakit.tasks.base import Task, start_anew
from mambakit.tasks.timm_model import check_features, spare_from_decay, timm_model


class MaskedImage(Task):
    """SimMIM (Xie et al. 2022, arXiv 2111.09886): hide squares of an image, restore their pixels from the rest.

    With m the hidden pixels, x' the image with a learnt square in their place, f the model's last feature map of stride
    s, and one linear map W from a feature to s x s pixels:

        loss = mean over m of |x - W f(x')|

    The learnt square is in pixels; where squares are whole patches, the patch embedding turns it into SimMIM's mask
    token, and any model of timm's protocol can be trained, pyramids too. ``weights`` of
    :class:`mambakit.tasks.Classify` reads the checkpoint: the model is called ``model`` in both.

    A batch is a dictionary with ``inputs``, normalised images (B, C, H, W); the rest of it is not looked at. Logs
    ``{train,validation,test}/loss``, the mean over all hidden values of the split. Validation and test hide the same
    squares each time.

    Args:
        backbone: name of a timm model, or a model of timm's protocol (``forward_intermediates``, ``feature_info``).
        in_chans: C; the command line takes it from the data.
        mask_size: side of the squares in pixels, a multiple of the model's patch; 32 in the paper for images of 224.
        mask_ratio: the part of the squares that is hidden, 0.6 in the paper.
        timm_options: of a timm model: ``img_size``, ``patch_size``, ...
        weights: a file of weights for a timm model.
        optim: optimiser and schedule.

    Raises:
        ValueError: a ratio outside 0 to 1, a model without feature maps, or what
            :func:`mambakit.tasks.timm_model.timm_model` refuses.
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        in_chans: int = 3,
        mask_size: int = 32,
        mask_ratio: float = 0.6,
        timm_options: dict[str, Any] | None = None,
        weights: str | None = None,
        optim: OptimConfig | None = None,
    ) -> None:
        super().__init__(optim)
        self.save_hyperparameters(ignore=["backbone"])
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio: {mask_ratio}, expected between 0 and 1, both excluded")
        self.mask_size, self.mask_ratio = mask_size, mask_ratio
        if isinstance(backbone, str):
            backbone = timm_model(backbone, weights, **{"num_classes": 0, "in_chans": in_chans, **(timm_options or {})})
        self.model = check_features(backbone)
        spare_from_decay(self.model)
        last = self.model.feature_info[-1]
        self.stride: int = last["reduction"]
        self.mask_square = nn.Parameter(0.02 * torch.randn(in_chans, mask_size, mask_size))
        self.mask_square._no_weight_decay = True  # type: ignore[attr-defined]
        self.decoder = nn.Sequential(
            nn.Conv2d(last["num_chs"], in_chans * self.stride**2, 1), nn.PixelShuffle(self.stride)
        )
        self.losses = nn.ModuleDict({"validation": MeanMetric(), "test": MeanMetric()})

    def forward(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(the images as the model sees them, all pixels as it restores them), each (B, C, H, W).

        Args:
            inputs: (B, C, H, W).
            mask: (B, rows, columns) bool, True at hidden squares.

        Raises:
            ValueError: an image that the model's feature map, at its stride, does not cover.
        """
        height, width = inputs.shape[2:]
        square = self.mask_square.to(inputs.dtype).repeat(1, *mask.shape[1:])
        masked = torch.where(self._pixels(mask), square, inputs)
        (features,) = self.model.forward_intermediates(masked, indices=1, norm=True, intermediates_only=True)
        restored = self.decoder(features)
        if restored.shape[2:] != inputs.shape[2:]:
            raise ValueError(
                f"backbone: its last feature map, at a stride of {self.stride}, covers {restored.shape[2]} x "
                f"{restored.shape[3]} of {height} x {width} pixels; expected patches that do not overlap, and a size "
                "that they divide"
            )
        return masked, restored

    def hide(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw which squares of images (B, C, H, W) to hide: (B, rows, columns) bool, as many in each image.

        Raises:
            ValueError: an image that squares do not divide, or of which none or all would be hidden.
        """
        batch, _, height, width = inputs.shape
        rows, columns = height // self.mask_size, width // self.mask_size
        if height % self.mask_size or width % self.mask_size:
            raise ValueError(f"mask_size: {self.mask_size} does not divide images of {height} x {width} pixels")
        count = round(self.mask_ratio * rows * columns)
        if not 0 < count < rows * columns:
            raise ValueError(
                f"mask_ratio: {self.mask_ratio} hides {count} of the {rows * columns} squares of mask_size "
                f"{self.mask_size}; expected some and not all: lower mask_size"
            )
        order = torch.rand(batch, rows * columns, generator=generator).argsort(1)
        return (order < count).view(batch, rows, columns).to(inputs.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        inputs = batch["inputs"]
        mask = self.hide(inputs)
        _, restored = self(inputs, mask)
        loss = self._loss(inputs, restored, mask)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(inputs))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._measure(batch, batch_idx, "validation")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._measure(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _pixels(self, mask: Tensor) -> Tensor:
        """(B, 1, H, W) bool from squares (B, rows, columns)."""
        return mask.repeat_interleave(self.mask_size, 1).repeat_interleave(self.mask_size, 2).unsqueeze(1)

    def _loss(self, inputs: Tensor, restored: Tensor, mask: Tensor) -> Tensor:
        error = (inputs.float() - restored.float()).abs().mean(1, keepdim=True)
        hidden = self._pixels(mask)
        return (error * hidden).sum() / hidden.sum()

    def _measure(self, batch: dict[str, Tensor], batch_idx: int, stage: str) -> dict[str, Tensor]:
        inputs = batch["inputs"]
        mask = self.hide(inputs, torch.Generator().manual_seed(batch_idx))
        masked, restored = self(inputs, mask)
        self.losses[stage].update(self._loss(inputs, restored, mask), weight=len(inputs))  # type: ignore[operator]
        return {"masked": masked, "restored": torch.where(self._pixels(mask), restored.to(inputs.dtype), inputs)}

    def _report(self, stage: str) -> None:
        self.log(f"{stage}/loss", self.losses[stage].compute(), prog_bar=True)  # type: ignore[operator]
        start_anew(self.losses[stage])  # type: ignore[arg-type]
