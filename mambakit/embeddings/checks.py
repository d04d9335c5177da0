"""What every embedding of ids asks of them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(ids: Tensor, embedding: str, name: str = "ids") -> None:
    """Raise TypeError unless they are int64 or int32; ``embedding`` is the class that was given them, as ``name``."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{embedding}: {name} have dtype {ids.dtype}, expected int64 token ids")


def check_places(ids: Tensor, most: int, embedding: str, mend: str = "give it a larger length") -> None:
    """Raise ValueError where sequences of ids (B, L) are longer than ``most``, the places of ``embedding``."""
    if ids.shape[1] > most:
        raise ValueError(f"{embedding}: sequences of {ids.shape[1]}, expected at most {most} places; {mend}")
