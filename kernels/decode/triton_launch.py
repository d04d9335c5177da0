"""Launches the decoding kernels: tiles, and whether a kernel may start before the one ahead of it has ended."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.kernels.decode.triton_kernels import (
    argmax_kernel,
    embed_kernel,
    head_step_kernel,
    linear_step_kernel,
    state_step_kernel,
)
from mambakit.kernels.scan.triton_common import device_guard


def embed(ids: Tensor, table: Tensor, out: Tensor) -> None:
    """out (B, K) = table (V, K) at ids (B,), in out's dtype; all contiguous.

    It never starts early, so a step that begins with it comes after the whole of the step before.
    """
    columns = table.shape[1]
    with device_guard(out):
        embed_kernel[(len(ids),)](ids, table, out, columns, BK=triton.next_power_of_2(columns), num_warps=4)


def argmax(x: Tensor, out: Tensor) -> None:
    """out (B,) integers = the first index of the largest of each row of x (B, V)."""
    rows, columns = x.shape
    block = min(16384, triton.next_power_of_2(columns))
    with device_guard(x):
        argmax_kernel[(rows,)](x, out, x.stride(0), columns, BV=block, **_early(x), num_warps=16)


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    add: bool = False,
    conv: tuple[Tensor, Tensor, Tensor | None] | None = None,
    conv_first: int = 0,
) -> None:
    """out (B, R) = norm(x) weightᵀ + bias for few rows, rounded to weight's dtype; rows of x and out any way apart.

    Args:
        x: (B, K), B small (each B is compiled for itself), K at most ``mambakit.kernels.decode.MAX_COLUMNS``.
        weight: (R, K) contiguous.
        bias: (R,) or None.
        out: (B, R), written; with ``add``, added to.
        norm_weight: (K,) gain of the root-mean-square norm, or None for x as it is.
        eps: of the norm.
        conv: (state (B, D, W-1), weight (D, W), bias (D,) or None) of a causal convolution with SiLU that D outputs
            pass; its state moves on. All contiguous.
        conv_first: the first of those outputs.
    """
    (batch, columns), rows = x.shape, weight.shape[0]
    conv_state, conv_weight, conv_bias = conv if conv is not None else (x, x, None)
    padded = triton.next_power_of_2(columns)
    tile, warps, programs = _tile(rows, padded, x.device)
    with device_guard(x):
        linear_step_kernel[(min(programs, triton.cdiv(rows, tile)),)](
            x, norm_weight, weight, bias, out, conv_state, conv_weight, conv_bias,
            x.stride(0), out.stride(0), columns, rows,
            conv_first, conv_state.shape[1] if conv is not None else 0, eps,
            BATCH=batch, NORM=norm_weight is not None, ADD=add, W=0 if conv is None else conv_weight.shape[1],
            BR=tile, BK=padded, **_early(x), num_warps=warps,
        )  # fmt: skip


def state_step(
    state: Tensor,
    x: Tensor,
    z: Tensor,
    selected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out: Tensor,
) -> None:
    """delta's projection, the selective state's step and the gate: see :func:`state_step_kernel`.

    Args:
        state: (B, D, N) contiguous, changed in place.
        x, z: (B, D), channels side by side.
        selected: (B, P + 2N): delta's low-rank form, B, C.
        dt_weight: (D, P) contiguous, rounded to its dtype after the projection.
        dt_bias, D: (D,).
        A_log: (D, N) contiguous.
        out: (B, D) contiguous, written.
    """
    batch, channels, d_state = state.shape
    rank = dt_weight.shape[1]
    BN = triton.next_power_of_2(d_state)
    tile, warps = (16, 4) if batch < 16 else (32, 1)  # few rows: more threads; many: more independent programs
    tile = max(1, min(tile, 2048 // BN))
    with device_guard(x):
        state_step_kernel[(triton.cdiv(channels, tile), batch)](
            state, x, z, selected, dt_weight, dt_bias, A_log, D, out,
            channels, x.stride(0), z.stride(0), selected.stride(0), rank,
            N=d_state, BN=BN, BP=triton.next_power_of_2(rank), BD=tile, **_early(x), num_warps=warps,
        )  # fmt: skip


def head_step(
    state: Tensor,
    xBC: Tensor,
    z: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out: Tensor,
    *,
    groups: int,
    dt_limit: tuple[float, float],
    gate: bool,
) -> None:
    """The step of Mamba-2's state from the raw step sizes on: see :func:`head_step_kernel`.

    Args:
        state: (B, H, P, N) contiguous, changed in place.
        xBC: (B, H P + 2 G N), numbers of a row side by side.
        z: (B, H P), likewise.
        dt: (B, H), likewise.
        dt_bias, A_log: (H,).
        D: (H,) or (H P,).
        out: (B, H P) contiguous, written.
        groups: G.
        dt_limit: the smallest and largest step.
        gate: multiply by SiLU(z).
    """
    batch, heads, channels, d_state = state.shape
    x, B, C = xBC.split([heads * channels, groups * d_state, groups * d_state], dim=1)
    BN = triton.next_power_of_2(d_state)
    # Few rows: four states a thread, so that many threads share the wait for memory; many rows: sixteen.
    tile = max(1, min(triton.next_power_of_2(channels), (512 if batch < 16 else 2048) // BN))
    D_strides = (1, 0) if D.shape[0] == heads else (channels, 1)
    with device_guard(state):
        head_step_kernel[(heads * triton.cdiv(channels, tile), batch)](
            state, x, B, C, z, dt, dt_bias, A_log, D, out,
            heads, channels, heads // groups, xBC.stride(0), z.stride(0), dt.stride(0), *D_strides, *dt_limit,
            N=d_state, BN=BN, BP=tile, GATE=gate, **_early(state), num_warps=4,
        )  # fmt: skip


def _tile(rows: int, padded: int, device: torch.device) -> tuple[int, int, int]:
    """(rows of a tile, warps, programs at most) of a linear map, as they were fastest on an H200.

    Tiles are small enough that three programs of two tiles each share a multiprocessor, so that while one adds up, the
    others' weights arrive; more programs than fit at once would wait for the first to end and then start from nothing.
    """
    if rows > 16_384:  # a language model's head
        tile, warps = 16_384 // padded, 4
    elif rows < 512:  # too few rows to fill the device: one a program
        tile, warps = 1, 4
    else:
        tile, warps = 8192 // padded, 8 if padded <= 2048 < rows else 4
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(tile, 16)), warps, 3 * units


def _early(x: Tensor) -> dict[str, bool]:
    """Options of programmatic dependent launch, where the device has it."""
    able = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}
