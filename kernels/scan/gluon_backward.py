"""Launches the Gluon backward scan: how time and channels are cut, its buffers, and the sums of partial gradients."""

# Gluon's and Triton's launch syntax is untyped.
# mypy: disable-error-code="attr-defined, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.kernels.launch import launch
from mambakit.kernels.scan.gluon_backward_kernel import scan_backward_kernel
from mambakit.kernels.scan.gluon_launch import cut, dense_float, multiprocessors, segment_states
from mambakit.kernels.scan.reference import HALF
from mambakit.kernels.scan.triton_common import (
    CHUNK,
    device_guard,
    group_count,
    row_strides,
    unit_stride,
    vector_strides,
)
from mambakit.kernels.scan.triton_sums import add_partials


class Config(NamedTuple):
    """Steps a part, channels and states a thread, warps a program; see gluon_backward_kernel.py.

    channels * states * steps is what fills a thread's registers, and at most four lanes share a channel.
    """

    steps: int
    channels: int
    states: int
    warps: int


# By state size. At 16 states the fastest on an H200 for every shape of docs/kernels.md: two programs share a
# multiprocessor, so that one computes while the other waits at a barrier.
CONFIGS = {
    4: Config(steps=8, channels=1, states=4, warps=4),
    8: Config(steps=8, channels=2, states=4, warps=4),
    16: Config(steps=8, channels=2, states=4, warps=4),
    32: Config(steps=8, channels=1, states=8, warps=8),
    64: Config(steps=4, channels=1, states=16, warps=2),
    128: Config(steps=2, channels=1, states=32, warps=1),
}
# What fills a multiprocessor: 255 registers a thread leave room for eight warps.
WARPS_WANTED = 8


def scan_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    direction: int,
    recompute_out: bool = False,
    *,
    du: Tensor | None = None,
    dz: Tensor | None = None,
    segments: int | None = None,
) -> tuple[Tensor | None, ...]:
    """As :func:`mambakit.kernels.scan.triton_backward.scan_backward`.

    Between two kernels, the parts of dB and dC that each tile of channels leaves lie in bfloat16 where B and C are both
    bfloat16, else in float32.

    Args:
        du, dz: (B, L, D) tensors to write into, of unit stride along D; made here if None.
        segments: of time, at most, computed side by side; chosen by the shape if None.
    """
    batch, length, channels = u.shape
    d_state = A.shape[1]
    config = CONFIGS[d_state]
    dout, u, delta, z, B, C = (unit_stride(tensor) for tensor in (dout, u, delta, z, B, C))
    A32, dfinal_state = dense_float(A), dense_float(dfinal_state)
    D, delta_bias, seq_idx = unit_stride(D), unit_stride(delta_bias), unit_stride(seq_idx)
    shape = (batch, length, channels, d_state, group_count(B), group_count(C), direction == HALF)
    plan = cut(*shape, multiprocessors(u.device))
    tile = 32 * config.states // d_state * config.channels * config.warps
    blocks_per_group = -(-channels // plan.groups // tile)
    blocks = plan.groups * blocks_per_group
    if segments is None:
        # The state's gradient where a segment ends costs another walk over the sequence: a nearly full chip takes one.
        segments = max(1, WARPS_WANTED * multiprocessors(u.device) // (batch * blocks * config.warps))
    segment_length = -(-length // (CHUNK * segments)) * CHUNK
    segments = -(-length // segment_length)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=u.device)

    with device_guard(u):
        products = ends = None
        if segments > 1:
            products, ends = segment_states(
                dout, delta, A32, C, z, delta_bias, seq_idx, delta_softplus, direction,
                plan._replace(segments=segments, segment_length=segment_length), plan.C_share, True,
            )  # fmt: skip
        # Made while the segments' kernel runs: at batch 1 the GPU would wait for them.
        du = like(u) if du is None else du
        dz = like(z) if dz is None else dz
        ddelta = like(delta)
        out = like(u) if recompute_out else None
        dA_partial = empty(batch * segments, channels, d_state)
        both_bfloat16 = B.dtype == C.dtype == torch.bfloat16
        dBC = empty(blocks, batch, length, 2, d_state, dtype=torch.bfloat16 if both_bfloat16 else torch.float32)
        dD_partial, dbias_partial = (None if t is None else empty(batch * segments, channels) for t in (D, delta_bias))
        dinitial = None if initial_state is None else empty(batch, channels, d_state)
        launch(
            scan_backward_kernel, (batch * blocks * segments,),
            dout, dfinal_state, u, delta, A32, B, C, D, z, delta_bias, seq_idx, checkpoints, products, ends,
            du, ddelta, dz, out, dA_partial, dBC, dD_partial, dbias_partial, dinitial,
            length, channels, channels // plan.groups, blocks_per_group, blocks, plan.groups,
            plan.B_share, plan.C_share, segments, segment_length,
            *row_strides(u), *row_strides(delta), *row_strides(z), *row_strides(dout), *row_strides(du),
            *row_strides(dz), row_strides(seq_idx)[0], *vector_strides(B), *vector_strides(C),
            N=d_state, T=config.steps, CPT=config.channels, SPT=config.states, NW=config.warps, CHUNK=CHUNK,
            SOFTPLUS=delta_softplus, DIRECTION=direction, num_warps=config.warps,
        )  # fmt: skip
        dB, dC, dA, dD, dbias = (like(tensor) for tensor in (B, C, A, D, delta_bias))
        add_partials(dBC, dA_partial, dD_partial, dbias_partial, dB, dC, dA, dD, dbias)
    if dinitial is not None and initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    gradients = du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial
    return (*gradients, out) if recompute_out else gradients


def like(tensor: Tensor | None) -> Any:
    """An empty contiguous tensor of the same shape and dtype; None for None."""
    return None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
