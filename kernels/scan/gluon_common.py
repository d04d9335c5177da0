"""What the Gluon scan kernels share: layouts, row work, and how a call is cut into programs.

Letters: B batch, L length, D channels, N state size. A program owns BD channels of one batch row over one segment of
time and walks it in tiles of T steps. Two layouts meet in it:

* the state layout, [BD, N]: a thread holds CPT channels times SPT states, N / SPT lanes share a channel. A row of B or
  C serves CPT channels a thread, a row of delta SPT states, and sums over states cross N / SPT lanes only;
* the row layout, [T, BD]: every (step, channel) once, several adjacent channels a thread. What is computed once a
  channel and step (softplus, gates, their slopes) is done here, with wide loads and stores.

Shared memory carries rows from one to the other. Gluon has no interpreter: the plain kernels (triton_forward.py,
triton_backward.py) state the same algorithm for tests on a CPU and serve the calls that these do not take.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated, attr-defined, no-untyped-call"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@constexpr_function
def state_layout(N, CPT, NW, SPT=4):
    """Of tiles [BD, N]: CPT channels and SPT states a thread."""
    lanes = N // SPT
    return gl.BlockedLayout([CPT, SPT], [32 // lanes, lanes], [NW, 1], [1, 0])


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
            paired += (gl.join(rows[i], rows[i + (T >> (k + 1))]),)
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
def step_size(delta_tile, offset, valid, SOFTPLUS: gl.constexpr):
    """delta with its bias and softplus; 0 where a step lies outside the segment: it changes no state."""
    dt = delta_tile.to(gl.float32) + gl.expand_dims(offset, 0)
    if SOFTPLUS:
        dt = softplus(dt)
    return gl.where(valid, dt, 0.0)


@gluon.jit
def direction_of(group, groups, DIRECTION: gl.constexpr):
    """+1 or -1, the sense in which this program's group of channels walks the sequence."""
    direction = 1
    if DIRECTION == 1:
        direction = -1
    if DIRECTION == 2:
        direction = gl.where(2 * group < groups, 1, -1)
    return direction


@gluon.jit
def position_of(step, length, direction, DIRECTION: gl.constexpr):
    """Where scan step ``step`` (int64) lies in the sequence."""
    position = step
    if DIRECTION == 1:
        position = length - 1 - step
    if DIRECTION == 2:
        position = gl.where(direction == 1, step, length - 1 - step)
    return position


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
