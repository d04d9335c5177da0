"""Launches the norms' Triton kernels: strides, tiles, and the sums of partial gradients."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.kernels.norm.triton_kernels import (
    GATE_AFTER_NORM,
    GATE_BEFORE_NORM,
    NO_GATE,
    norm_backward,
    norm_forward,
)

PROGRAMS = 256  # of the backward, each of which leaves one row of partial sums


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`mambakit.kernels.norm.chunked.add_norm_backward`."""
    ds, _, dweight, dbias = _backward(dy, dsummed, s, None, weight, bias, mean, rstd, NO_GATE.value, s.shape[1])
    return ds, dweight, dbias


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool, group_size: int
) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.norm.chunked.gated_rms_norm`."""
    return _forward(x, None, z, weight, None, None, None, eps, _gate(norm_before_gate), group_size)


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, norm_before_gate: bool, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.norm.chunked.gated_rms_norm_backward`."""
    gate = _gate(norm_before_gate)
    dx, dz, dweight, _ = _backward(dy, None, x, z, weight, None, None, rstd, gate, group_size)
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
    residual = x if residual is None else _dense(residual)
    gates = x if z is None else _dense(z)
    y = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    tile, tile_k, warps = _tile(group_size, 2048)
    norm_forward[(triton.cdiv(rows, tile), groups)](
        x,
        residual,
        gates,
        weight.contiguous(),
        weight if bias is None else bias.contiguous(),
        y,
        y if summed is None else summed,
        rstd if mean is None else mean,
        rstd,
        rows,
        group_size,
        eps,
        x.stride(0),
        residual.stride(0),
        gates.stride(0),
        CENTERED=mean is not None,
        HAS_RESIDUAL=summed is not None,
        HAS_BIAS=bias is not None,
        GATE=gate,
        BR=tile,
        BK=tile_k,
        num_warps=warps,
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
    gate: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of s (or of x under a gate), z (meaningless without), weight and bias."""
    rows, channels = s.shape
    groups = channels // group_size
    dy, s = _dense(dy), _dense(s)
    dsums = dy if dsummed is None else _dense(dsummed)
    gates = s if z is None else _dense(z)
    dx = torch.empty(rows, channels, dtype=s.dtype, device=s.device)
    dz = dx if z is None else torch.empty(rows, channels, dtype=z.dtype, device=s.device)
    tile, tile_k, warps = _tile(group_size, 1024)
    programs = min(PROGRAMS, triton.cdiv(rows, tile))
    dweight = torch.empty(programs, channels, dtype=torch.float32, device=s.device)
    dbias = dweight if bias is None else torch.empty_like(dweight)
    norm_backward[(programs, groups)](
        dy,
        dsums,
        s,
        gates,
        weight.contiguous(),
        rstd if mean is None else mean,
        rstd,
        dx,
        dz,
        dweight,
        dbias,
        rows,
        group_size,
        dy.stride(0),
        dsums.stride(0),
        s.stride(0),
        gates.stride(0),
        CENTERED=mean is not None,
        HAS_DSUMMED=dsummed is not None,
        HAS_BIAS=bias is not None,
        GATE=gate,
        BR=tile,
        BK=tile_k,
        num_warps=warps,
    )
    return dx, dz, dweight.sum(0).to(weight.dtype), None if bias is None else dbias.sum(0).to(bias.dtype)


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tile(channels: int, elements: int) -> tuple[int, int, int]:
    """(rows, padded channels, warps) of a program that holds at least ``elements``."""
    padded = triton.next_power_of_2(channels)
    return max(1, elements // padded), padded, min(16, max(4, padded // 512))
