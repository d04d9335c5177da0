"""What the Gluon scan kernels share: layouts, row work, and how a call is cut into programs.

Letters: B batch, L length, D channels, N state size. A program owns BD channels of one batch row over one segment of
time and walks it in tiles of T steps. Two layouts meet in it:

* the state layout, [BD, N]: a thread holds CPT channels times NS = 4 states, N / 4 lanes share a channel. A row of B
  or C serves CPT channels a thread, a row of delta serves 4 states, and sums over states cross N / 4 lanes only;
* the row layout, [T, BD]: every (step, channel) once, several adjacent channels a thread. What is computed once a
  channel and step (softplus, gates, their slopes) is done here, with wide loads and stores.

Shared memory carries rows from one to the other. Gluon has no interpreter: the plain kernels (triton_forward.py,
triton_backward.py) state the same algorithm for tests on a CPU and serve the calls that these do not take.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated, attr-defined, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from mambakit.kernels.scan.triton_common import group_count

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
STATES_PER_THREAD = 4


@constexpr_function
def state_layout(N, CPT, NW):
    """Of tiles [BD, N]: CPT channels and 4 states a thread."""
    lanes = N // 4
    return gl.BlockedLayout([CPT, 4], [32 // lanes, lanes], [NW, 1], [1, 0])


@constexpr_function
def tile_layout(T, width, NW):
    """Of tiles [T, width] that no two threads share where T * width allows it; up to 8 adjacent columns a thread."""
    vector = max(1, min(8, T * width // (32 * NW)))
    across = min(32, width // vector)
    warps_across = max(1, min(NW, width // (32 * vector)))
    return gl.BlockedLayout([1, vector], [32 // across, across], [NW // warps_across, warps_across], [1, 0])


@constexpr_function
def plain_shared():
    """Row-major shared memory without swizzle."""
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


@gluon.jit
def row_of(shared, i):
    """Row i of a [rows, columns] allocation with ``plain_shared``, for a one-dimensional load or store."""
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return shared._reinterpret(gl.float32, shared.shape, line).index(i)


@gluon.jit
def stack(rows, T: gl.constexpr, BD: gl.constexpr):
    """[T, BD] of a tuple of T tensors [BD]; T a power of two."""
    for k in gl.static_range(T.bit_length() - 1):
        # Each round appends an axis of two, the highest bit of a row's number first.
        paired = ()
        for i in gl.static_range(T >> (k + 1)):
            paired = paired + (gl.join(rows[i], rows[i + (T >> (k + 1))]),)
        rows = paired
    return rows[0].reshape([BD, T]).permute((1, 0))


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softplus(x):
    """log(1 + exp(x)), relative error a few 1e-6; x itself above 20, exactly 0 far below."""
    w = gl.exp2(x * LOG2E)
    # 1 + w drops the low bits of a small w: its series does not.
    series = w * (1.0 - w * (0.5 - w * (0.3333333333 - w * 0.25)))
    small = gl.where(w < 0.03, series, log2(1.0 + w) * LN2)
    return gl.where(x > 20.0, x, small)


@gluon.jit
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp2(-x * LOG2E))


@gluon.jit
def load_tile(pointer, position, sense, stride, column, mask, T: gl.constexpr, layout: gl.constexpr):
    """[T, columns] of the rows at ``position``, ``position + sense``, ... in the tensor's own dtype; 0 where masked."""
    i = gl.arange(0, T, layout=gl.SliceLayout(1, layout))
    offset = gl.expand_dims(i * (sense * stride), 1) + gl.expand_dims(column, 0)
    return gl.load(pointer + position * stride + offset, mask=mask, other=0.0)


@gluon.jit
def load_keep(seq_idx, position, sense, direction, step, count, first_step, T: gl.constexpr, layout: gl.constexpr):
    """[T, 1], 1.0 where step ``step + i`` of ``count`` continues the sequence of the scan step before it, else 0.0.

    The scan step before position p is p - direction; ``first_step`` is the number of the step without one.
    """
    i = step + gl.arange(0, T, layout=gl.SliceLayout(1, layout))
    here = seq_idx + position + gl.arange(0, T, layout=gl.SliceLayout(1, layout)) * sense
    inside = (i < count) & (i != first_step)
    same = gl.load(here, mask=inside, other=0) == gl.load(here - direction, mask=inside, other=0)
    return gl.expand_dims(gl.where(same, 1.0, 0.0), 1)


class Cut(NamedTuple):
    """How a call is cut: ``blocks`` tiles of BD channels a batch row, each within one group of B and one of C."""

    groups: int
    B_groups: int
    C_groups: int
    blocks_per_group: int
    BD: int

    @property
    def blocks(self) -> int:
        return self.groups * self.blocks_per_group


def cut_channels(channels: int, d_state: int, B: Tensor, C: Tensor, per_thread: int, warps: int) -> Cut:
    """Tiles of ``per_thread`` channels a thread, d_state / 4 lanes a channel, ``warps`` warps."""
    import math

    B_groups, C_groups = group_count(B), group_count(C)
    groups = math.lcm(B_groups, C_groups)
    BD = 32 // (d_state // STATES_PER_THREAD) * per_thread * warps
    return Cut(groups, B_groups, C_groups, triton.cdiv(channels // groups, BD), BD)
