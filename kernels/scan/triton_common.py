"""What the forward and backward scan share: their arithmetic, their tiles, and how a call is cut into programs.

Letters: B batch, L length, D channels, N state size, G groups of channels that share one B_t and C_t.

One program owns a tile of states [BN, BD], BD channels of one batch row, in registers, and walks time. Channels run
along the lanes of a warp, so that with BD = 32 a thread holds every state of its own channel: the sum over states is
thread-local, and a row of u, delta or z is one coalesced access. The strides of two-dimensional tiles are kept
out of Triton's specialisation (``do_not_specialize``) for the same reason: knowing them to be aligned, the compiler
would deal four neighbouring channels to a thread and scatter the states over lanes.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.scan.reference import HALF

# Steps between two stored states: 4 bytes a channel and step at 16 states, as much as one more float32 input.
CHUNK = 64
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), relative error near float32's own; x itself above 20, exactly 0 far below."""
    w = tl.exp2(x * LOG2E)
    # 1 + w drops the low bits of a small w (one part in a thousand at x = -10): its series does not.
    series = w * (1.0 - w * (0.5 - w * (0.3333333333 - w * 0.25)))
    small = tl.where(w < 0.03, series, tl.log2(1.0 + w) * LN2)
    return tl.where(x > 20.0, x, small)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def step_size(raw, bias, valid, SOFTPLUS: tl.constexpr):
    """(delta + bias before softplus, step). A step past the end of the sequence has size 0: it changes no state."""
    raw = raw.to(tl.float32) + bias
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    return raw, tl.where(valid, step, 0.0)


@triton.jit
def load_rows(pointer, stride, d, in_d, t0, length, first, toward, STEPS: tl.constexpr):
    """(BD,) values of each of STEPS scan steps from t0, in the tensor's own dtype; () for an absent tensor.

    Scan step t lies at position ``first + toward * t`` of the sequence.
    """
    rows = ()
    if pointer is not None:
        for i in tl.static_range(STEPS):
            row = pointer + (first + toward * (t0 + i)) * stride + d
            rows += (tl.load(row, mask=in_d & (t0 + i < length), other=0.0),)
    return rows


@triton.jit
def load_vectors(pointer, stride, n, in_n, t0, length, first, toward, STEPS: tl.constexpr, CONSTANT: tl.constexpr):
    """(BN,) values of B or C, one for every channel of the tile, at STEPS scan steps; () for a constant B or C."""
    vectors = ()
    if not CONSTANT:
        for i in tl.static_range(STEPS):
            vector = pointer + (first + toward * (t0 + i)) * stride + n
            vectors += (tl.load(vector, mask=in_n & (t0 + i < length), other=0.0),)
    return vectors


@triton.jit
def load_resets(seq_idx, t0, length, first, toward, STEPS: tl.constexpr):
    """Whether another sequence begins at each scan step (never at the first: there the initial state enters)."""
    resets = ()
    if seq_idx is not None:
        for i in tl.static_range(STEPS):
            here = seq_idx + first + toward * (t0 + i)
            inside = (t0 + i > 0) & (t0 + i < length)
            value = tl.load(here, mask=inside, other=0)
            resets += (value != tl.load(here - toward, mask=inside, other=0),)
    return resets


@triton.jit
def load_tile(pointer, d_stride, n_stride, d, n, mask):
    """(BN, BD) float32 of a (D, N) tensor; 0 outside."""
    return tl.load(pointer + d[None, :] * d_stride + n[:, None] * n_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, d_stride, n_stride, d, n, mask, value):
    tl.store(pointer + d[None, :] * d_stride + n[:, None] * n_stride, value, mask=mask)


class Geometry(NamedTuple):
    """How a call is cut: ``blocks`` tiles of channels for each batch row, each within one group of B and one of C."""

    groups: int
    B_groups: int
    C_groups: int
    blocks_per_group: int
    BN: int
    BD: int
    num_warps: int

    @property
    def blocks(self) -> int:
        return self.groups * self.blocks_per_group


def geometry(
    channels: int, d_state: int, B: Tensor, C: Tensor, direction: int, states_per_thread: int, max_warps: int
) -> Geometry:
    """Tiles of 32 channels, ``states_per_thread`` states of each in a thread, while ``max_warps`` warps can hold that.

    Larger states take more warps first, then fewer channels. All channels of a tile run in one direction.
    """
    B_groups, C_groups = group_count(B), group_count(C)
    groups = math.lcm(B_groups, C_groups, 2 if direction == HALF else 1)
    BN = triton.next_power_of_2(d_state)
    num_warps = min(max_warps, max(1, BN // states_per_thread))
    BD = min(32, 32 * num_warps * states_per_thread // BN)
    return Geometry(groups, B_groups, C_groups, triton.cdiv(channels // groups, BD), BN, BD, num_warps)


def group_count(vector: Tensor) -> int:
    """Groups of B or C: (B, L, G, N) has G, (B, L, N) and a constant (D, N) have one."""
    return vector.shape[2] if vector.dim() == 4 else 1


def checkpoint_shape(batch: int, length: int, channels: int, d_state: int) -> tuple[int, int, int]:
    """Shape of the float32 states kept for the backward: (B, chunks, N D), each the state (N, D) before its chunk."""
    return batch, (length + CHUNK - 1) // CHUNK, d_state * channels


def unit_stride(tensor: Tensor | None) -> Any:
    """The tensor with adjacent elements along its last axis: itself where that holds already."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def states_first(tensor: Tensor | None) -> Any:
    """(..., D, N) as a contiguous (..., N, D): the order of the kernels' tiles, see the head of this file."""
    return tensor if tensor is None else tensor.transpose(-1, -2).contiguous()


def vector_strides(vector: Tensor) -> tuple[int, int, int]:
    """(batch, time, group) strides of B or C; of a constant (D, N), which has none of these, (channel, state, 0)."""
    return vector.stride(0), vector.stride(1), vector.stride(2) if vector.dim() == 4 else 0


def row_strides(tensor: Tensor | None) -> tuple[int, int]:
    """(batch, time) strides of a (B, L, D) tensor."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def device_guard(tensor: Tensor) -> torch.cuda.device_of:
    """Launch on the device that holds ``tensor``, which need not be the current one."""
    return torch.cuda.device_of(tensor)
