"""The backward scan in Gluon. With g_t the gradient of y_t before the gate, the gradient of the state h_t is

    s_t = C_t g_t + exp(delta_{t+1} A) s_{t+1},

a scan from the end. Read gluon_common.py's head first.

A program walks its chunks of CHUNK steps from the last. It sweeps a chunk forwards from the stored state before it, and
leaves in shared memory the state before every part of T steps; then it takes the parts from the last: recomputes T
states and decays into registers and walks them back. Step sizes and inputs of a whole chunk lie in shared memory; as
soon as a part is done, the same part of the chunk before takes its place. Loads are issued half a part ahead, where the
walk back begins to free registers.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated, attr-defined, no-untyped-call, operator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from mambakit.kernels.scan.gluon_common import (
    LN2,
    LOG2E,
    direction_of,
    load_keep,
    load_tile,
    plain_shared,
    position_of,
    row_of,
    sigmoid,
    state_layout,
    step_size,
    tile_layout,
)
from mambakit.kernels.scan.gluon_sums import last_first, over_channels, over_states, stack_last


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
    dt = step_size(delta_tile, offset, valid, SOFTPLUS)
    return dt, dt * u_tile.to(gl.float32)


@gluon.jit
def gate_tiles(dout_tile, z_tile, z):
    """(gradient of y, what y is multiplied by in dz, what y is multiplied by in out), each [T, BD] float32."""
    g = dout_tile.to(gl.float32)
    slope = g
    factor = gl.full(g.shape, 1.0, gl.float32, layout=g.type.layout)
    if z is not None:
        gate = z_tile.to(gl.float32)
        opening = sigmoid(gate)
        slope = g * (opening * (1.0 + gate * (1.0 - opening)))
        factor = gate * opening
        g = g * factor
    return g, slope, factor


@gluon.jit
def store_tile(pointer, position, sense, stride, column, value, mask, T: gl.constexpr, layout: gl.constexpr):
    """``load_tile``'s counterpart."""
    i = gl.arange(0, T, layout=gl.SliceLayout(1, layout))
    offset = gl.expand_dims(i * (sense * stride), 1) + gl.expand_dims(column, 0)
    gl.store(pointer + position * stride + offset, value.to(pointer.dtype.element_ty), mask=mask)


@gluon.jit
def scan_backward_kernel(
    dout, dfinal, u, delta, A, B, C, D, z, bias, seq_idx, checkpoints, products, ends,
    du, ddelta, dz, out, dA, dBC, dD, dbias, dinitial,
    length, channels, group_channels, blocks_per_group, blocks, groups, B_share, C_share, segments, segment_length,
    u_b, u_l, delta_b, delta_l, z_b, z_l, dout_b, dout_l, du_b, du_l, dz_b, dz_l, seq_b,
    B_b, B_l, B_g, C_b, C_l, C_g,
    N: gl.constexpr, T: gl.constexpr, CPT: gl.constexpr, SPT: gl.constexpr, NW: gl.constexpr, CHUNK: gl.constexpr,
    SOFTPLUS: gl.constexpr, DIRECTION: gl.constexpr,
):  # fmt: skip
    """One tile of channels of one batch row over one segment. Grid (batch * blocks * segments,), segments fastest.

    ``products``, ``ends`` (batch, segments, D, N): see ``segment_states_kernel``, BACKWARD; None with one segment.
    Written whole: du, ddelta, dz, and where given out (B, L, D); and partial sums, added up by the caller: by tile of
    channels dB and dC, dBC (blocks, B, L, 2, N); by batch row and segment dA (D, N), dD and dbias (D,).
    """
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
    position = position_of(start.to(gl.int64), length, direction, DIRECTION)

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
    g_next = load_tile(dout, origin, direction, dout_l, d, valid, T, rows)
    z_next = g_next
    if z is not None:
        z_next = load_tile(z, origin, direction, z_l, d, valid, T, rows)
    g, gate_slope, gate_factor = gate_tiles(g_next, z_next, z)
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
                B_row = gl.expand_dims(row_of(Bs.index(again), t).load(state), 0)
                sBs_part += (gl.sum((s * B_row).reshape([BD, S, SPT]), axis=2),)
                x_row = gl.expand_dims(row_of(inputs.index(again), t).load(channel), 1)
                share += (over_channels(s * x_row, dC_tile, BD, S, SPT, CPT, NW),)
                s = s * decays[t]
                # s_t times the decayed state, what both delta and A multiply.
                through = s * h
                if seq_idx is not None:
                    keep = kept(keeps.index(part), t, channel)
                    s = gl.where(keep, s, 0.0)
                    through = gl.where(keep, through, 0.0)
                dA_tile += gl.expand_dims(row_of(deltas.index(again), t).load(channel), 1) * through
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
                store_tile(out_at, here, direction, channels, d, y * gate_factor, present, T, rows)
            if z is not None:
                store_tile(dz_at, here, direction, dz_l, d, gate_slope * y, present, T, rows)
            du_tile = gl.expand_dims(skip, 0) * g + dt * sB
            store_tile(du_at, here, direction, du_l, d, du_tile, present, T, rows)
            slope = x * sB + throughs.load(rows) * LN2
            if SOFTPLUS:
                # The derivative of softplus, 1 - exp(-dt), by its series where the difference cancels.
                series = dt * (1.0 - dt * (0.5 - dt * (0.1666666667 - dt * 0.0416666667)))
                slope *= gl.where(dt < 0.03, series, 1.0 - gl.exp2(-dt * LOG2E))
            store_tile(ddelta_at, here, direction, channels, d, slope, present, T, rows)
            if bias is not None:
                dbias_tile += gl.where(present, slope, 0.0)
            if D is not None:
                dD_tile += g * x

            # B's and C's gradients, summed over this program's channels.
            total = gl.sum(shares.load(sums), axis=1)
            i_sums = gl.arange(0, T, layout=gl.SliceLayout(1, gl.SliceLayout(1, sums)))
            n_sums = gl.arange(0, 2 * N, layout=gl.SliceLayout(0, gl.SliceLayout(1, sums)))
            in_line = (here + i_sums * direction) * (2 * N)
            in_part = gl.expand_dims(i_sums < count - q * T, 1)
            at = dBC_at + gl.expand_dims(in_line, 1) + gl.expand_dims(n_sums, 0)
            gl.store(at, total.to(dBC.dtype.element_ty), mask=in_part)

            u_now = u_next
            g, gate_slope, gate_factor = gate_tiles(g_next, z_next, z)
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
