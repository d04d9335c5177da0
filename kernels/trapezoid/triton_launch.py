"""Launches the kernels around Mamba-3's recurrence: tiles, grids, and the sums of partial gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.duality.triton_common import ceil_div
from mambakit.kernels.launch import launch
from mambakit.kernels.trapezoid.triton_angles import angles_backward, angles_forward
from mambakit.kernels.trapezoid.triton_kernels import keys_backward, keys_forward
from mambakit.kernels.trapezoid.triton_output import output_backward, output_forward

ANGLE_STEPS = 32  # of a chunk whose angles one program adds up
STEPS, GRADIENT_STEPS = 16, 32  # of which a program makes keys, and goes back from them
HEADS = 4  # of one group for which a program of keys_forward reads B and C once
TILE = 2048  # numbers of a program of the output's kernels


def angles(angles: Tensor, dt: Tensor, start: Tensor | None, runs: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.trapezoid.fused._angles_implementation`."""
    S = angles.shape[2]
    chunks, grid, numbers, tile = _chunks(angles, dt)
    totals, out = dt.new_empty(dt.shape[0], chunks, dt.shape[2], S), dt.new_empty(*dt.shape, S)
    launch(angles_forward, grid, angles, dt, None, runs, totals, *numbers, **tile, num_warps=4)
    sums = torch.remainder(_joined(totals, start, None if runs is None else _resets(runs, chunks)), 2 * math.pi)
    carry = sums[:, :-1].contiguous()
    launch(angles_forward, grid, angles, dt, carry, runs, out, *numbers, **tile, num_warps=4)
    return out, sums[:, -1].clone()


def angles_gradients(
    dsums: Tensor, dend: Tensor, angles: Tensor, dt: Tensor, runs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.trapezoid.fused._angles_backward_implementation`."""
    chunks, grid, numbers, tile = _chunks(angles, dt)
    back, ddt = dt.new_empty(dt.shape[0], chunks, dt.shape[2], angles.shape[2]), torch.empty_like(dt)
    dangles = dt.new_empty(grid[2], *angles.shape)
    launch(angles_backward, grid, dsums, angles, dt, None, runs, back, None, None, *numbers, **tile, num_warps=4)
    resets = None if runs is None else _resets(runs, chunks).flip(1)
    sums = _joined(back.flip(1), dend, resets).flip(1)
    carry = sums[:, 1:].contiguous()
    launch(angles_backward, grid, dsums, angles, dt, carry, runs, None, dangles, ddt, *numbers, **tile, num_warps=4)
    return dangles[0] if grid[2] == 1 else dangles.sum(0), ddt, sums[:, 0].clone()


def _chunks(angles: Tensor, dt: Tensor) -> tuple[int, tuple[int, int, int], tuple[int, ...], dict[str, int]]:
    """How many chunks; grid, numbers and tile of the angles' kernels."""
    batch, length, heads = dt.shape
    together = min(16, power_of_2(heads))
    chunks = ceil_div(length, ANGLE_STEPS)
    tile = {"T": ANGLE_STEPS, "HB": together, "SP": max(16, power_of_2(angles.shape[2]))}
    numbers = (length, heads, angles.shape[2], *angles.stride()[:2])
    return chunks, (chunks, batch, ceil_div(heads, together)), numbers, tile


def _resets(runs: Tensor, chunks: int) -> Tensor:
    """(B, chunks): whether a sequence begins in a chunk."""
    ends = runs[:, ANGLE_STEPS - 1 :: ANGLE_STEPS]
    ends = ends if ends.shape[1] == chunks else torch.cat([ends, runs[:, -1:]], dim=1)
    return ends != torch.cat([runs[:, :1], ends[:, :-1]], dim=1)


def _joined(totals: Tensor, start: Tensor | None, resets: Tensor | None) -> Tensor:
    """(B, chunks + 1, H, S): ``start``, or 0, and the chunks' totals so far, added up in float64.

    What comes before a chunk in which a sequence begins does not count behind it.
    """
    sums = F.pad(totals, (0, 0, 0, 0, 1, 0)).cumsum(1, dtype=torch.float64)
    joined = sums if start is None else start.unsqueeze(1) + sums
    if resets is not None:
        chunks = torch.arange(resets.shape[1], device=totals.device)
        last = F.pad(torch.where(resets, chunks, -1).cummax(1).values, (1, 0), value=-1)[..., None, None]
        joined = torch.where(last < 0, joined, sums - sums.gather(1, last.clamp(min=0).expand_as(sums)))
    return joined.to(totals.dtype)


def keys(
    B: Tensor, C: Tensor, B_bias: Tensor | None, C_bias: Tensor | None, angle: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.trapezoid.fused._keys_implementation`."""
    batch, length, heads, angles = angle.shape
    groups, d_state = B.shape[2:]
    q = torch.empty(batch, length, heads, d_state, dtype=dtype, device=B.device)
    k, dots = torch.empty_like(q), angle.new_empty(batch, length, heads)
    together = min(HEADS, heads // groups)
    launch(
        keys_forward,
        (ceil_div(length, STEPS), batch, groups * ceil_div(heads // groups, together)),
        *(B, C, B_bias, C_bias, angle, q, k, dots),
        *(length, heads, groups, d_state, angles, *B.stride()[:3], *C.stride()[:3]),
        T=STEPS,
        HALF=_half(d_state),
        HEADS=together,
        num_warps=8,
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
    angle: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.trapezoid.fused._keys_backward_implementation`."""
    batch, length, heads, angles = angle.shape
    groups, d_state = B.shape[2:]
    chunks = ceil_div(length, GRADIENT_STEPS)
    dB, dC = (torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in (B, C))
    dangle, dbias = torch.empty_like(angle), angle.new_empty(batch, chunks, heads, 2, d_state)
    launch(
        keys_backward,
        (chunks, batch, groups),
        *(dq, dk, ddots, B, C, B_bias, C_bias, angle, dB, dC, dbias, dangle),
        *(length, heads, groups, d_state, angles, *B.stride()[:3], *C.stride()[:3]),
        T=GRADIENT_STEPS,
        HALF=_half(d_state),
        num_warps=8,
    )
    return dB, dC, dbias.sum((0, 1)), dangle


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
    """As :func:`mambakit.kernels.trapezoid.fused._output_implementation`."""
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
    """As :func:`mambakit.kernels.trapezoid.fused._output_backward_implementation`."""
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
    padded = max(16, power_of_2(channels))
    rows, total = max(1, TILE // padded), batch * length * heads
    numbers = (length, heads, channels, total, *x.stride()[:3], *(x if z is None else z).stride()[:3])
    return (ceil_div(total, rows),), numbers, {"ROWS": rows, "PP": padded}


def power_of_2(size: int) -> int:
    """The next one, as triton.next_power_of_2, which outside a kernel takes as long as a small launch."""
    return 1 << (size - 1).bit_length()


def _half(d_state: int) -> int:
    """Pairs a row is padded to."""
    return max(1, power_of_2(d_state) // 2)
