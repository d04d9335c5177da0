"""The backward of ``ssd``.

With g the gradient of y (the output before its gate) and S_t that of the state h_t,

    S_t = g_t C_tᵀ + exp(a_{t+1}) S_{t+1},    dx_t = w_t S_t B_t,    dB_t = w_t S_tᵀ x_t,    dC_t = h_tᵀ g_t,

dw_t = x_t . S_t B_t and da_t = exp(a_t) <S_t, h_{t-1}>. States before and gradients behind each segment of time come
first (``triton_states``). Then a program takes one tile and some heads of one group in turn: from the borders of the
tile's segment it computes the state before the tile and the gradient behind it, and all else is attention inside the
tile. B and C are the group's, so the gradients of the scores C Bᵀ are added up over heads before they are multiplied
with B and C, once. Sums over programs are made in fixed order: two runs give the same bits.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.duality.triton_common import (
    decay_matrix,
    load_decays,
    load_rows,
    prepare,
    row_strides,
    scale,
    skip_strides,
    store_rows,
    tiling,
    unit_stride,
)
from mambakit.kernels.duality.triton_states import advance, join, load_slopes, own_states, retreat
from mambakit.kernels.launch import launch

# Tiles of a segment: states are kept where segments meet, and computed again inside them.
SEGMENT = 4
# Programs that keep an H200's 132 multiprocessors busy: fewer of them take more heads, and leave fewer parts to add up.
PROGRAMS = 512


@triton.jit(do_not_specialize=["length", "tiles", "segments", "blocks", "block_heads"])
def ssd_backward_kernel(
    dout, x, weights, logs, B, C, D, z, owners, befores, afters, dx, dweights, dlogs, dB, dC, dD, dz,
    length, heads, share, tiles, segments, blocks, block_heads,
    dout_b, dout_l, dout_h, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, D_h, D_p, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Every gradient of one tile of ``block_heads`` heads, which divide a group's. Grid (B * tiles * blocks,).

    befores, afters (B, segments, H, P, N): the state before, and the gradient behind, each segment. dB, dC
    (share // block_heads, B, L, G, N) and dD (B, tiles, H, P) are parts of sums; dx, dz, dweights and dlogs (B, L, H)
    are whole.
    """
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks % tiles
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    first_head = block * block_heads
    group = first_head // share
    segment = tile // SEGMENT
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, tiles)
    t0 = tile * Q
    i, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    inside = t0 + i < length
    place = p[:, None] * N + n[None, :]
    exists = (p < P)[:, None] & (n < N)[None, :]
    B += b * B_b + group.to(tl.int64) * B_g
    C += b * C_b + group.to(tl.int64) * C_g
    if owners is not None:
        owners += b * owner_b
    Bs = load_rows(B, t0, B_l, i, n, length, N, BN).to(OPERAND)
    Cs = load_rows(C, t0, C_l, i, n, length, N, BN).to(OPERAND)
    scores = tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION)
    dscores = tl.zeros([Q, Q], tl.float32)
    dB_sum = tl.zeros([Q, BN], tl.float32)
    dC_sum = tl.zeros([Q, BN], tl.float32)
    for head in tl.range(first_head, first_head + block_heads):
        wide_head = tl.cast(head, tl.int64)
        my_x = x + b * x_b + wide_head * x_h
        my_dout = dout + b * dout_b + wide_head * dout_h
        my_z = z
        if z is not None:
            my_z = z + b * z_b + wide_head * z_h
        my_weights = weights + (b * heads + head) * tiles * Q
        my_logs = logs + (b * heads + head) * tiles * Q

        border = ((b * segments + segment) * heads + head) * P * N
        state = tl.load(befores + border + place, mask=exists, other=0.0).to(tl.float32)
        for earlier in tl.range(first, tile):
            state, _ = advance(
                state, my_x, B, earlier * Q, x_l, B_l, my_weights, my_logs, owners, i, p, n, length,
                P, N, Q, BP, BN, OPERAND, PRECISION,
            )  # fmt: skip
        state = state.to(OPERAND)
        dstate = tl.load(afters + border + place, mask=exists, other=0.0).to(tl.float32)
        for later in tl.range(last - 1, tile, -1):
            dstate = retreat(
                dstate, my_dout, my_z, C, later * Q, dout_l, z_l, C_l, my_weights, my_logs, owners, i, p, n, length,
                P, N, Q, BP, BN, OPERAND, PRECISION,
            )  # fmt: skip

        log, weight, carry, to_end, through = load_decays(my_weights, my_logs, owners, t0, i, Q)
        dlog_end = scale(tl.sum(state.to(tl.float32) * dstate), through)
        dstate = dstate.to(OPERAND)
        inputs = load_rows(my_x, t0, x_l, i, p, length, P, BP)
        wide = inputs.to(tl.float32)
        slopes = load_slopes(my_dout, my_z, t0, dout_l, z_l, i, p, length, P, BP)
        narrow = slopes.to(OPERAND)
        decay = decay_matrix(log, owners, t0, i)
        mixed = scores * decay
        out_place = (b * length * heads + head) * P
        if D is not None:
            skip = tl.load(D + head * D_h + p * D_p, mask=p < P, other=0.0).to(tl.float32)

        # What reaches the outputs from before the tile, as in the forward.
        y = scale(tl.dot(Cs, tl.trans(state), input_precision=PRECISION), carry[:, None])
        dlog = tl.sum(y * slopes, axis=1)
        if z is not None:  # the rest of y, for the gate's gradient
            y = tl.dot((mixed * weight[None, :]).to(OPERAND), inputs.to(OPERAND), acc=y, input_precision=PRECISION)
            if D is not None:
                y += skip[None, :] * wide
            gate = load_rows(my_z, t0, z_l, i, p, length, P, BP).to(tl.float32)
            half = tl.sigmoid(gate)
            rise = half * (1.0 + gate * (1.0 - half))
            dgate = load_rows(my_dout, t0, dout_l, i, p, length, P, BP).to(tl.float32) * y * rise
            store_rows(dz + out_place, dgate, t0, heads * P, i, p, length, P, BP)

        # S_t B_t: what reaches x through the end of the tile, then also through its outputs.
        reach = tl.dot(Bs, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
        leaving = tl.sum(wide * reach, axis=1) * weight
        reach = tl.dot(tl.trans(mixed.to(OPERAND)), narrow, acc=reach, input_precision=PRECISION)
        dweight = tl.sum(wide * reach, axis=1)
        dinputs = reach * weight[:, None]
        if D is not None:
            dinputs += slopes * skip[None, :]
            dskip = dD + ((b * tiles + tile) * heads + head) * P + p
            tl.store(dskip, tl.sum(slopes * wide, axis=0), mask=p < P)
        store_rows(dx + out_place, dinputs, t0, heads * P, i, p, length, P, BP)

        dmixed = tl.dot(narrow, tl.trans(inputs.to(OPERAND)), input_precision=PRECISION) * decay * weight[None, :]
        dscores += dmixed
        between = dmixed * scores
        dlog += tl.sum(between, axis=1) - tl.sum(between, axis=0)
        if owners is None:
            carried = (slopes * carry[:, None]).to(OPERAND)
            dC_sum = tl.dot(carried, state, acc=dC_sum, input_precision=PRECISION)
        else:  # an infinite state of another sequence must be selected away
            dC_sum += scale(tl.dot(narrow, state, input_precision=PRECISION), carry[:, None])
        entry = (wide * (weight * to_end)[:, None]).to(OPERAND)
        dB_sum = tl.dot(entry, dstate, acc=dB_sum, input_precision=PRECISION)
        # a_t takes part in every decay from before t to t and later, and in those of the inputs before t to the end.
        dlog = tl.cumsum(dlog, axis=0, reverse=True) + (tl.cumsum(leaving, axis=0) - leaving) + dlog_end
        row = (b * length + t0 + i) * heads + head
        tl.store(dweights + row, dweight, mask=inside)
        tl.store(dlogs + row, dlog, mask=inside)

    narrow_dscores = dscores.to(OPERAND)
    dC_sum = tl.dot(narrow_dscores, Bs, acc=dC_sum, input_precision=PRECISION)
    dB_sum = tl.dot(tl.trans(narrow_dscores), Cs, acc=dB_sum, input_precision=PRECISION)
    groups = heads // share
    part_of_group = (first_head % share) // block_heads
    batch = tl.num_programs(0) // blocks // tiles
    vectors = ((part_of_group * batch + b) * length * groups + group) * N
    store_rows(dB + vectors, dB_sum, t0, groups * N, i, n, length, N, BN)
    store_rows(dC + vectors, dC_sum, t0, groups * N, i, n, length, N, BN)


def ssd_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """As :func:`mambakit.kernels.duality.chunked.ssd_backward`; starts and chunk_size are PyTorch's alone."""
    dout, x, B, C, z = (unit_stride(tensor) for tensor in (dout, x, B, C, z))
    batch, length, heads, channels = x.shape
    groups, d_state = B.shape[2:]
    share = heads // groups
    tile = tiling(x, B, C)
    device = x.device

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with torch.cuda.device_of(x):
        prepared = prepare(weights, log_decays, seq_idx, tile.Q)
        owners = prepared.owners
        tiles = triton.cdiv(length, tile.Q)
        segments = triton.cdiv(tiles, SEGMENT)
        kept = torch.bfloat16 if tile.operand == tl.bfloat16 else torch.float32
        befores, afters = (new(batch, segments, heads, channels, d_state, dtype=kept) for _ in range(2))
        throughs = new(batch, segments, heads)
        initial, dfinal = (None if t is None else t.contiguous() for t in (initial_state, dfinal_state))
        dinitial = None if initial is None else torch.empty_like(initial)
        own_states(x, None, B, prepared, tile, befores, throughs, SEGMENT, reverse=False)
        join(befores, throughs, initial, None, reverse=False)
        own_states(dout, z, C, prepared, tile, afters, throughs, SEGMENT, reverse=True)
        join(afters, throughs, dfinal, dinitial, reverse=True)

        dx = new(*x.shape, dtype=x.dtype)
        dz = None if z is None else new(*x.shape, dtype=z.dtype)
        dweights, dlogs = new(batch, length, heads), new(batch, length, heads)
        block_heads = heads_of_a_block(share, batch * tiles * groups)
        parts = share // block_heads
        dB, dC = (new(parts, *t.shape, dtype=t.dtype if parts == 1 else torch.float32) for t in (B, C))
        dD = None if D is None else new(batch, tiles, heads, channels)
        launch(
            ssd_backward_kernel, (batch * tiles * groups * parts,),
            dout, x, prepared.weights, prepared.logs, B, C, D, z, owners, befores, afters,
            dx, dweights, dlogs, dB, dC, dD, dz,
            length, heads, share, tiles, segments, groups * parts, block_heads,
            *row_strides(dout), *row_strides(x), *row_strides(B), *row_strides(C), *row_strides(z), *skip_strides(D),
            0 if owners is None else owners.stride(0),
            P=channels, N=d_state, Q=tile.Q, BP=tile.BP, BN=tile.BN, OPERAND=tile.operand, PRECISION=tile.precision,
            SEGMENT=SEGMENT, num_warps=8,
        )  # fmt: skip
    dB, dC = (total[0] if parts == 1 else total.sum(0).to(t.dtype) for total, t in ((dB, B), (dC, C)))
    if dD is not None and D is not None:
        dD = dD.sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
    return dx, dweights.to(weights.dtype), dlogs.to(log_decays.dtype), dB, dC, dD, dz, dinitial


def heads_of_a_block(share: int, others: int) -> int:
    """Heads that a program takes in turn: the most, dividing the ``share`` of a group, that leave PROGRAMS programs."""
    divisors = [heads for heads in range(share, 0, -1) if share % heads == 0]
    return next((heads for heads in divisors if others * (share // heads) >= PROGRAMS), 1)
