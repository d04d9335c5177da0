"""Patch embedding: images to sequences of vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Images (B, C, H, W) to vectors (B, L, d_model), one a patch, row by row from the top left.

    A linear map of every patch (Dosovitskiy et al. 2021, arXiv 2010.11929), as a convolution whose kernel is the patch.
    With a stride below the patch size patches overlap: L = ((H - P) / S + 1) ((W - P) / S + 1). No positions are added.
    Weights begin as LeCun's normal, cut off at two deviations, biases at zero, as in the original Vim.

    Args:
        d_model: width of the vectors.
        img_size: height and width of every image, or one number for both.
        patch_size: P, height and width of a patch, or one number for both.
        stride: S, pixels from one patch to the next; the patch size by default.
        in_chans: C, channels of an image.
        strict_img_size: refuse images of another size than ``img_size``; False takes any size that patches cover.

    Raises:
        ValueError: a size that patches do not cover to the last row and column of pixels.
    """

    def __init__(
        self,
        d_model: int,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        strict_img_size: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = pair(patch_size)
        self.stride = self.patch_size if stride is None else pair(stride)
        if not all(0 < step <= size for step, size in zip(self.stride, self.patch_size, strict=True)):
            raise ValueError(
                f"PatchEmbedding: stride={stride}, expected 1 to patch_size={patch_size}; a larger one skips pixels"
            )
        self.strict_img_size = strict_img_size
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, d_model, self.patch_size, self.stride)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # A normal of deviation s cut off at 2 s deviates by 0.8796 s.
        spread = self.proj.weight[0].numel() ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.proj.weight, std=spread, a=-2 * spread, b=2 * spread)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Expect images of this size from now on. The weights stay as they are."""
        self.img_size = pair(img_size)
        self.grid_size = self.grid_of(*self.img_size)
        self.num_patches = math.prod(self.grid_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image.

        Raises:
            ValueError: patches do not cover the image.
        """
        sides = list(zip((height, width), self.patch_size, self.stride, strict=True))
        if any(side < size for side, size, _ in sides):
            raise ValueError(
                f"PatchEmbedding: an image of {height} x {width} pixels is smaller than a patch of "
                f"{self.patch_size[0]} x {self.patch_size[1]}; take larger images or a smaller patch_size"
            )
        left = [(side - size) % step for side, size, step in sides]
        if any(left):
            raise ValueError(
                f"PatchEmbedding: an image of {height} x {width} pixels is not divisible into patches of "
                f"{self.patch_size[0]} x {self.patch_size[1]} at a stride of {self.stride[0]} x {self.stride[1]}: "
                f"{left[0]} rows and {left[1]} columns of pixels are left over; resize it to {height - left[0]} x "
                f"{width - left[1]}"
            )
        rows, columns = ((side - size) // step + 1 for side, size, step in sides)
        return rows, columns

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W), floating, to (B, L, d_model).

        Raises:
            ValueError: another number of axes or channels, a size other than img_size or not covered by patches.
        """
        if images.dim() != 4 or images.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"PatchEmbedding: images have shape {tuple(images.shape)}, expected (batch, "
                f"in_chans={self.proj.in_channels}, height, width)"
            )
        size = tuple(images.shape[2:])
        if size != self.img_size:
            if self.strict_img_size:
                raise ValueError(
                    f"PatchEmbedding: images of {size[0]} x {size[1]} pixels came, expected {self.img_size[0]} x "
                    f"{self.img_size[1]}; resize them, or say img_size={size} where the model is made"
                )
            self.grid_of(*size)
        return self.proj(images).flatten(2).transpose(1, 2)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of one number for both, or of two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)
