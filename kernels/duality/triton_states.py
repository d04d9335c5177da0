"""States at borders in time: of the recurrence forwards, and of its gradient backwards.

Where heads are few, time is cut into segments of some tiles. Each segment first computes its own state, what it leaves
when the state before it is zero, all segments in parallel; a second kernel walks over the segments and adds up,
``state <- through state + own``, so that each entry becomes the state that enters its segment. The backward then walks
each segment from there, and keeps the state at every tile. The same is done for the gradient, from end to start.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.duality.triton_common import (
    Prepared,
    Tiling,
    ceil_div,
    load_decays,
    load_rows,
    row_strides,
    scale,
)
from mambakit.kernels.launch import launch

# Programs that a cut of time is to give, for an H200's 132 multiprocessors, and the fewest tiles that are worth one.
PROGRAMS = 512
SHORTEST = 4
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


@triton.jit(do_not_specialize=["length", "first_head", "tiles", "segments", "segment_tiles", "share", "count"])
def states_kernel(
    x, dout, z, B, C, weights, logs, owners, entering, leaving, befores, afters, throughs, dinitial,
    length, heads, first_head, all_heads, share, tiles, segments, segment_tiles, count,
    x_b, x_l, x_h, dout_b, dout_l, dout_h, z_b, z_l, z_h, B_b, B_l, B_g, C_b, C_l, C_g, row_b, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Walks over segments of ``heads`` of all heads, from first_head on: the first ``count`` = B * segments * heads
    programs forwards, as many more backwards.

    KEEP: from ``entering`` and ``leaving`` (see ``Segments``) or zeros, write the state before each tile to befores and
    the gradient behind it to afters (B, tiles, heads, P, N), and the gradient before them all to dinitial. Else: from
    zeros, write each segment's own to befores and afters (B, segments, heads, P, N), and to throughs (B, segments,
    heads) the decay through it.
    """
    program = tl.program_id(0) % count
    head = program % heads
    segment = program // heads % segments
    b = (program // heads // segments).to(tl.int64)
    group = ((first_head + head) // share).to(tl.int64)
    wide_head = (first_head + head).to(tl.int64)
    i, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    place = p[:, None] * N + n[None, :]
    exists = (p < P)[:, None] & (n < N)[None, :]
    weights += b * row_b + wide_head * tiles * Q
    logs += b * row_b + wide_head * tiles * Q
    if owners is not None:
        owners += b * owner_b
    first = segment * segment_tiles
    last = tl.minimum(first + segment_tiles, tiles)
    mine = ((b * segments + segment) * heads + head) * P * N
    whole = (b * all_heads + wide_head) * P * N  # where there is one segment, its borders are those of the sequence
    border = whole if WHOLE else mine
    state = tl.zeros([BP, BN], tl.float32)
    if tl.program_id(0) < count:
        x += b * x_b + wide_head * x_h
        B += b * B_b + group * B_g
        if KEEP and entering is not None:
            state = tl.load(entering + border + place, mask=exists, other=0.0).to(tl.float32)
        through_all = tl.full([], 1.0, tl.float32)
        for tile in tl.range(first, last):
            t0 = tile * Q
            _, weight, _, to_end, through = load_decays(weights, logs, owners, t0, i, Q)
            inputs = load_rows(x, t0, x_l, i, p, length, P, BP) * (weight * to_end)[:, None]
            vectors = load_rows(B, t0, B_l, i, n, length, N, BN).to(OPERAND)
            if KEEP:
                there = befores + ((b * tiles + tile) * heads + head) * P * N
                tl.store(there + place, state.to(befores.dtype.element_ty), mask=exists)
            state = scale(state, through)
            state = tl.dot(tl.trans(inputs.to(OPERAND)), vectors, acc=state, input_precision=PRECISION)
            through_all *= through
        if not KEEP:
            tl.store(throughs + (b * segments + segment) * heads + head, through_all)
            tl.store(befores + mine + place, state.to(befores.dtype.element_ty), mask=exists)
    elif dout is not None:
        dout += b * dout_b + wide_head * dout_h
        C += b * C_b + group * C_g
        if z is not None:
            z += b * z_b + wide_head * z_h
        if KEEP and leaving is not None:
            state = tl.load(leaving + border + place, mask=exists, other=0.0).to(tl.float32)
        for tile in tl.range(last - 1, first - 1, -1):
            t0 = tile * Q
            _, _, carry, _, through = load_decays(weights, logs, owners, t0, i, Q)
            slopes = load_slopes(dout, z, t0, dout_l, z_l, i, p, length, P, BP) * carry[:, None]
            vectors = load_rows(C, t0, C_l, i, n, length, N, BN).to(OPERAND)
            if KEEP:
                there = afters + ((b * tiles + tile) * heads + head) * P * N
                tl.store(there + place, state.to(afters.dtype.element_ty), mask=exists)
            state = scale(state, through)
            state = tl.dot(tl.trans(slopes.to(OPERAND)), vectors, acc=state, input_precision=PRECISION)
        if not KEEP:
            tl.store(afters + mine + place, state.to(afters.dtype.element_ty), mask=exists)
        elif dinitial is not None:
            tl.store(dinitial + whole + place, state.to(dinitial.dtype.element_ty), mask=exists & (segment == 0))


@triton.jit
def join_states(
    states, throughs, initial, row, heads, first_head, all_heads, segments, piece,
    STATE: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """``join_kernel`` for some numbers, ``piece``, of the states of row and head ``row``."""
    b, head = row // heads, row % heads
    inside = piece < STATE
    state = tl.zeros([WIDTH], tl.float32)
    if initial is not None:
        state = tl.load(initial + (b * all_heads + first_head + head) * STATE + piece, mask=inside, other=0.0).to(
            tl.float32
        )
    for start in tl.range(0, segments, AHEAD):
        own, decay = (), ()
        for k in tl.static_range(AHEAD):
            step = start + k
            there = (b * segments + (segments - 1 - step if REVERSE else step)) * heads + head
            own += (tl.load(states + there * STATE + piece, mask=inside & (step < segments), other=0.0),)
            decay += (tl.load(throughs + there, mask=step < segments, other=1.0),)
        for k in tl.static_range(AHEAD):
            step = start + k
            there = (b * segments + (segments - 1 - step if REVERSE else step)) * heads + head
            tl.store(states + there * STATE + piece, state, mask=inside & (step < segments))
            state = scale(state, decay[k]) + own[k]


@triton.jit(do_not_specialize=["heads", "first_head", "all_heads", "segments", "count"])
def join_kernel(
    befores, afters, throughs, initial, dfinal, heads, first_head, all_heads, segments, count,
    STATE: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The segments' own states to those that enter them. Grid (count * pieces, or twice that), count = B * heads.

    befores from ``initial`` on by the first programs, afters from ``dfinal`` back by the others.
    """
    pieces = tl.cdiv(STATE, WIDTH)
    piece = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    if row < count:
        join_states(
            befores, throughs, initial, row, heads, first_head, all_heads, segments, piece, STATE, WIDTH, AHEAD, False
        )
    elif afters is not None:
        join_states(
            afters,
            throughs,
            dfinal,
            row - count,
            heads,
            first_head,
            all_heads,
            segments,
            piece,
            STATE,
            WIDTH,
            AHEAD,
            True,
        )


class Segments:
    """The cut of time for some heads at once, and the launches over it; forwards alone where there is no ``dout``.

    Args:
        x, B, prepared: what makes the states. B (B, L, G, N).
        initial: (B, H, P, N), contiguous: the state before the whole sequence, zeros if None.
        heads: how many at once.
        enough: programs with which time need not be cut, since that costs another pass.
        dout, z, C: what makes the gradients of the states.
        dfinal: as initial, the gradient behind the sequence.

    Attributes:
        entering, leaving: (B, segments, heads, P, N), the state before and the gradient behind each segment, once
            ``join`` has been called; of a single segment ``initial`` and ``dfinal``, of all heads.
    """

    def __init__(
        self,
        x: Tensor,
        B: Tensor,
        prepared: Prepared,
        tile: Tiling,
        initial: Tensor | None,
        heads: int,
        enough: int,
        dout: Tensor | None = None,
        z: Tensor | None = None,
        C: Tensor | None = None,
        dfinal: Tensor | None = None,
    ) -> None:
        weights, logs, owners = prepared
        batch, length, all_heads, channels = x.shape
        self.d_state, self.heads, self.all_heads, self.batch = B.shape[3], heads, all_heads, batch
        self.initial, self.dfinal = initial, dfinal
        self.directions = 1 if dout is None else 2
        self.tiles = weights.shape[2] // tile.Q
        programs = batch * heads * self.directions
        self.segment_tiles = self.tiles
        if programs < enough:
            self.segment_tiles = max(SHORTEST, ceil_div(self.tiles, ceil_div(PROGRAMS, programs)))
        self.segments = ceil_div(self.tiles, self.segment_tiles)
        self.entering: Any = initial
        self.leaving: Any = dfinal
        if self.segments > 1:
            shape = (batch, self.segments, heads, channels, self.d_state)
            self.entering = x.new_empty(shape, dtype=torch.float32)
            self.leaving = None if dout is None else torch.empty_like(self.entering)
            self.throughs = x.new_empty(shape[:3], dtype=torch.float32)
        self.inputs = (x, dout, z, B, C, weights, logs, owners)
        self.numbers = (
            all_heads, all_heads // B.shape[2], self.tiles, self.segments, self.segment_tiles,
            batch * self.segments * heads,
            *(stride for t in (x, dout, z, B, C) for stride in row_strides(t)),
            weights.stride(0), 0 if owners is None else owners.stride(0),
        )  # fmt: skip
        self.length = length
        self.sizes = {"P": channels, "N": self.d_state, **tile.sizes, "WHOLE": self.segments == 1}

    def join(self, first_head: int) -> None:
        """Fill ``entering`` and ``leaving`` for the heads from ``first_head`` on."""
        if self.segments == 1:
            return
        self._walk(first_head, None, None, self.entering, self.leaving, self.throughs, None)
        size, count = self.sizes["P"] * self.d_state, self.batch * self.heads
        launch(
            join_kernel, (count * ceil_div(size, WIDTH) * self.directions,),
            self.entering, self.leaving, self.throughs, self.initial, self.dfinal,
            self.heads, first_head, self.all_heads, self.segments, count,
            STATE=size, WIDTH=WIDTH, AHEAD=AHEAD, num_warps=4,
        )  # fmt: skip

    def keep(self, first_head: int, befores: Tensor, afters: Tensor, dinitial: Tensor | None) -> None:
        """Fill befores and afters (B, tiles, heads, P, N), and these heads of dinitial; see ``states_kernel``."""
        self._walk(first_head, self.entering, self.leaving, befores, afters, None, dinitial)

    def _walk(self, first_head: int, *states: Tensor | None) -> None:
        launch(
            states_kernel, (self.batch * self.segments * self.heads * self.directions,),
            *self.inputs, *states, self.length, self.heads, first_head, *self.numbers,
            **self.sizes, KEEP=states[4] is None, num_warps=4,
        )  # fmt: skip
