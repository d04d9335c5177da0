"""Sums over the lanes of a warp that leave each lane another of the sums, for the Gluon backward scan.

A butterfly that gives every lane the sum of one number costs a shuffle for each bit of the lane number. Of many numbers
a lane needs but its share: lanes exchange halves, each keeping the half that its bit of the lane number says, and a
shuffle serves two numbers. Over eight lanes eight numbers take 4 + 2 + 1 shuffles, not 24.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated, attr-defined, no-untyped-call, operator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function


@constexpr_function
def exchange_asm(MASK):
    return f"""{{ .reg .pred p; .reg .f32 give, keep;
        setp.ne.s32 p, $3, 0;
        selp.f32 give, $1, $2, p;
        selp.f32 keep, $2, $1, p;
        shfl.sync.bfly.b32 give, give, {MASK}, 31, -1;
        add.f32 $0, keep, give; }}"""


@gluon.jit
def exchange(x, y, bit, MASK: gl.constexpr):
    """Lanes with bit MASK clear get x's sum over that bit of the lane number, the others y's: one shuffle for two sums.

    bit: whether a lane has the bit, int32 of x's shape.
    """
    return gl.inline_asm_elementwise(
        exchange_asm(MASK), "=f,f,f,r", [x, y, bit], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def last_first(tiles):
    """The tuple turned round."""
    turned = ()
    for i in gl.static_range(len(tiles)):
        turned += (tiles[len(tiles) - 1 - i],)
    return turned


@gluon.jit
def stack_last(tiles):
    """[..., 2, ..., 2] of a tuple of K tensors [...], K a power of two: to be reshaped to [..., K]."""
    K: gl.constexpr = len(tiles)
    for k in gl.static_range(K.bit_length() - 1):
        paired = ()
        for i in gl.static_range(K >> (k + 1)):
            paired += (gl.join(tiles[i], tiles[i + (K >> (k + 1))]),)
        tiles = paired
    return tiles[0]


@gluon.jit
def place(like, AXIS: gl.constexpr):
    """The index along an axis of every element of a two-dimensional tensor."""
    line: gl.constexpr = gl.SliceLayout(1 - AXIS, like.type.layout)
    index = gl.expand_dims(gl.arange(0, like.shape[AXIS], layout=line), 1 - AXIS)
    return index + gl.full(like.shape, 0, gl.int32, layout=like.type.layout)


@gluon.jit
def over_states(tiles, T: gl.constexpr, BD: gl.constexpr, S: gl.constexpr):
    """[T, BD]: T tiles [BD, S], the last step's first, with a channel in S neighbouring lanes, summed over these."""
    tiles = last_first(tiles)
    s = place(tiles[0], 1)
    for k in gl.static_range(min(S, T).bit_length() - 1):
        halved = ()
        for i in gl.static_range(T >> (k + 1)):
            halved += (exchange(tiles[2 * i], tiles[2 * i + 1], s & (1 << k), 1 << k),)
        tiles = halved
    # Lane s of a channel holds the sum of step i S + s.
    if S > T:
        tiles = (gl.sum(tiles[0].reshape([BD, S // T, T]), axis=1),)
    return stack_last(tiles).reshape([BD, min(S, T), T // min(S, T)]).permute((2, 1, 0)).reshape([T, BD])


@gluon.jit
def states_apart(x, S: gl.constexpr, SPT: gl.constexpr):
    """SPT tensors [G, S], state by state of a thread, of [G, S * SPT]."""
    G: gl.constexpr = x.shape[0]
    tiles = (x,)
    for k in gl.static_range(SPT.bit_length() - 1):
        halves = ()
        for i in gl.static_range(1 << k):
            a, b = tiles[i].reshape([G, S, 2, SPT >> (k + 1)]).permute((0, 1, 3, 2)).split()
            halves += (a, b)
        tiles = halves
    flat = ()
    for i in gl.static_range(SPT):
        flat += (tiles[i].reshape([G, S]),)
    return flat


@gluon.jit
def over_channels(x, y, BD: gl.constexpr, S: gl.constexpr, SPT: gl.constexpr, CPT: gl.constexpr, NW: gl.constexpr):
    """[NW, 2 N]: sums of x [BD, N], then of y, over the channels of each warp."""
    N: gl.constexpr = S * SPT
    G: gl.constexpr = BD // CPT
    tiles = states_apart(gl.sum(x.reshape([G, CPT, N]), axis=1), S, SPT)
    tiles += states_apart(gl.sum(y.reshape([G, CPT, N]), axis=1), S, SPT)
    g = place(tiles[0], 0)
    for k in gl.static_range(3):
        halved = ()
        for i in gl.static_range(SPT >> k):
            halved += (exchange(tiles[i], tiles[i + (SPT >> k)], g & (1 << k), S << k),)
        tiles = halved
    # Bit 0 of a lane's group of channels says x or y, bits 1 and 2 are the two highest of the state in its thread.
    sums = gl.sum(stack_last(tiles).reshape([NW, 4 // S, 2, 2, 2, S, SPT // 4]), axis=1)
    return sums.permute((0, 3, 4, 2, 1, 5)).reshape([NW, 2 * N])
