"""Argument checks with one voice: which argument, what came, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


def check_shape(operator: str, name: str, tensor: Tensor, **expected: int | None) -> None:
    """``tensor`` has one axis for each keyword, of that size (None: any size from 1).

    >>> check_shape("selective_scan", "B", B, batch=2, length=8, d_state=None)
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
    sizes = tuple(expected.values())
    if tensor.dim() == len(sizes):
        for got, want in zip(tensor.shape, sizes, strict=True):
            if got == 0 or (want is not None and got != want):
                break
        else:
            return
    wanted = ", ".join(name if size is None else f"{name}={size}" for name, size in expected.items())
    hint = "; every axis needs at least one element" if 0 in tensor.shape else ""
    raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected ({wanted}){hint}")


def check_dtype(operator: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{operator}: {name} has dtype {got}, expected {'one of ' if len(allowed) > 1 else ''}{names}")


def check_device(operator: str, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{operator}: {name} is on {tensor.device}, {like_name} is on {like.device}; move them to one device"
        )


def check_seq_idx(operator: str, seq_idx: Tensor | None, like: Tensor, like_name: str) -> None:
    """``seq_idx`` (batch, length) integers beside ``like`` (batch, length, ...)."""
    if seq_idx is not None:
        check_shape(operator, "seq_idx", seq_idx, batch=like.shape[0], length=like.shape[1])
        check_dtype(operator, "seq_idx", seq_idx, torch.int32, torch.int64)
        check_device(operator, "seq_idx", seq_idx, like, like_name)
