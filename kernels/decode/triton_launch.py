"""Launches the decoding kernels: tiles, and whether a kernel may start before the one ahead of it has ended."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.kernels.decode.triton_kernels import linear_step_kernel, state_step_kernel
from mambakit.kernels.scan.triton_common import device_guard

MAX_COLUMNS = 8192  # inputs of a linear map, which a program holds whole


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
) -> None:
    """out (B, R) = norm(x) weightᵀ + bias for few rows, rounded to weight's dtype; all but x contiguous.

    Args:
        x: (B, K), K at most ``MAX_COLUMNS``, rows any distance apart.
        weight: (R, K).
        bias: (R,) or None.
        out: (B, R), written; with ``add``, added to.
        norm_weight: (K,) gain of the root-mean-square norm, or None for x as it is.
        eps: of the norm.
        conv: (state (B, D, W-1), weight (D, W), bias (D,) or None) of a causal convolution with SiLU that the first D
            outputs pass; its state moves on.
    """
    (batch, columns), rows = x.shape, weight.shape[0]
    conv_state, conv_weight, conv_bias = conv if conv is not None else (x, x, None)
    padded = triton.next_power_of_2(columns)
    tile, warps = _tile(rows, padded)
    with device_guard(x):
        linear_step_kernel[(triton.cdiv(rows, tile),)](
            x, norm_weight, weight, bias, out, conv_state, conv_weight, conv_bias,
            batch, x.stride(0), columns, rows, conv_state.shape[1], eps,
            NORM=norm_weight is not None, ADD=add, W=0 if conv is None else conv_weight.shape[1],
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
    tile = 16 if batch < 16 else 64  # few rows: more programs; many: a row's projection is read by fewer
    tile = max(1, min(tile, 2048 // BN))
    with device_guard(x):
        state_step_kernel[(triton.cdiv(channels, tile), batch)](
            state, x, z, selected, dt_weight, dt_bias, A_log, D, out,
            channels, x.stride(0), z.stride(0), selected.stride(0), rank,
            N=d_state, BN=BN, BP=triton.next_power_of_2(rank), BD=tile, **_early(x), num_warps=4,
        )  # fmt: skip


def _tile(rows: int, padded: int) -> tuple[int, int]:
    """(rows, warps) of a program: enough programs for every multiprocessor first, then long runs of loads."""
    return 4 if rows < 2048 or padded > 2048 else 8, 8 if padded > 4096 else 4


def _early(x: Tensor) -> dict[str, bool]:
    """Options of programmatic dependent launch, where the device has it."""
    able = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}
