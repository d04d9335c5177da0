"""States where segments of time meet: each segment's own, all in parallel, then joined.

A segment is some tiles. Forwards its own state is what it leaves when the state before it is zero; backwards the same
of the gradient, from its end to its start. A second kernel then walks over the segments and adds up,
``state <- through state + own``, so that each entry becomes the state (or the gradient) that enters its segment.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.duality.triton_common import (
    Prepared,
    Tiling,
    load_decays,
    load_rows,
    row_strides,
    scale,
)
from mambakit.kernels.launch import launch

# Segments read ahead of their addition, and numbers of a state that a program adds up.
AHEAD = 8
WIDTH = 512


@triton.jit
def load_slopes(dout, z, t0, dout_l, z_l, i, p, length, P: tl.constexpr, BP: tl.constexpr):
    """The gradient of the output before its gate, float32: dout silu(z)."""
    slopes = load_rows(dout, t0, dout_l, i, p, length, P, BP).to(tl.float32)
    if z is not None:
        gate = load_rows(z, t0, z_l, i, p, length, P, BP).to(tl.float32)
        slopes *= gate * tl.sigmoid(gate)
    return slopes


@triton.jit
def advance(
    state, x, B, t0, x_l, B_l, weights, logs, owners, i, p, n, length,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state (P, N) behind the tile at t0 from the one before it, and the decay through the tile."""
    _, weight, _, to_end, through = load_decays(weights, logs, owners, t0, i, Q)
    inputs = load_rows(x, t0, x_l, i, p, length, P, BP) * (weight * to_end)[:, None]
    vectors = load_rows(B, t0, B_l, i, n, length, N, BN).to(OPERAND)
    state = scale(state, through)
    return tl.dot(tl.trans(inputs.to(OPERAND)), vectors, acc=state, input_precision=PRECISION), through


@triton.jit
def retreat(
    dstate, dout, z, C, t0, dout_l, z_l, C_l, weights, logs, owners, i, p, n, length,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient (P, N) of the state before the tile at t0 from that of the state behind it."""
    _, _, carry, _, through = load_decays(weights, logs, owners, t0, i, Q)
    slopes = load_slopes(dout, z, t0, dout_l, z_l, i, p, length, P, BP) * carry[:, None]
    vectors = load_rows(C, t0, C_l, i, n, length, N, BN).to(OPERAND)
    dstate = scale(dstate, through)
    return tl.dot(tl.trans(slopes.to(OPERAND)), vectors, acc=dstate, input_precision=PRECISION)


@triton.jit(do_not_specialize=["length", "tiles", "segments", "segment_tiles", "share"])
def states_kernel(
    x, z, B, weights, logs, owners, states, throughs,
    length, heads, share, tiles, segments, segment_tiles,
    x_b, x_l, x_h, z_b, z_l, z_h, B_b, B_l, B_g, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Own states of the segments, (B, segments, H, P, N). Grid (B * segments * H,).

    In reverse x is the output's gradient, z its gate and B is C; else there is no z, and ``throughs`` (B, segments, H)
    get the decay through each segment.
    """
    head = tl.program_id(0) % heads
    segment = tl.program_id(0) // heads % segments
    b = (tl.program_id(0) // heads // segments).to(tl.int64)
    i, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    x += b * x_b + head.to(tl.int64) * x_h
    B += b * B_b + (head // share).to(tl.int64) * B_g
    weights += (b * heads + head) * tiles * Q
    logs += (b * heads + head) * tiles * Q
    if owners is not None:
        owners += b * owner_b
    first = segment * segment_tiles
    last = tl.minimum(first + segment_tiles, tiles)
    state = tl.zeros([BP, BN], tl.float32)
    if REVERSE:
        if z is not None:
            z += b * z_b + head.to(tl.int64) * z_h
        for tile in tl.range(last - 1, first - 1, -1):
            state = retreat(
                state, x, z, B, tile * Q, x_l, z_l, B_l, weights, logs, owners, i, p, n, length,
                P, N, Q, BP, BN, OPERAND, PRECISION,
            )  # fmt: skip
    else:
        through_all = tl.full([], 1.0, tl.float32)
        for tile in tl.range(first, last):
            state, through = advance(
                state, x, B, tile * Q, x_l, B_l, weights, logs, owners, i, p, n, length,
                P, N, Q, BP, BN, OPERAND, PRECISION,
            )  # fmt: skip
            through_all *= through
        tl.store(throughs + (b * segments + segment) * heads + head, through_all)
    states += ((b * segments + segment) * heads + head) * P * N
    mask = (p < P)[:, None] & (n < N)[None, :]
    tl.store(states + p[:, None] * N + n[None, :], state.to(states.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "segments"])
def join_kernel(
    states, throughs, initial, final, heads, segments,
    STATE: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """In place, own states to those that enter each segment; ``final`` what leaves the last. Grid (B * H * pieces,)."""
    pieces = tl.cdiv(STATE, WIDTH)
    piece = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)
    inside = piece < STATE
    row = (tl.program_id(0) // pieces).to(tl.int64)
    b, head = row // heads, row % heads
    state = tl.zeros([WIDTH], tl.float32)
    if initial is not None:
        state = tl.load(initial + row * STATE + piece, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(0, segments, AHEAD):
        own, decay = (), ()
        for k in tl.static_range(AHEAD):
            step = start + k
            segment = segments - 1 - step if REVERSE else step
            there = (b * segments + segment) * heads + head
            own += (tl.load(states + there * STATE + piece, mask=inside & (step < segments), other=0.0),)
            decay += (tl.load(throughs + there, mask=step < segments, other=1.0),)
        for k in tl.static_range(AHEAD):
            step = start + k
            segment = segments - 1 - step if REVERSE else step
            there = (b * segments + segment) * heads + head
            tl.store(states + there * STATE + piece, state.to(states.dtype.element_ty), mask=inside & (step < segments))
            state = scale(state, decay[k]) + own[k].to(tl.float32)
    if final is not None:
        tl.store(final + row * STATE + piece, state.to(final.dtype.element_ty), mask=inside)


def own_states(
    x: Tensor,
    z: Tensor | None,
    B: Tensor,
    prepared: Prepared,
    tile: Tiling,
    states: Tensor,
    throughs: Tensor,
    segment_tiles: int,
    reverse: bool,
) -> None:
    """Fill ``states`` (B, S, H, P, N), and forwards ``throughs`` (B, S, H); see ``states_kernel``."""
    batch, segments, heads, channels, d_state = states.shape
    weights, logs, owners = prepared
    launch(
        states_kernel, (batch * segments * heads,), x, z, B, weights, logs, owners, states, throughs,
        x.shape[1], heads, heads // B.shape[2], weights.shape[2] // tile.Q, segments, segment_tiles,
        *row_strides(x), *row_strides(z), *row_strides(B), 0 if owners is None else owners.stride(0),
        P=channels, N=d_state, Q=tile.Q, BP=tile.BP, BN=tile.BN, OPERAND=tile.operand, PRECISION=tile.precision,
        REVERSE=reverse, num_warps=4,
    )  # fmt: skip


def join(states: Tensor, throughs: Tensor, initial: Tensor | None, final: Tensor | None, reverse: bool) -> None:
    """Turn own ``states`` (B, S, H, P, N) into entering ones; initial and final (B, H, P, N), contiguous or None."""
    batch, segments, heads = states.shape[:3]
    size = states.shape[3] * states.shape[4]
    launch(
        join_kernel, (batch * heads * triton.cdiv(size, WIDTH),), states, throughs, initial, final, heads, segments,
        STATE=size, WIDTH=WIDTH, AHEAD=AHEAD, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
