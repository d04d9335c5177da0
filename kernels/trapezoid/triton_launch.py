"""Launches the kernels around Mamba-3's recurrence: tiles, grids, and the sums of partial gradients."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.kernels.launch import launch
from mambakit.kernels.trapezoid.triton_kernels import keys_backward, keys_forward
from mambakit.kernels.trapezoid.triton_output import output_backward, output_forward

HEADS = 4  # of one group for which a program of keys_forward reads B and C once
TILE = 2048  # numbers of a program of the output's kernels


def keys(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angles: Tensor,
    dt: Tensor,
    carry: Tensor,
    runs: Tensor | None,
    dtype: torch.dtype,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.trapezoid.fused._keys`."""
    batch, length, heads = dt.shape
    groups, d_state = B.shape[2:]
    q = torch.empty(batch, length, heads, d_state, dtype=dtype, device=B.device)
    k, dots = torch.empty_like(q), torch.empty_like(dt)
    together = min(HEADS, heads // groups)
    launch(
        keys_forward,
        (triton.cdiv(length, steps), batch, groups * triton.cdiv(heads // groups, together)),
        *(B, C, B_bias, C_bias, angles, dt, carry, runs, q, k, dots),
        *(length, heads, groups, d_state, angles.shape[2], *B.stride()[:3], *C.stride()[:3], *angles.stride()[:2]),
        T=steps,
        HALF=_half(d_state),
        HEADS=together,
        num_warps=4,
    )
    return q, k, dots


def keys_gradients(
    dq: Tensor,
    dk: Tensor,
    ddots: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angles: Tensor,
    dt: Tensor,
    carry: Tensor,
    runs: Tensor | None,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.trapezoid.fused._keys_backward`."""
    batch, length, heads = dt.shape
    groups, d_state = B.shape[2:]
    chunks = triton.cdiv(length, steps)
    dB, dC = (torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in (B, C))
    dangles = dt.new_empty(groups, *angles.shape)
    ddt, dcarry = torch.empty_like(dt), torch.empty_like(carry)
    partial = (None if bias is None else dt.new_empty(batch, chunks, heads, d_state) for bias in (B_bias, C_bias))
    dB_bias, dC_bias = partial
    launch(
        keys_backward,
        (chunks, batch, groups),
        *(dq, dk, ddots, B, C, B_bias, C_bias, angles, dt, carry, runs),
        *(dB, dC, dB_bias, dC_bias, dangles, ddt, dcarry),
        *(length, heads, groups, d_state, angles.shape[2], *B.stride()[:3], *C.stride()[:3], *angles.stride()[:2]),
        T=steps,
        HALF=_half(d_state),
        num_warps=8,
    )
    dB_bias, dC_bias = (None if sums is None else sums.sum((0, 1)) for sums in (dB_bias, dC_bias))
    return dB, dC, dB_bias, dC_bias, dangles[0] if groups == 1 else dangles.sum(0), ddt, dcarry


def output(
    read: Tensor,
    first: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    D: Tensor | None,
    dA: Tensor,
    gamma: Tensor,
    dots: Tensor,
    runs: Tensor | None,
) -> Tensor:
    """As :func:`mambakit.kernels.trapezoid.fused._output`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, numbers, tile = _rows(x, z)
    launch(output_forward, grid, read, first, x, z, D, dA, gamma, dots, runs, out, *numbers, **tile, num_warps=4)
    return out


def output_gradients(
    dout: Tensor,
    read: Tensor,
    first: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    D: Tensor | None,
    dA: Tensor,
    gamma: Tensor,
    dots: Tensor,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor]:
    """As :func:`mambakit.kernels.trapezoid.fused._output_backward`."""
    dx, dread = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dread[:, -1] = 0
    dfirst = None if first is None else torch.empty_like(first)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    ddA, down = torch.empty_like(dA), torch.empty_like(dA)
    grid, numbers, tile = _rows(x, z)
    arguments = (dout, read, first, x, z, D, dA, gamma, dots, runs, dread, dfirst, dx, dz, ddA, down)
    launch(output_backward, grid, *arguments, *numbers, **tile, num_warps=4)
    return dread, dfirst, dx, dz, ddA, down


def _rows(x: Tensor, z: Tensor | None) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Grid, numbers and tile of the output's kernels, a row for each step and head."""
    batch, length, heads, channels = x.shape
    padded = max(16, triton.next_power_of_2(channels))
    rows, total = max(1, TILE // padded), batch * length * heads
    numbers = (length, heads, channels, total, *x.stride()[:3], *(x if z is None else z).stride()[:3])
    return (triton.cdiv(total, rows),), numbers, {"ROWS": rows, "PP": padded}


def _half(d_state: int) -> int:
    """Pairs a row is padded to: products of matrices need 16."""
    return max(16, triton.next_power_of_2(d_state) // 2)
