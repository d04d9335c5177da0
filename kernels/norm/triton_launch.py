"""Launches the norms' Triton kernels: strides, tiles, and the sums of partial gradients.

``-(-a // b)`` is triton.cdiv, which outside a kernel takes as long as a small launch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mambakit.kernels.launch import launch
from mambakit.kernels.norm.triton_kernels import (
    GATE_AFTER_NORM,
    GATE_BEFORE_NORM,
    NO_GATE,
    norm_backward,
    norm_forward,
)

THREAD_CHANNELS = 16  # at least, of one row or several
PROGRAMS = 512  # of the backward, each of which leaves one row of partial sums


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """As :func:`mambakit.kernels.norm.chunked.add_norm`."""
    summed = None if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if centered else None
    y, rstd = _forward(x, residual, None, weight, bias, summed, mean, eps, NO_GATE.value, x.shape[1])
    return y, summed, mean, rstd


def add_norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As :func:`mambakit.kernels.norm.chunked.add_norm_backward`."""
    dx = None if dtype == s.dtype else torch.empty(s.shape, dtype=dtype, device=s.device)
    gate, channels = NO_GATE.value, s.shape[1]
    ds, dweight, dbias = _backward(dy, dsummed, s, None, weight, bias, mean, rstd, dx, gate, channels)
    return ds, ds if dx is None else dx, dweight, dbias


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool, group_size: int
) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.norm.chunked.gated_rms_norm`."""
    return _forward(x, None, z, weight, None, None, None, eps, _gate(norm_before_gate), group_size)


def gated_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    norm_before_gate: bool,
    group_size: int,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.norm.chunked.gated_rms_norm_backward`."""
    gate = _gate(norm_before_gate)
    if dz is None:
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dx, dweight, _ = _backward(dy, None, x, z, weight, None, None, rstd, None, gate, group_size, dz, y)
    return dx, dz, dweight


def _gate(norm_before_gate: bool) -> int:
    return (GATE_AFTER_NORM if norm_before_gate else GATE_BEFORE_NORM).value


def _forward(
    x: Tensor,
    residual: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    summed: Tensor | None,
    mean: Tensor | None,
    eps: float,
    gate: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """y, rstd; summed and mean are written where given."""
    rows, channels = x.shape
    groups = channels // group_size
    x = _dense(x)
    residual = None if residual is None else _dense(residual)
    z = None if z is None else _dense(z)
    y = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    tile = tiling(group_size)
    launch(
        norm_forward,
        (-(-rows // tile.rows), groups),
        x,
        residual,
        z,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        summed,
        mean,
        rstd,
        rows,
        group_size,
        eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if z is None else z.stride(0),
        GATE=gate,
        BR=tile.rows,
        NT=tile.tiles,
        TK=tile.channels,
        num_warps=tile.warps,
    )
    return y, rstd


def _backward(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor | None,
    gate: int,
    group_size: int,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of s (or of x under a gate), weight and bias; that of s is written into dx too where given, that of
    z into dz, and the forward's y into y.
    """
    rows, channels = s.shape
    groups = channels // group_size
    dy, s = _dense(dy), _dense(s)
    dsummed = None if dsummed is None else _dense(dsummed)
    z = None if z is None else _dense(z)
    ds = torch.empty(rows, channels, dtype=s.dtype, device=s.device)
    tile = tiling(group_size) if z is None else thinner(tiling(group_size))
    programs = min(-(-PROGRAMS // groups), -(-rows // tile.rows))
    dweight = torch.empty(programs, channels, dtype=torch.float32, device=s.device)
    dbias = None if bias is None else torch.empty_like(dweight)
    launch(
        norm_backward,
        (programs, groups),
        dy,
        dsummed,
        s,
        z,
        weight.contiguous(),
        mean,
        rstd,
        ds,
        dx,
        dz,
        y,
        dweight,
        dbias,
        rows,
        group_size,
        dy.stride(0),
        0 if dsummed is None else dsummed.stride(0),
        s.stride(0),
        0 if z is None else z.stride(0),
        0 if dz is None else dz.stride(0),
        GATE=gate,
        BR=tile.rows,
        NT=tile.tiles,
        TK=tile.channels,
        num_warps=tile.warps,
    )
    summed_bias = None if bias is None or dbias is None else dbias.sum(0).to(bias.dtype)
    return ds, dweight.sum(0).to(weight.dtype), summed_bias


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


class Tiling(NamedTuple):
    """A program's registers: ``rows`` of ``tiles`` tiles of ``channels``, in ``warps`` warps."""

    rows: int
    tiles: int
    channels: int
    warps: int


def thinner(tile: Tiling) -> Tiling:
    """The same rows in twice as many threads, where a row has two tiles: under a gate the backward holds three tensors
    read and three to write, and with 24 channels a thread all 255 registers (0.229 ms beside 0.209 for 32,768 rows of
    1,536 channels on an H200).
    """
    if tile.tiles < 2:
        return tile
    return Tiling(tile.rows, triton.cdiv(tile.tiles, 2), 2 * tile.channels, 2 * tile.warps)


@lru_cache(maxsize=256)
def tiling(channels: int) -> Tiling:
    """Four channels a thread in a tile, as many tiles as the row needs and eight at most: 32 channels a thread."""
    in_a_row = max(1, triton.next_power_of_2(channels) // 1024)  # warps
    warps = max(4, in_a_row)
    if channels < 128:
        tile = max(16, triton.next_power_of_2(channels))
    else:  # the width that leaves the fewest threads idle, the widest of equals
        tile = min((128 * in_a_row, 64 * in_a_row), key=lambda width: triton.cdiv(channels, width) * width)
    count = triton.cdiv(channels, tile)
    rows = max(warps // in_a_row, THREAD_CHANNELS * 32 * warps // (count * tile))
    return Tiling(2 ** (rows.bit_length() - 1), count, tile, warps)
