"""Segmentation: a class for every pixel, from feature maps of one or several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SegmentHead(nn.Module):
    """SegFormer's head (Xie et al. 2021, arXiv 2105.15203) with a 3 x 3 convolution in place of its fusing 1 x 1.

    Every map is brought to ``width`` channels and to the resolution of the finest one; side by side they go through a
    convolution, a norm and GELU, and a linear map gives the classes, which are brought to the image's size:

        logits = resize(W GELU(norm(conv([resize(W_1 f_1), ..., resize(W_n f_n)]))))

    The norm is over each image's channels and pixels, so it does not depend on the batch.

    Args:
        channels: of each map.
        num_classes: K.
        width: channels in between.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(one, width, 1) for one in channels)
        self.fuse = nn.Conv2d(width * len(channels), width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, width)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps (B, C_i, H_i, W_i) to logits (B, K, height, width) for ``size`` = (height, width)."""
        projected = [level(one) for level, one in zip(self.levels, maps, strict=True)]
        finest = max((tuple(one.shape[2:]) for one in projected), key=lambda shape: shape[0] * shape[1])
        joined = torch.cat([_resized(one, finest) for one in projected], dim=1)
        return _resized(self.classify(F.gelu(self.norm(self.fuse(joined)))), size)


def _resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=False)
