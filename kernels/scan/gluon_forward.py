"""The forward scan in Gluon: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t h_t + D u_t,  out = y silu(z).

Read gluon_common.py's head first. ``segment_states`` walks a segment of time for its end state alone; programs of the
scan proper then start in mid-sequence from the states of the segments before theirs.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated, attr-defined, no-untyped-call, operator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambakit.kernels.scan.gluon_common import (
    LOG2E,
    direction_of,
    load_keep,
    load_tile,
    plain_shared,
    position_of,
    row_of,
    sigmoid,
    stack,
    state_layout,
    step_size,
    tile_layout,
)


@gluon.jit
def load_step_tiles(
    u, delta, z, B, C, u_l, delta_l, z_l, B_l, C_l, d, in_d, n, position, sense, left,
    T: gl.constexpr, rows: gl.constexpr, vectors: gl.constexpr,
):  # fmt: skip
    """What T steps from ``position`` read, ``left`` of them inside the segment: u, delta, z [T, BD]; B, C [T, N]."""
    valid = gl.expand_dims(gl.arange(0, T, layout=gl.SliceLayout(1, rows)) < left, 1) & gl.expand_dims(in_d, 0)
    inside = gl.expand_dims(gl.arange(0, T, layout=gl.SliceLayout(1, vectors)) < left, 1)
    u_tile = load_tile(u, position, sense, u_l, d, valid, T, rows)
    delta_tile = load_tile(delta, position, sense, delta_l, d, valid, T, rows)
    z_tile = u_tile
    if z is not None:
        z_tile = load_tile(z, position, sense, z_l, d, valid, T, rows)
    B_tile = load_tile(B, position, sense, B_l, n, inside, T, vectors)
    C_tile = B_tile
    if C is not None:
        C_tile = load_tile(C, position, sense, C_l, n, inside, T, vectors)
    return u_tile, delta_tile, z_tile, B_tile, C_tile


@gluon.jit
def scan_forward_kernel(
    u, delta, A, B, C, D, z, bias, initial, seq_idx, products, ends, out, final, checkpoints,
    length, channels, group_channels, blocks_per_group, blocks, groups, B_share, C_share, segments, segment_length,
    u_b, u_l, delta_b, delta_l, z_b, z_l, seq_b, B_b, B_l, B_g, C_b, C_l, C_g,
    N: gl.constexpr, T: gl.constexpr, CPT: gl.constexpr, SPT: gl.constexpr, NW: gl.constexpr, CHUNK: gl.constexpr,
    SOFTPLUS: gl.constexpr, DIRECTION: gl.constexpr,
):  # fmt: skip
    """One tile of channels of one batch row over one segment. Grid (batch * blocks * segments,), segments fastest.

    ``products``, ``ends`` (batch, segments, D, N): see ``segment_states_kernel``; None with one segment.
    """
    layout: gl.constexpr = state_layout(N, CPT, NW, SPT)
    BD: gl.constexpr = 32 // (N // SPT) * CPT * NW
    rows: gl.constexpr = tile_layout(T, BD, NW)
    vectors: gl.constexpr = tile_layout(T, N, NW)
    channel: gl.constexpr = gl.SliceLayout(1, layout)
    state: gl.constexpr = gl.SliceLayout(0, layout)

    segment = gl.program_id(0) % segments
    block = gl.program_id(0) // segments % blocks
    b = (gl.program_id(0) // segments // blocks).to(gl.int64)
    group = block // blocks_per_group
    start_d = block % blocks_per_group * BD
    direction = direction_of(group, groups, DIRECTION)
    local = start_d + gl.arange(0, BD, layout=gl.SliceLayout(0, rows))
    in_d = local < group_channels
    d = group * group_channels + local
    n = gl.arange(0, N, layout=gl.SliceLayout(0, vectors))
    local_h = start_d + gl.arange(0, BD, layout=channel)
    in_h = gl.expand_dims(local_h < group_channels, 1)
    tile = gl.expand_dims(group * group_channels + local_h, 1) * N + gl.expand_dims(gl.arange(0, N, layout=state), 0)
    row_states = channels * N  # elements of one (D, N) state

    u += b * u_b
    delta += b * delta_b
    out += b * length * channels
    if z is not None:
        z += b * z_b
    if seq_idx is not None:
        seq_idx += b * seq_b
    B += b * B_b + (group // B_share).to(gl.int64) * B_g
    C += b * C_b + (group // C_share).to(gl.int64) * C_g
    A2 = gl.load(A + tile, mask=in_h, other=0.0) * LOG2E
    offset = gl.zeros([BD], gl.float32, layout=gl.SliceLayout(0, rows))
    skip = gl.zeros([BD], gl.float32, layout=gl.SliceLayout(0, rows))
    if bias is not None:
        offset = gl.load(bias + d, mask=in_d, other=0.0).to(gl.float32)
    if D is not None:
        skip = gl.load(D + d, mask=in_d, other=0.0).to(gl.float32)
    h = gl.zeros([BD, N], gl.float32, layout=layout)
    if initial is not None:
        h = gl.load(initial + b * row_states + tile, mask=in_h, other=0.0).to(gl.float32)
    if products is not None:
        for earlier in range(0, segment):
            slot = (b * segments + earlier) * row_states + tile
            decay = gl.load(products + slot, mask=in_h, other=0.0)
            h = decay * h + gl.load(ends + slot, mask=in_h, other=0.0)

    start = segment * segment_length
    count = gl.minimum(segment_length, length - start)
    position = position_of(start.to(gl.int64), length, direction, DIRECTION)
    checkpoints += (b * ((length + CHUNK - 1) // CHUNK) + start // CHUNK) * row_states

    deltas = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    inputs = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    outputs = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    Bs = gl.allocate_shared_memory(gl.float32, [T, N], plain_shared())
    Cs = gl.allocate_shared_memory(gl.float32, [T, N], plain_shared())
    if seq_idx is not None:
        keeps = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    i_rows = gl.arange(0, T, layout=gl.SliceLayout(1, rows))
    out_offset = gl.expand_dims(i_rows * (direction * channels), 1) + gl.expand_dims(d, 0)
    ahead = load_step_tiles(
        u, delta, z, B, C, u_l, delta_l, z_l, B_l, C_l, d, in_d, n, position, direction, count, T, rows, vectors
    )
    for step in range(0, count, T):
        u_tile, delta_tile, z_tile, B_tile, C_tile = ahead
        valid = gl.expand_dims(i_rows < count - step, 1) & gl.expand_dims(in_d, 0)
        x = u_tile.to(gl.float32)
        dt = step_size(delta_tile, offset, valid, SOFTPLUS)
        deltas.store(dt)
        inputs.store(dt * x)
        Bs.store(B_tile.to(gl.float32))
        Cs.store(C_tile.to(gl.float32))
        here = position + direction * step
        if seq_idx is not None:
            keep = load_keep(seq_idx, here, direction, direction, step, count, -start, T, rows)
            keeps.store(gl.zeros([T, BD], gl.float32, layout=rows) + keep)
        # The next tile's loads fly during this tile's arithmetic.
        ahead = load_step_tiles(
            u, delta, z, B, C, u_l, delta_l, z_l, B_l, C_l, d, in_d, n, here + direction * T, direction,
            count - step - T, T, rows, vectors,
        )  # fmt: skip
        if step % CHUNK == 0:
            gl.store(checkpoints + (step // CHUNK).to(gl.int64) * row_states + tile, h, mask=in_h)
        ys = ()
        for i in gl.static_range(T):
            a = gl.exp2(gl.expand_dims(row_of(deltas, i).load(channel), 1) * A2)
            if seq_idx is not None:
                h = gl.where(gl.expand_dims(row_of(keeps, i).load(channel), 1) > 0.0, h, 0.0)
            entry = gl.expand_dims(row_of(inputs, i).load(channel), 1) * gl.expand_dims(row_of(Bs, i).load(state), 0)
            h = a * h + entry
            ys += (gl.sum(h * gl.expand_dims(row_of(Cs, i).load(state), 0), axis=1),)
        outputs.store(stack(ys, T, BD))
        y = outputs.load(rows) + gl.expand_dims(skip, 0) * x
        if z is not None:
            gate = z_tile.to(gl.float32)
            y *= gate * sigmoid(gate)
        gl.store(out + here * channels + out_offset, y.to(out.dtype.element_ty), mask=valid)
    if segment == segments - 1:
        gl.store(final + b * row_states + tile, h, mask=in_h)


@gluon.jit
def segment_states_kernel(
    x, delta, A, V, z, bias, seq_idx, products, ends,
    length, channels, group_channels, blocks_per_group, blocks, groups, V_share, segments, segment_length,
    x_b, x_l, delta_b, delta_l, z_b, z_l, seq_b, V_b, V_l, V_g,
    N: gl.constexpr, T: gl.constexpr, CPT: gl.constexpr, SPT: gl.constexpr, NW: gl.constexpr,
    SOFTPLUS: gl.constexpr, DIRECTION: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """What a segment makes of the state that enters it: end = products * start + ends, both (batch, segments, D, N).

    Forward (x is u, V is B): h_t = a_t h_{t-1} + delta_t B_t u_t from 0 at the segment's first step.
    BACKWARD (x is dout, V is C): r_t = a_t (r_{t+1} + g_t C_t), g = dout silu(z), from 0 after its last step: the
    gradient that leaves the segment towards earlier steps. Grid (batch * blocks * segments,).
    """
    layout: gl.constexpr = state_layout(N, CPT, NW, SPT)
    BD: gl.constexpr = 32 // (N // SPT) * CPT * NW
    rows: gl.constexpr = tile_layout(T, BD, NW)
    vectors: gl.constexpr = tile_layout(T, N, NW)
    channel: gl.constexpr = gl.SliceLayout(1, layout)
    state: gl.constexpr = gl.SliceLayout(0, layout)

    segment = gl.program_id(0) % segments
    block = gl.program_id(0) // segments % blocks
    b = (gl.program_id(0) // segments // blocks).to(gl.int64)
    group = block // blocks_per_group
    start_d = block % blocks_per_group * BD
    direction = direction_of(group, groups, DIRECTION)
    local = start_d + gl.arange(0, BD, layout=gl.SliceLayout(0, rows))
    in_d = local < group_channels
    d = group * group_channels + local
    n = gl.arange(0, N, layout=gl.SliceLayout(0, vectors))
    local_h = start_d + gl.arange(0, BD, layout=channel)
    in_h = gl.expand_dims(local_h < group_channels, 1)
    tile = gl.expand_dims(group * group_channels + local_h, 1) * N + gl.expand_dims(gl.arange(0, N, layout=state), 0)
    row_states = channels * N

    x += b * x_b
    delta += b * delta_b
    if z is not None:
        z += b * z_b
    if seq_idx is not None:
        seq_idx += b * seq_b
    V += b * V_b + (group // V_share).to(gl.int64) * V_g
    A2 = gl.load(A + tile, mask=in_h, other=0.0) * LOG2E
    offset = gl.zeros([BD], gl.float32, layout=gl.SliceLayout(0, rows))
    if bias is not None:
        offset = gl.load(bias + d, mask=in_d, other=0.0).to(gl.float32)
    h = gl.zeros([BD, N], gl.float32, layout=layout)
    total = gl.zeros([BD], gl.float32, layout=channel)
    alive = gl.zeros([BD], gl.float32, layout=channel) + 1.0

    start = segment * segment_length
    count = gl.minimum(segment_length, length - start)
    # Step number i of this walk is scan step start + i, or from the segment's end start + count - 1 - i.
    origin = start.to(gl.int64)
    sense = direction
    first_step = -start
    if BACKWARD:
        origin += count - 1
        sense = -direction
        first_step = start + count - 1
    position = position_of(origin, length, direction, DIRECTION)

    deltas = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    inputs = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    Vs = gl.allocate_shared_memory(gl.float32, [T, N], plain_shared())
    if seq_idx is not None:
        keeps = gl.allocate_shared_memory(gl.float32, [T, BD], plain_shared())
    i_rows = gl.arange(0, T, layout=gl.SliceLayout(1, rows))
    ahead = load_step_tiles(
        x, delta, z, V, None, x_l, delta_l, z_l, V_l, 0, d, in_d, n, position, sense, count, T, rows, vectors
    )
    for step in range(0, count, T):
        x_tile, delta_tile, z_tile, V_tile, _ = ahead
        valid = gl.expand_dims(i_rows < count - step, 1) & gl.expand_dims(in_d, 0)
        dt = step_size(delta_tile, offset, valid, SOFTPLUS)
        deltas.store(dt)
        value = x_tile.to(gl.float32)
        if BACKWARD:
            if z is not None:
                gate = z_tile.to(gl.float32)
                value *= gate * sigmoid(gate)
        else:
            value *= dt
        inputs.store(value)
        Vs.store(V_tile.to(gl.float32))
        here = position + sense * step
        if seq_idx is not None:
            keep = load_keep(seq_idx, here, sense, direction, step, count, first_step, T, rows)
            keeps.store(gl.zeros([T, BD], gl.float32, layout=rows) + keep)
        ahead = load_step_tiles(
            x, delta, z, V, None, x_l, delta_l, z_l, V_l, 0, d, in_d, n, here + sense * T, sense, count - step - T,
            T, rows, vectors,
        )  # fmt: skip
        for i in gl.static_range(T):
            dt_row = row_of(deltas, i).load(channel)
            total += dt_row
            a = gl.exp2(gl.expand_dims(dt_row, 1) * A2)
            entry = gl.expand_dims(row_of(inputs, i).load(channel), 1) * gl.expand_dims(row_of(Vs, i).load(state), 0)
            if seq_idx is not None:
                keep_row = row_of(keeps, i).load(channel)
                alive *= keep_row
                kept = gl.expand_dims(keep_row, 1) > 0.0
            if BACKWARD:
                h = a * (h + entry)
                if seq_idx is not None:
                    h = gl.where(kept, h, 0.0)
            else:
                if seq_idx is not None:
                    h = gl.where(kept, h, 0.0)
                h = a * h + entry
    slot = (b * segments + segment) * row_states + tile
    product = gl.exp2(gl.expand_dims(total, 1) * A2)
    if seq_idx is not None:
        product = gl.where(gl.expand_dims(alive, 1) > 0.0, product, 0.0)
    gl.store(products + slot, product, mask=in_h)
    gl.store(ends + slot, h, mask=in_h)
