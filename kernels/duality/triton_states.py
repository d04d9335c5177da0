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
    load_decays,
    load_rows,
    row_strides,
    scale,
)
from mambakit.kernels.launch import launch

# Programs that keep an H200's 132 multiprocessors busy, and the fewest tiles that are worth one.
PROGRAMS = 256
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


@triton.jit(do_not_specialize=["length", "tiles", "segments", "segment_tiles", "share", "count"])
def states_kernel(
    x, dout, z, B, C, weights, logs, owners, entering, leaving, befores, afters, throughs, dinitial,
    length, heads, share, tiles, segments, segment_tiles, count,
    x_b, x_l, x_h, dout_b, dout_l, dout_h, z_b, z_l, z_h, B_b, B_l, B_g, C_b, C_l, C_g, row_b, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Walks over segments: the first ``count`` = B * segments * H programs forwards, as many more backwards.

    KEEP: from ``entering`` and ``leaving`` (B, segments, H, P, N) or zeros, write the state before each tile to
    befores and the gradient behind it to afters (B, tiles, H, P, N), and the gradient before them all to dinitial.
    Else: from zeros, write each segment's own to befores and afters (B, segments, H, P, N), and to throughs
    (B, segments, H) the decay through it.
    """
    program = tl.program_id(0) % count
    head = program % heads
    segment = program // heads % segments
    b = (program // heads // segments).to(tl.int64)
    wide_head = head.to(tl.int64)
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
    state = tl.zeros([BP, BN], tl.float32)
    if tl.program_id(0) < count:
        x += b * x_b + wide_head * x_h
        B += b * B_b + (head // share).to(tl.int64) * B_g
        if KEEP and entering is not None:
            state = tl.load(entering + mine + place, mask=exists, other=0.0).to(tl.float32)
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
        C += b * C_b + (head // share).to(tl.int64) * C_g
        if z is not None:
            z += b * z_b + wide_head * z_h
        if KEEP and leaving is not None:
            state = tl.load(leaving + mine + place, mask=exists, other=0.0).to(tl.float32)
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
            there = dinitial + (b * heads + head) * P * N
            tl.store(there + place, state.to(dinitial.dtype.element_ty), mask=exists & (segment == 0))


@triton.jit
def join_states(
    states, throughs, initial, row, heads, segments, piece,
    STATE: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """``join_kernel`` for some numbers, ``piece``, of the states of row and head ``row``."""
    b, head = row // heads, row % heads
    inside = piece < STATE
    state = tl.zeros([WIDTH], tl.float32)
    if initial is not None:
        state = tl.load(initial + row * STATE + piece, mask=inside, other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=["heads", "segments", "count"])
def join_kernel(
    befores, afters, throughs, initial, dfinal, heads, segments, count,
    STATE: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """In place, the segments' own states to those that enter them. Grid (count * pieces, or twice that), count = B * H.

    befores from ``initial`` on by the first programs, afters from ``dfinal`` back by the others.
    """
    pieces = tl.cdiv(STATE, WIDTH)
    piece = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    if row < count:
        join_states(befores, throughs, initial, row, heads, segments, piece, STATE, WIDTH, AHEAD, False)
    elif afters is not None:
        join_states(afters, throughs, dfinal, row - count, heads, segments, piece, STATE, WIDTH, AHEAD, True)


class Segments:
    """The cut of some heads' time, and the launches over it; forwards alone where there is no ``dout``.

    Args:
        x, B, prepared: what makes the states. B (B, L, G, N).
        dout, z, C: what makes their gradients.
        initial, dfinal: (B, H, P, N), contiguous: the state before, and the gradient behind, the whole sequence.
    """

    def __init__(
        self,
        x: Tensor,
        B: Tensor,
        prepared: Prepared,
        tile: Tiling,
        initial: Tensor | None,
        dout: Tensor | None = None,
        z: Tensor | None = None,
        C: Tensor | None = None,
        dfinal: Tensor | None = None,
    ) -> None:
        self.x, self.B, self.prepared, self.tile = x, B, prepared, tile
        self.dout, self.z, self.C = dout, z, C
        batch, _, heads, channels = x.shape
        self.tiles = prepared.weights.shape[2] // tile.Q
        self.segment_tiles = max(SHORTEST, triton.cdiv(self.tiles, triton.cdiv(PROGRAMS, batch * heads)))
        self.segments = triton.cdiv(self.tiles, self.segment_tiles)
        self.directions = 1 if dout is None else 2
        # The states that enter each segment (B, segments, H, P, N); of a single segment, the given ones.
        self.entering: Any = initial
        self.leaving: Any = dfinal
        if self.segments > 1:
            shape = (batch, self.segments, heads, channels, B.shape[3])
            self.entering = x.new_empty(shape, dtype=torch.float32)
            self.leaving = None if dout is None else torch.empty_like(self.entering)
            throughs = x.new_empty(shape[:3], dtype=torch.float32)
            self._walk(None, None, self.entering, self.leaving, throughs, None)
            size = channels * B.shape[3]
            launch(
                join_kernel, (batch * heads * triton.cdiv(size, WIDTH) * self.directions,),
                self.entering, self.leaving, throughs, initial, dfinal, heads, self.segments, batch * heads,
                STATE=size, WIDTH=WIDTH, AHEAD=AHEAD, num_warps=4,
            )  # fmt: skip

    def keep(self, befores: Tensor, afters: Tensor, dinitial: Tensor | None) -> None:
        """Fill befores and afters (B, tiles, H, P, N) and dinitial; see ``states_kernel``."""
        self._walk(self.entering, self.leaving, befores, afters, None, dinitial)

    def _walk(
        self,
        entering: Tensor | None,
        leaving: Tensor | None,
        befores: Tensor,
        afters: Tensor | None,
        throughs: Tensor | None,
        dinitial: Tensor | None,
    ) -> None:
        weights, logs, owners = self.prepared
        batch, length, heads, channels = self.x.shape
        count = batch * self.segments * heads
        launch(
            states_kernel, (count * self.directions,),
            self.x, self.dout, self.z, self.B, self.C, weights, logs, owners, entering, leaving, befores, afters,
            throughs, dinitial,
            length, heads, heads // self.B.shape[2], self.tiles, self.segments, self.segment_tiles, count,
            *(stride for t in (self.x, self.dout, self.z, self.B, self.C) for stride in row_strides(t)),
            weights.stride(0), 0 if owners is None else owners.stride(0),
            P=channels, N=self.B.shape[3], **self.tile.sizes, KEEP=throughs is None, num_warps=4,
        )  # fmt: skip
