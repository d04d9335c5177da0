"""Launches the Gluon scan kernels: which calls they take, how time and channels are cut, buffers and strides."""

# Gluon's and Triton's launch syntax is untyped.
# mypy: disable-error-code="attr-defined, no-untyped-call, index"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mambakit.kernels.scan.gluon_common import STATES_PER_THREAD, Cut, cut_channels
from mambakit.kernels.scan.gluon_forward import scan_forward_kernel, segment_states_kernel
from mambakit.kernels.scan.triton_common import device_guard, row_strides, unit_stride, vector_strides

CHUNK = 64  # steps between two stored states


class Config(NamedTuple):
    """Steps a tile, channels a thread, warps a program; see gluon_common.py."""

    steps: int
    per_thread: int
    warps: int


# Four warps for each of a multiprocessor's four schedulers hide the latency of loads and exponentials.
WARPS_WANTED = 16
FORWARD = Config(steps=8, per_thread=2, warps=1)
STATES = Config(steps=8, per_thread=2, warps=1)


def covers(A: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether these kernels take the call: time-varying B and C, N a power of two from 4 to 128."""
    d_state = A.shape[1]
    return B.dim() > 2 and C.dim() > 2 and 4 <= d_state <= 128 and d_state & (d_state - 1) == 0


def segments_of(length: int, warps: int, multiprocessors: int) -> tuple[int, int]:
    """(segments, steps a segment): one where ``warps`` alone give every scheduler one, else as many as fill the chip.

    A segment costs a second walk over its steps, so that cutting a sequence pays only where the chip idles.
    """
    chunks = triton.cdiv(length, CHUNK)
    if warps >= 4 * multiprocessors:
        return 1, chunks * CHUNK
    wanted = min(chunks, triton.cdiv(WARPS_WANTED * multiprocessors, warps))
    size = triton.cdiv(chunks, wanted) * CHUNK
    return triton.cdiv(length, size), size


_multiprocessors: dict[int, int] = {}


def multiprocessors(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _multiprocessors:
        _multiprocessors[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _multiprocessors[index]


def segment_states(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    V: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    direction: int,
    segments: int,
    segment_length: int,
    cut: Cut,
    V_share: int,
    backward: bool,
    config: Config = STATES,
) -> tuple[Tensor, Tensor]:
    """products and ends (B, segments, D, N) float32 of every segment; see ``segment_states_kernel``."""
    batch, length, channels = x.shape
    d_state = A.shape[1]
    products, ends = torch.empty((2, batch, segments, channels, d_state), dtype=torch.float32, device=x.device)
    segment_states_kernel[(batch * cut.blocks * segments,)](
        x, delta, A, V, z, delta_bias, seq_idx, products, ends,
        length, channels, channels // cut.groups, cut.blocks_per_group, cut.blocks, cut.groups, V_share, segments,
        segment_length, *row_strides(x), *row_strides(delta), *row_strides(z), row_strides(seq_idx)[0],
        *vector_strides(V),
        N=d_state, T=config.steps, CPT=config.per_thread, NW=config.warps,
        SOFTPLUS=delta_softplus, DIRECTION=direction, BACKWARD=backward, num_warps=config.warps,
    )  # fmt: skip
    return products, ends


def scan_forward(
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
    delta_softplus: bool,
    direction: int,
    config: Config = FORWARD,
    maxnreg: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.scan.triton_forward.scan_forward`."""
    u, delta, z, B, C = (unit_stride(tensor) for tensor in (u, delta, z, B, C))
    A, initial_state = dense_float(A), dense_float(initial_state)
    D, delta_bias, seq_idx = unit_stride(D), unit_stride(delta_bias), unit_stride(seq_idx)
    batch, length, channels = u.shape
    d_state = A.shape[1]
    cut = cut_channels(channels, d_state, B, C, config.per_thread, config.warps)
    segments, segment_length = segments_of(
        length, batch * cut.blocks * config.warps, multiprocessors(u.device)
    )
    out = torch.empty((batch, length, channels), dtype=u.dtype, device=u.device)
    final = torch.empty((batch, channels, d_state), dtype=torch.float32, device=u.device)
    checkpoints = torch.empty(
        (batch, triton.cdiv(length, CHUNK), channels * d_state), dtype=torch.float32, device=u.device
    )
    B_share, C_share = cut.groups // cut.B_groups, cut.groups // cut.C_groups
    with device_guard(u):
        products = ends = None
        if segments > 1:
            products, ends = segment_states(
                u, delta, A, B, None, delta_bias, seq_idx, delta_softplus, direction, segments, segment_length,
                cut, B_share, backward=False, config=config,
            )  # fmt: skip
        scan_forward_kernel[(batch * cut.blocks * segments,)](
            u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, products, ends, out, final, checkpoints,
            length, channels, channels // cut.groups, cut.blocks_per_group, cut.blocks, cut.groups,
            B_share, C_share, segments, segment_length,
            *row_strides(u), *row_strides(delta), *row_strides(z), row_strides(seq_idx)[0],
            *vector_strides(B), *vector_strides(C),
            N=d_state, T=config.steps, CPT=config.per_thread, NW=config.warps, CHUNK=CHUNK,
            SOFTPLUS=delta_softplus, DIRECTION=direction, num_warps=config.warps, maxnreg=maxnreg,
        )  # fmt: skip
    return out, final, checkpoints


def dense_float(tensor: Tensor | None) -> Any:
    """A contiguous float32 copy where the tensor is not that already."""
    return tensor if tensor is None else tensor.float().contiguous()
