"""Triton kernels of the sum of both directions and its gate; ``gate.py`` says what they compute.

A program takes BT tokens times BD neighbouring channels: every number is read once and written once, eight or sixteen
bytes a thread at a time. Row offsets are int64. Letters: D channels of one direction, T tokens (batch times length).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.launch import launch

ELEMENTS, WARPS = 2048, 4


@triton.jit
def place(tokens, D, BT: tl.constexpr, BD: tl.constexpr):
    """This program's tokens (BT, 1) int64 and channels (1, BD), and which of the tile exist."""
    columns = tl.cdiv(D, BD)
    t = (tl.program_id(0) // columns * BT + tl.arange(0, BT))[:, None]
    d = (tl.program_id(0) % columns * BD + tl.arange(0, BD))[None, :]
    return t.to(tl.int64), d, (t < tokens) & (d < D)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit(do_not_specialize=["tokens"])
def gate_forward(y, z, total, gated, tokens, D, scale, BT: tl.constexpr, BD: tl.constexpr):
    """Rows of y are 2D numbers, those of z lie 2D apart, those of total and gated D."""
    t, d, inside = place(tokens, D, BT, BD)
    wide, narrow = t * (2 * D) + d, t * D + d
    first = tl.load(y + wide, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(y + D + wide, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + wide, mask=inside, other=0.0).to(tl.float32)
    both = first + second
    tl.store(total + narrow, both.to(total.dtype.element_ty), mask=inside)
    tl.store(gated + narrow, (both * (gate * sigmoid(gate) * scale)).to(gated.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def gate_backward(dgated, total, z, dz, dy, gated, tokens, D, scale, BT: tl.constexpr, BD: tl.constexpr):
    """Rows of z, dz and dy lie 2D apart, those of dgated, total and gated D."""
    t, d, inside = place(tokens, D, BT, BD)
    wide, narrow = t * (2 * D) + d, t * D + d
    gradient = tl.load(dgated + narrow, mask=inside, other=0.0).to(tl.float32) * scale
    both = tl.load(total + narrow, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + wide, mask=inside, other=0.0).to(tl.float32)
    opening = sigmoid(gate)
    slope = opening * (1.0 + gate * (1.0 - opening))
    through = (gradient * (gate * opening)).to(dy.dtype.element_ty)
    tl.store(dz + wide, (gradient * both * slope).to(dz.dtype.element_ty), mask=inside)
    tl.store(dy + wide, through, mask=inside)
    tl.store(dy + D + wide, through, mask=inside)
    tl.store(gated + narrow, (both * (gate * opening * scale)).to(gated.dtype.element_ty), mask=inside)


def forward(y: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.inner.gate.forward`, of contiguous y and of z the second half of a contiguous one."""
    total, gated = torch.empty_like(z, memory_format=torch.contiguous_format), y.new_empty(z.shape)
    _launch(gate_forward, (y, z, total, gated), z.shape, scale)
    return total, gated


def backward(dgated: Tensor, total: Tensor, z: Tensor, scale: float, dz: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.inner.gate.backward`, of contiguous tensors, but z and dz each half of one."""
    gated, dy = torch.empty_like(total), total.new_empty(*total.shape[:-1], 2 * total.shape[-1])
    _launch(gate_backward, (dgated, total, z, dz, dy, gated), z.shape, scale)
    return gated, dy


def _launch(kernel: Any, tensors: tuple[Tensor, ...], shape: tuple[int, ...], scale: float) -> None:
    batch, length, channels = shape
    programs, rows, width = _tiles(batch * length, channels)
    launch(kernel, (programs,), *tensors, batch * length, channels, scale, BT=rows, BD=width, num_warps=WARPS)


@lru_cache(maxsize=1024)
def _tiles(tokens: int, channels: int) -> tuple[int, int, int]:
    """How many programs, and the tokens and channels of each."""
    if channels < 64:
        width = max(16, triton.next_power_of_2(channels))
    else:
        width = min((256, 128, 64), key=lambda size: triton.cdiv(channels, size) * size)
    rows = ELEMENTS // width
    return triton.cdiv(tokens, rows) * triton.cdiv(channels, width), rows, width


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    for kernel in (gate_forward, gate_backward):
        types = {"tokens": "i32", "D": "i32", "scale": "fp32", "BT": "constexpr", "BD": "constexpr"}
        yield kernel, {name: types.get(name, "*bf16") for name in kernel.arg_names}, {"BT": 16, "BD": 128}, WARPS
