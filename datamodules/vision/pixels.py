"""Images as sequences of pixels, in the orders and values the field uses.

Letters: B images of H x W pixels and C channels, L = H W.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Order = Literal["sequential", "bit_reversal", "random"]
# The permutation of pMNIST that s4 names as the one of other works: np.random.RandomState(92916).
PERMUTATION_SEED = 92916


def pixel_order(length: int, order: Order, seed: int = PERMUTATION_SEED) -> np.ndarray:
    """The pixel at each place of a sequence, as an index into the rows of the image one after the other.

    Args:
        length: L.
        order:

            - ``sequential``: row by row (sMNIST, sCIFAR);
            - ``bit_reversal``: 0 to 2^m - 1 with their m bits reversed, less those past the end, m the least with
              2^m at least L. This is what s4 calls permuted MNIST;
            - ``random``: ``np.random.RandomState(seed).permutation(length)``, which is the same in every version of
              NumPy: the permuted MNIST of most other work (Le et al., 2015), which differs by seed from one to another.
        seed: of ``random``.

    Returns:
        (L,) int64, each pixel once.

    Raises:
        ValueError: no order of that name.
    """
    if order == "sequential":
        return np.arange(length)
    if order == "bit_reversal":
        bits = max(1, (length - 1).bit_length())
        places = np.arange(1 << bits)
        turned = np.zeros_like(places)
        for bit in range(bits):
            turned |= (places >> bit & 1) << bits - 1 - bit
        return turned[turned < length]
    if order == "random":
        return np.random.RandomState(seed).permutation(length)
    raise ValueError(f"pixel_order: {order!r}, expected sequential, bit_reversal or random")


def as_sequence(images: Tensor, order: Tensor) -> Tensor:
    """Images (B, C, H, W) as sequences (B, L, C); place t holds pixel ``order[t]``."""
    return images.flatten(2)[:, :, order].transpose(1, 2).contiguous()


def as_tokens(images: Tensor, order: Tensor) -> Tensor:
    """8-bit images (B, C, H, W) as tokens 0 to 255, (B, L C) int64: red, green and blue of a pixel in turn."""
    return as_sequence(images, order).flatten(1).to(torch.int64)
