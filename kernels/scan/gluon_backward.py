"""The backward scan in Gluon. With g_t the gradient of y_t before the gate, the gradient of the state h_t is

    s_t = C_t g_t + exp(delta_{t+1} A) s_{t+1},

a scan from the end. Read gluon_common.py's head first.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated, attr-defined, no-untyped-call, operator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from mambakit.kernels.launch import launch
from mambakit.kernels.scan.gluon_common import (
    LN2,
    LOG2E,
    load_keep,
    load_tile,
    plain_shared,
    row_of,
    sigmoid,
    softplus,
    state_layout,
    tile_layout,
)
from mambakit.kernels.scan.gluon_forward import direction_of
from mambakit.kernels.scan.gluon_launch import CHUNK, cut, dense_float, multiprocessors, segment_states
from mambakit.kernels.scan.reference import HALF
from mambakit.kernels.scan.triton_common import device_guard, group_count, row_strides, unit_stride, vector_strides
from mambakit.kernels.scan.triton_sums import add_partials


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


@constexpr_function
def sum_layout(T, width, NW):
    """Of [T, NW, width]: all of the middle axis in one thread."""
    vector = max(1, T * width // (32 * NW))
    across = min(32, width // vector)
    return gl.BlockedLayout([1, NW, vector], [32 // across, 1, across], [NW, 1, 1], [2, 1, 0])


@constexpr_function
def cube_shared():
    """Row-major shared memory of three axes."""
    return gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])


@gluon.jit
def kept(keeps, t, layout: gl.constexpr):
    """Whether the state before step t of a tile reaches it, to broadcast over a [BD, N] tile."""
    return gl.expand_dims(row_of(keeps, t).load(layout), 1) > 0.0


@gluon.jit
def step_tile(delta_tile, u_tile, offset, valid, SOFTPLUS: gl.constexpr):
    """(step sizes, step times input), both 0 worigin a step lies outside the sequence."""
    dt = delta_tile.to(gl.float32) + gl.expand_dims(offset, 0)
    if SOFTPLUS:
        dt = softplus(dt)
    dt = gl.where(valid, dt, 0.0)
    return dt, dt * u_tile.to(gl.float32)


@gluon.jit
def scan_backward_kernel(
    dout, dfinal, u, delta, A, B, C, D, z, bias, seq_idx, checkpoints, products, ends,
    du, ddelta, dz, out, dA, dBC, dD, dbias, dinitial,
    length, channels, group_channels, blocks_per_group, blocks, groups, B_share, C_share, segments, segment_length,
    u_b, u_l, delta_b, delta_l, z_b, z_l, dout_b, dout_l, du_b, du_l, dz_b, dz_l, seq_b,
    B_b, B_l, B_g, C_b, C_l, C_g,
    N: gl.constexpr, T: gl.constexpr, CPT: gl.constexpr, SPT: gl.constexpr, NW: gl.constexpr, CHUNK: gl.constexpr,
    SOFTPLUS: gl.constexpr, DIRECTION: gl.constexpr, RELOAD: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = state_layout(N, CPT, NW, SPT)
    S: gl.constexpr = N // SPT
    BD: gl.constexpr = 32 * SPT // N * CPT * NW
    LOADS_AT: gl.constexpr = T // 2
    PARTS: gl.constexpr = CHUNK // T
    rows: gl.constexpr = tile_layout(T, BD, NW)
    vectors: gl.constexpr = tile_layout(T, N, NW)
    sums: gl.constexpr = sum_layout(T, 2 * N, NW)
    channel: gl.constexpr = gl.SliceLayout(1, layout)
    state: gl.constexpr = gl.SliceLayout(0, layout)

    segment = gl.program_id(0) % segments
    block = gl.program_id(0) // segments % blocks
    b = (gl.program_id(0) // segments // blocks).to(gl.int64)
    batch = gl.num_programs(0) // segments // blocks
    group = block // blocks_per_group
    start_d = block % blocks_per_group * BD
    direction = direction_of(group, groups, DIRECTION)
    local = start_d + gl.arange(0, BD, layout=gl.SliceLayout(0, rows))
    in_d = local < group_channels
    d = group * group_channels + local
    in_row = gl.expand_dims(in_d, 0)
    n = gl.arange(0, N, layout=gl.SliceLayout(0, vectors))
    local_h = start_d + gl.arange(0, BD, layout=channel)
    in_h = gl.expand_dims(local_h < group_channels, 1)
    tile = gl.expand_dims(group * group_channels + local_h, 1) * N + gl.expand_dims(gl.arange(0, N, layout=state), 0)
    row_states = channels * N

    start = segment * segment_length
    count = gl.minimum(segment_length, length - start)
    position = start.to(gl.int64)
    if DIRECTION == 1:
        position = length - 1 - position
    if DIRECTION == 2:
        position = gl.where(direction == 1, position, length - 1 - position)

    u += b * u_b + position * u_l
    delta += b * delta_b + position * delta_l
    dout += b * dout_b + position * dout_l
    du += b * du_b + position * du_l
    ddelta += (b * length + position) * channels
    if z is not None:
        z += b * z_b + position * z_l
        dz += b * dz_b + position * dz_l
    if out is not None:
        out += (b * length + position) * channels
    if seq_idx is not None:
        seq_idx += b * seq_b + position
    B += b * B_b + (group // B_share).to(gl.int64) * B_g + position * B_l
    C += b * C_b + (group // C_share).to(gl.int64) * C_g + position * C_l
    dBC += ((block.to(gl.int64) * batch + b) * length + position) * (2 * N)
    checkpoints += (b * ((length + CHUNK - 1) // CHUNK) + start // CHUNK) * row_states

    A2 = gl.load(A + tile, mask=in_h, other=0.0) * LOG2E
    offset = gl.zeros([BD], gl.float32, layout=gl.SliceLayout(0, rows))
    skip = gl.zeros([BD], gl.float32, layout=gl.SliceLayout(0, rows))
    if bias is not None:
        offset = gl.load(bias + d, mask=in_d, other=0.0).to(gl.float32)
        dbias_tile = gl.zeros([T, BD], gl.float32, layout=rows)
    if D is not None:
        skip = gl.load(D + d, mask=in_d, other=0.0).to(gl.float32)
        dD_tile = gl.zeros([T, BD], gl.float32, layout=rows)
    dA_tile = gl.zeros([BD, N], gl.float32, layout=layout)
    # s: the gradient that reaches a state from all later steps.
    s = gl.zeros([BD, N], gl.float32, layout=layout)
    if dfinal is not None:
        s = gl.load(dfinal + b * row_states + tile, mask=in_h, other=0.0).to(gl.float32)
    if products is not None:
        for later in range(0, segments - 1 - segment):
            slot = (b * segments + segments - 1 - later) * row_states + tile
            decay = gl.load(products + slot, mask=in_h, other=0.0)
            s = decay * s + gl.load(ends + slot, mask=in_h, other=0.0)

    deltas = gl.allocate_shared_memory(gl.float32, [PARTS, T, BD], plain_shared())
    inputs = gl.allocate_shared_memory(gl.float32, [PARTS, T, BD], plain_shared())
    Bs = gl.allocate_shared_memory(gl.float32, [PARTS, T, N], plain_shared())
    Cs = gl.allocate_shared_memory(gl.float32, [PARTS, T, N], plain_shared())
    states = gl.allocate_shared_memory(gl.float32, [PARTS, BD, N], plain_shared())
    gs = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    ys = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    sBs = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    throughs = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    shares = gl.allocate_shared_memory(gl.float32, [T, NW, 2 * N], cube_shared())
    if seq_idx is not None:
        keeps = gl.allocate_shared_memory(gl.float32, [PARTS, T, 1], plain_shared())
    i_rows = gl.arange(0, T, layout=gl.SliceLayout(1, rows))
    i_vectors = gl.arange(0, T, layout=gl.SliceLayout(1, vectors))

    parts = (count + T - 1) // T
    for back in range(0, PARTS):
        q = parts - 1 - back
        left = gl.where(q < 0, 0, count - q * T)
        valid = gl.expand_dims(i_rows < left, 1) & in_row
        inside = gl.expand_dims(i_vectors < left, 1)
        origin = direction * q.to(gl.int64) * T
        u_tile = load_tile(u, origin, direction, u_l, d, valid, T, rows)
        delta_tile = load_tile(delta, origin, direction, delta_l, d, valid, T, rows)
        B_tile = load_tile(B, origin, direction, B_l, n, inside, T, vectors)
        C_tile = load_tile(C, origin, direction, C_l, n, inside, T, vectors)
        dt, x = step_tile(delta_tile, u_tile, offset, valid, SOFTPLUS)
        slot = (q + PARTS) % PARTS
        deltas.index(slot).store(dt)
        inputs.index(slot).store(x)
        Bs.index(slot).store(B_tile.to(gl.float32))
        Cs.index(slot).store(C_tile.to(gl.float32))
        if seq_idx is not None:
            step = gl.where(q < 0, count, q * T)
            keeps.index(slot).store(load_keep(seq_idx, origin, direction, direction, step, count, -start, T, rows))

    origin = direction * (parts - 1).to(gl.int64) * T
    valid = gl.expand_dims(i_rows < count - (parts - 1) * T, 1) & in_row
    u_now = load_tile(u, origin, direction, u_l, d, valid, T, rows)
    g = load_tile(dout, origin, direction, dout_l, d, valid, T, rows).to(gl.float32)
    gate_slope = g
    gate_value = gl.full([T, BD], 1.0, gl.float32, layout=rows)
    if z is not None:
        gate = load_tile(z, origin, direction, z_l, d, valid, T, rows).to(gl.float32)
        opening = sigmoid(gate)
        gate_slope = g * (opening * (1.0 + gate * (1.0 - opening)))
        gate_value = gate * opening
        g = g * gate_value
    gs.store(g)

    for chunk in range((count - 1) // CHUNK, -1, -1):
        h = gl.load(checkpoints + chunk.to(gl.int64) * row_states + tile, mask=in_h, other=0.0)
        parts = (gl.minimum(CHUNK, count - chunk * CHUNK) + T - 1) // T
        origin = direction * chunk.to(gl.int64) * CHUNK
        u_at = u + origin * u_l
        delta_at = delta + origin * delta_l
        B_at = B + origin * B_l
        C_at = C + origin * C_l
        dout_at = dout + origin * dout_l
        du_at = du + origin * du_l
        ddelta_at = ddelta + origin * channels
        dBC_at = dBC + origin * (2 * N)
        if z is not None:
            z_at = z + origin * z_l
            dz_at = dz + origin * dz_l
        if out is not None:
            out_at = out + origin * channels
        if seq_idx is not None:
            seq_at = seq_idx + origin
        for part in range(0, parts - 1):
            states.index(part).store(h)
            for t in gl.static_range(T):
                a = gl.exp2(gl.expand_dims(row_of(deltas.index(part), t).load(channel), 1) * A2)
                entry = gl.expand_dims(row_of(inputs.index(part), t).load(channel), 1) * gl.expand_dims(
                    row_of(Bs.index(part), t).load(state), 0
                )
                if seq_idx is not None:
                    h = gl.where(kept(keeps.index(part), t, channel), h, 0.0)
                h = a * h + entry
        states.index(parts - 1).store(h)

        for part in range(parts - 1, -1, -1):
            q = chunk * PARTS + part
            here = direction * part * T
            before = here - direction * T
            behind = here - direction * CHUNK
            h = states.index(part).load(layout)
            hs = ()
            decays = ()
            for t in gl.static_range(T):
                a = gl.exp2(gl.expand_dims(row_of(deltas.index(part), t).load(channel), 1) * A2)
                entry = gl.expand_dims(row_of(inputs.index(part), t).load(channel), 1) * gl.expand_dims(
                    row_of(Bs.index(part), t).load(state), 0
                )
                hs += (h,)
                decays += (a,)
                if seq_idx is not None:
                    h = gl.where(kept(keeps.index(part), t, channel), h, 0.0)
                h = a * h + entry
            ys_part = ()
            sBs_part = ()
            throughs_part = ()
            share = ()
            present = gl.expand_dims(i_rows < count - q * T, 1) & in_row
            # The same part, which the compiler cannot know: what is read through it does not stay in registers.
            again = part + (length >> 31)
            for t in gl.static_range(T - 1, -1, -1):
                if t == LOADS_AT:
                    # Loads for the part before this one, and for this part of the chunk before, fly during the work.
                    valid = gl.expand_dims((i_rows >= 0) & (q > 0), 1) & in_row
                    u_next = load_tile(u_at, before, direction, u_l, d, valid, T, rows)
                    g_next = load_tile(dout_at, before, direction, dout_l, d, valid, T, rows)
                    z_next = g_next
                    if z is not None:
                        z_next = load_tile(z_at, before, direction, z_l, d, valid, T, rows)
                    valid = gl.expand_dims((i_rows >= 0) & (chunk > 0), 1) & in_row
                    inside = gl.expand_dims((i_vectors >= 0) & (chunk > 0), 1)
                    u_behind = load_tile(u_at, behind, direction, u_l, d, valid, T, rows)
                    delta_behind = load_tile(delta_at, behind, direction, delta_l, d, valid, T, rows)
                    B_behind = load_tile(B_at, behind, direction, B_l, n, inside, T, vectors)
                    C_behind = load_tile(C_at, behind, direction, C_l, n, inside, T, vectors)

                C_row = gl.expand_dims(row_of(Cs.index(part), t).load(state), 0)
                g_row = gl.expand_dims(row_of(gs, t).load(channel), 1)
                s = s + g_row * C_row
                ys_part += (gl.sum((h * C_row).reshape([BD, S, SPT]), axis=2),)
                dC_tile = h * g_row
                h = hs[t]
                B_row = gl.expand_dims(row_of(Bs.index(again if RELOAD & 1 else part), t).load(state), 0)
                sBs_part += (gl.sum((s * B_row).reshape([BD, S, SPT]), axis=2),)
                x_row = gl.expand_dims(row_of(inputs.index(again if RELOAD & 2 else part), t).load(channel), 1)
                share += (over_channels(s * x_row, dC_tile, BD, S, SPT, CPT, NW),)
                s = s * decays[t]
                # s_t times the decayed state, what both delta and A multiply.
                through = s * h
                if seq_idx is not None:
                    keep = kept(keeps.index(part), t, channel)
                    s = gl.where(keep, s, 0.0)
                    through = gl.where(keep, through, 0.0)
                dA_tile += (
                    gl.expand_dims(row_of(deltas.index(again if RELOAD & 4 else part), t).load(channel), 1) * through
                )
                throughs_part += (gl.sum((through * A2).reshape([BD, S, SPT]), axis=2),)

            dt = deltas.index(part).load(rows)
            g = gs.load(rows)
            ys.store(over_states(ys_part, T, BD, S))
            sBs.store(over_states(sBs_part, T, BD, S))
            throughs.store(over_states(throughs_part, T, BD, S))
            shares.store(stack_last(last_first(share)).reshape([NW, 2 * N, T]).permute((2, 0, 1)))
            sB = sBs.load(rows)
            x = u_now.to(gl.float32)
            y = ys.load(rows) + gl.expand_dims(skip, 0) * x
            if out is not None:
                at = here * channels + gl.expand_dims(i_rows * (direction * channels), 1) + gl.expand_dims(d, 0)
                gl.store(out_at + at, (y * gate_value).to(out.dtype.element_ty), mask=present)
            if z is not None:
                dz_tile = gate_slope * y
                at = here * dz_l + gl.expand_dims(i_rows * (direction * dz_l), 1) + gl.expand_dims(d, 0)
                gl.store(dz_at + at, dz_tile.to(dz.dtype.element_ty), mask=present)
            du_tile = gl.expand_dims(skip, 0) * g + dt * sB
            at = here * du_l + gl.expand_dims(i_rows * (direction * du_l), 1) + gl.expand_dims(d, 0)
            gl.store(du_at + at, du_tile.to(du.dtype.element_ty), mask=present)
            slope = x * sB + throughs.load(rows) * LN2
            if SOFTPLUS:
                # The derivative of softplus, 1 - exp(-dt), by its series where the difference cancels.
                series = dt * (1.0 - dt * (0.5 - dt * (0.1666666667 - dt * 0.0416666667)))
                slope *= gl.where(dt < 0.03, series, 1.0 - gl.exp2(-dt * LOG2E))
            at = here * channels + gl.expand_dims(i_rows * (direction * channels), 1) + gl.expand_dims(d, 0)
            gl.store(ddelta_at + at, slope.to(ddelta.dtype.element_ty), mask=present)
            if bias is not None:
                dbias_tile += gl.where(present, slope, 0.0)
            if D is not None:
                dD_tile += g * x

            # B's and C's gradients, summed over this program's channels.
            total = gl.sum(shares.load(sums), axis=1)
            i_sums = gl.arange(0, T, layout=gl.SliceLayout(1, gl.SliceLayout(1, sums)))
            n_sums = gl.arange(0, 2 * N, layout=gl.SliceLayout(0, gl.SliceLayout(1, sums)))
            at = (here + i_sums * direction) * (2 * N)
            in_part = gl.expand_dims(i_sums < count - q * T, 1)
            gl.store(dBC_at + gl.expand_dims(at, 1) + gl.expand_dims(n_sums, 0), total, mask=in_part)

            u_now = u_next
            g = g_next.to(gl.float32)
            gate_slope = g
            gate_value = gl.full([T, BD], 1.0, gl.float32, layout=rows)
            if z is not None:
                gate = z_next.to(gl.float32)
                opening = sigmoid(gate)
                gate_slope = g * (opening * (1.0 + gate * (1.0 - opening)))
                gate_value = gate * opening
                g = g * gate_value
            gs.store(g)
            dt, x = step_tile(delta_behind, u_behind, offset, valid, SOFTPLUS)
            deltas.index(part).store(dt)
            inputs.index(part).store(x)
            Bs.index(part).store(B_behind.to(gl.float32))
            Cs.index(part).store(C_behind.to(gl.float32))
            if seq_idx is not None:
                step = gl.where(chunk == 0, count, q * T - CHUNK)
                keep = load_keep(seq_at, behind, direction, direction, step, count, -start, T, rows)
                keeps.index(part).store(keep)

    at = (b * segments + segment) * row_states + tile
    gl.store(dA + at, dA_tile, mask=in_h)
    if dinitial is not None:
        gl.store(dinitial + b * row_states + tile, s, mask=in_h & (segment == 0))
    if bias is not None:
        gl.store(dbias + (b * segments + segment) * channels + d, gl.sum(dbias_tile, axis=0), mask=in_d)
    if D is not None:
        gl.store(dD + (b * segments + segment) * channels + d, gl.sum(dD_tile, axis=0), mask=in_d)


class Config(NamedTuple):
    """Steps a tile, channels and states a thread, warps a program; see gluon_common.py.

    reload: which rows the walk back reads anew instead of keeping them in registers: 1 B, 2 inputs, 4 step sizes, and
    sums of these.
    """

    steps: int = 8
    channels: int = 2
    states: int = 4
    warps: int = 8
    segments: int = 1
    reload: int = 1


# By state size. A thread's channels * states * steps fill its registers; four lanes at most share a channel.
CONFIGS = {
    4: Config(channels=1, warps=4),
    8: Config(warps=4),
    16: Config(),
    32: Config(channels=1, states=8),
    64: Config(steps=4, channels=1, states=16, warps=2),
    128: Config(steps=2, channels=1, states=32, warps=1),
}


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
    config: Config | None = None,
) -> tuple[Tensor | None, ...]:
    """As :func:`mambakit.kernels.scan.triton_backward.scan_backward`; du, dz: (B, L, D) tensors to write into."""
    batch, length, channels = u.shape
    d_state = A.shape[1]
    config = config or CONFIGS[d_state]
    dout, u, delta, z, B, C = (unit_stride(tensor) for tensor in (dout, u, delta, z, B, C))
    A32, dfinal_state = dense_float(A), dense_float(dfinal_state)
    D, delta_bias, seq_idx = unit_stride(D), unit_stride(delta_bias), unit_stride(seq_idx)
    shape = (batch, length, channels, d_state, group_count(B), group_count(C), direction == HALF)
    plan = cut(*shape, multiprocessors(u.device))
    tile = 32 * config.states // d_state * config.channels * config.warps
    blocks_per_group = -(-channels // plan.groups // tile)
    blocks = plan.groups * blocks_per_group
    chunks = -(-length // CHUNK)
    segment_length = -(-chunks // config.segments) * CHUNK
    segments = -(-length // segment_length)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    du = like(u) if du is None else du
    dz = like(z) if dz is None else dz
    ddelta = like(delta)
    out = like(u) if recompute_out else None
    dA_partial = empty(batch * segments, channels, d_state)
    dBC = empty(blocks, batch, length, 2, d_state)
    dD_partial, dbias_partial = (None if t is None else empty(batch * segments, channels) for t in (D, delta_bias))
    dinitial = None if initial_state is None else empty(batch, channels, d_state)
    with device_guard(u):
        products = ends = None
        if segments > 1:
            products, ends = segment_states(
                dout, delta, A32, C, z, delta_bias, seq_idx, delta_softplus, direction,
                plan._replace(segments=segments, segment_length=segment_length), plan.C_share, True,
            )  # fmt: skip
        launch(
            scan_backward_kernel, (batch * blocks * segments,),
            dout, dfinal_state, u, delta, A32, B, C, D, z, delta_bias, seq_idx, checkpoints, products, ends,
            du, ddelta, dz, out, dA_partial, dBC, dD_partial, dbias_partial, dinitial,
            length, channels, channels // plan.groups, blocks_per_group, blocks, plan.groups,
            plan.B_share, plan.C_share, segments, segment_length,
            *row_strides(u), *row_strides(delta), *row_strides(z), *row_strides(dout), *row_strides(du),
            *row_strides(dz), row_strides(seq_idx)[0], *vector_strides(B), *vector_strides(C),
            N=d_state, T=config.steps, CPT=config.channels, SPT=config.states, NW=config.warps, CHUNK=CHUNK,
            SOFTPLUS=delta_softplus, DIRECTION=direction, RELOAD=config.reload, num_warps=config.warps,
        )  # fmt: skip
        dB, dC, dA, dD, dbias = (like(tensor) for tensor in (B, C, A, D, delta_bias))
        add_partials(dBC, dA_partial, dD_partial, dbias_partial, dB, dC, dA, dD, dbias)
    if dinitial is not None and initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    gradients = du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial
    return (*gradients, out) if recompute_out else gradients


def like(tensor: Tensor | None) -> Any:
    """An empty contiguous tensor of the same shape and dtype; None for None."""
    return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
