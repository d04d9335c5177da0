"""The backward of ``ssd``.

With g the gradient of y (the output before its gate) and S_t that of the state h_t,

    S_t = g_t C_tᵀ + exp(a_{t+1}) S_{t+1},    dx_t = w_t S_t B_t,    dB_t = w_t S_tᵀ x_t,    dC_t = h_tᵀ g_t,

dw_t = x_t . S_t B_t and da_t = exp(a_t) <S_t, h_{t-1}>. The state before each tile and the gradient behind it are made
first (``triton_states``); all else is attention inside the tile. One kernel takes a tile of one head and writes the
gradients of x, z, w and a; another takes a tile of several heads of a group and adds up the gradient of B, or of C.
There the gradients of the scores C Bᵀ are added up over heads before they are multiplied with C or B, once.

Heads are taken in parts one after another, so that the states kept at once stay few. Sums are made in fixed order: two
runs give the same bits.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.duality.triton_common import (
    ceil_div,
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
from mambakit.kernels.duality.triton_states import Segments, load_slopes
from mambakit.kernels.launch import launch

# Numbers of the states kept at once, before and behind: twice as many as x has, within these bounds. Beyond that, heads
# are taken in parts.
LEAST_KEPT, MOST_KEPT = 1 << 25, 1 << 27
# Programs that keep an H200's 132 multiprocessors busy: fewer of them take more heads, and leave fewer parts to add up.
PROGRAMS = 256
# Programs with which the walks that make the states cut no time, see ``Segments``.
ENOUGH = 100


@triton.jit(do_not_specialize=["length", "first_head", "tiles", "share"])
def input_gradients_kernel(
    dout, x, weights, logs, B, C, D, z, owners, befores, afters, dx, dweights, dlogs, dD, dz,
    length, heads, first_head, share, tiles,
    dout_b, dout_l, dout_h, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, D_h, D_p,
    dx_b, dx_l, dz_b, dz_l, dw_b, dw_l, dD_b, dD_t, row_b, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x, z, weights and log decays, and a tile's part of D's, for ``heads`` of all H from first_head on.

    Grid (B * tiles * heads,). befores, afters (B, tiles, heads, P, N): the state before each tile, the gradient behind.
    A step's heads lie side by side in dx and dz; dweights and dlogs (B, L, H) share their strides; dD (B, tiles, H, P).
    """
    local_head = tl.program_id(0) % heads
    head = first_head + local_head
    tile = tl.program_id(0) // heads % tiles
    b = (tl.program_id(0) // heads // tiles).to(tl.int64)
    wide_head = head.to(tl.int64)
    t0 = tile * Q
    i, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    x += b * x_b + wide_head * x_h
    dout += b * dout_b + wide_head * dout_h
    B += b * B_b + (head // share).to(tl.int64) * B_g
    C += b * C_b + (head // share).to(tl.int64) * C_g
    weights += b * row_b + wide_head * tiles * Q
    logs += b * row_b + wide_head * tiles * Q
    border = ((b * tiles + tile) * heads + local_head) * P * N + p[:, None] * N + n[None, :]
    exists = (p < P)[:, None] & (n < N)[None, :]
    if z is not None:
        z += b * z_b + wide_head * z_h
    if owners is not None:
        owners += b * owner_b

    log, weight, carry, to_end, through = load_decays(weights, logs, owners, t0, i, Q)
    state = tl.load(befores + border, mask=exists, other=0.0)
    dstate = tl.load(afters + border, mask=exists, other=0.0)
    dlog_end = scale(tl.sum(state.to(tl.float32) * dstate.to(tl.float32)), through)
    Bs = load_rows(B, t0, B_l, i, n, length, N, BN).to(OPERAND)
    Cs = load_rows(C, t0, C_l, i, n, length, N, BN).to(OPERAND)
    inputs = load_rows(x, t0, x_l, i, p, length, P, BP)
    wide = inputs.to(tl.float32)
    slopes = load_slopes(dout, z, t0, dout_l, z_l, i, p, length, P, BP)
    narrow = slopes.to(OPERAND)
    if D is not None:
        skip = tl.load(D + head * D_h + p * D_p, mask=p < P, other=0.0).to(tl.float32)
        tl.store(dD + b * dD_b + tile * dD_t + head * P + p, tl.sum(slopes * wide, axis=0), mask=p < P)

    # What reaches the outputs from before the tile, as in the forward.
    y = scale(tl.dot(Cs, tl.trans(state), input_precision=PRECISION), carry[:, None])
    dlog = tl.sum(y * slopes, axis=1)
    # S_t B_t: what reaches x through the end of the tile, then also through its outputs.
    reach = tl.dot(Bs, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
    leaving = tl.sum(wide * reach, axis=1) * weight
    scores = tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION)
    decay = decay_matrix(log, owners, t0, i)
    mixed = scores * decay
    if z is not None:  # the rest of y, for the gate's gradient
        y = tl.dot((mixed * weight[None, :]).to(OPERAND), inputs.to(OPERAND), acc=y, input_precision=PRECISION)
        if D is not None:
            y += skip[None, :] * wide
        gate = load_rows(z, t0, z_l, i, p, length, P, BP).to(tl.float32)
        half = tl.sigmoid(gate)
        rise = half * (1.0 + gate * (1.0 - half))
        dgate = load_rows(dout, t0, dout_l, i, p, length, P, BP).to(tl.float32) * y * rise
        store_rows(dz + b * dz_b + head * P, dgate, t0, dz_l, i, p, length, P, BP)
    reach = tl.dot(tl.trans(mixed.to(OPERAND)), narrow, acc=reach, input_precision=PRECISION)
    dweight = tl.sum(wide * reach, axis=1)
    dinputs = reach * weight[:, None]
    if D is not None:
        dinputs += slopes * skip[None, :]
    store_rows(dx + b * dx_b + head * P, dinputs, t0, dx_l, i, p, length, P, BP)

    pairs = tl.dot(narrow, tl.trans(inputs.to(OPERAND)), input_precision=PRECISION) * mixed * weight[None, :]
    dlog += tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
    # a_t takes part in every decay from before t to t and later, and in those of the inputs before t to the end.
    dlog = tl.cumsum(dlog, axis=0, reverse=True) + (tl.cumsum(leaving, axis=0) - leaving) + dlog_end
    row = b * dw_b + (t0 + i).to(tl.int64) * dw_l + head
    tl.store(dweights + row, dweight, mask=t0 + i < length)
    tl.store(dlogs + row, dlog, mask=t0 + i < length)


@triton.jit
def add_heads(
    dout, x, weights, logs, vectors, z, owners, states, sums, dvectors, block, tile, b,
    length, heads, first_head, share, tiles, block_heads,
    dout_b, dout_l, dout_h, x_b, x_l, x_h, v_b, v_l, v_g, z_b, z_l, z_h, sum_part, sum_b, sum_l, sum_g,
    dv_part, dv_b, dv_l, dv_g, row_b, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, OF_B: tl.constexpr,
):  # fmt: skip
    """The gradient of C at one tile from B (``vectors``) and the states before; OF_B: B's from C and what is behind."""
    first = first_head + block * block_heads
    group = (first // share).to(tl.int64)
    part = first % share % heads // block_heads
    t0 = tile * Q
    i, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    exists = (p < P)[:, None] & (n < N)[None, :]
    vectors += b * v_b + group * v_g
    dvectors += part.to(tl.int64) * dv_part + b * dv_b + group * dv_g
    if sums is not None:
        sums += part.to(tl.int64) * sum_part + b * sum_b + group * sum_g
    if owners is not None:
        owners += b * owner_b
    total = tl.zeros([Q, BN], tl.float32)
    dscores = tl.zeros([Q, Q], tl.float32)
    for head in tl.range(first, first + block_heads):
        wide_head = tl.cast(head, tl.int64)
        my_z = z
        if z is not None:
            my_z = z + b * z_b + wide_head * z_h
        rows = b * row_b + wide_head * tiles * Q
        log, weight, carry, to_end, _ = load_decays(weights + rows, logs + rows, owners, t0, i, Q)
        inputs = load_rows(x + b * x_b + wide_head * x_h, t0, x_l, i, p, length, P, BP)
        my_dout = dout + b * dout_b + wide_head * dout_h
        slopes = load_slopes(my_dout, my_z, t0, dout_l, z_l, i, p, length, P, BP)
        border = ((b * tiles + tile) * heads + head - first_head) * P * N + p[:, None] * N + n[None, :]
        state = tl.load(states + border, mask=exists, other=0.0)
        decay = decay_matrix(log, owners, t0, i, OF_B)
        if OF_B:
            scaled = (inputs * (weight * to_end)[:, None]).to(OPERAND)
            total = tl.dot(scaled, state, acc=total, input_precision=PRECISION)
            pairs = tl.dot(inputs.to(OPERAND), tl.trans(slopes.to(OPERAND)), input_precision=PRECISION)
            dscores += pairs * decay * weight[:, None]
        else:
            if owners is None:
                scaled = (slopes * carry[:, None]).to(OPERAND)
                total = tl.dot(scaled, state, acc=total, input_precision=PRECISION)
            else:  # an infinite state of another sequence must be selected away
                carried = tl.dot(slopes.to(OPERAND), state, input_precision=PRECISION)
                total += scale(carried, carry[:, None])
            pairs = tl.dot(slopes.to(OPERAND), tl.trans(inputs.to(OPERAND)), input_precision=PRECISION)
            dscores += pairs * decay * weight[None, :]
    there = load_rows(vectors, t0, v_l, i, n, length, N, BN).to(OPERAND)
    total = tl.dot(dscores.to(OPERAND), there, acc=total, input_precision=PRECISION)
    if sums is not None:
        total += load_rows(sums, t0, sum_l, i, n, length, N, BN)
    store_rows(dvectors, total, t0, dv_l, i, n, length, N, BN)


@triton.jit(do_not_specialize=["length", "first_head", "tiles", "share", "blocks", "block_heads", "count"])
def vector_gradients_kernel(
    dout, x, weights, logs, B, C, z, owners, befores, afters, sum_B, sum_C, dB, dC,
    length, heads, first_head, share, tiles, blocks, block_heads, count,
    dout_b, dout_l, dout_h, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h,
    sum_part, sum_b, sum_l, sum_g, dv_part, dv_b, dv_l, dv_g, row_b, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C at one tile, summed over ``block_heads`` heads of a group, from first_head on.

    The first ``count`` = B * tiles * blocks programs compute C's, as many more B's. dB, dC (parts, B, L, G, N), of the
    same strides: the blocks of a group write a part each. sum_B, sum_C, of such a shape: sums over the heads before.
    """
    program = tl.program_id(0) % count
    block = program % blocks
    tile = program // blocks % tiles
    b = (program // blocks // tiles).to(tl.int64)
    if tl.program_id(0) < count:
        add_heads(
            dout, x, weights, logs, B, z, owners, befores, sum_C, dC, block, tile, b,
            length, heads, first_head, share, tiles, block_heads,
            dout_b, dout_l, dout_h, x_b, x_l, x_h, B_b, B_l, B_g, z_b, z_l, z_h,
            sum_part, sum_b, sum_l, sum_g, dv_part, dv_b, dv_l, dv_g, row_b, owner_b,
            P, N, Q, BP, BN, OPERAND, PRECISION, False,
        )  # fmt: skip
    else:
        add_heads(
            dout, x, weights, logs, C, z, owners, afters, sum_B, dB, block, tile, b,
            length, heads, first_head, share, tiles, block_heads,
            dout_b, dout_l, dout_h, x_b, x_l, x_h, C_b, C_l, C_g, z_b, z_l, z_h,
            sum_part, sum_b, sum_l, sum_g, dv_part, dv_b, dv_l, dv_g, row_b, owner_b,
            P, N, Q, BP, BN, OPERAND, PRECISION, True,
        )  # fmt: skip


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
    out: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """As :func:`mambakit.kernels.duality.chunked.ssd_backward`; starts and chunk_size are PyTorch's alone."""
    dout, x, B, C, z = (unit_stride(tensor) for tensor in (dout, x, B, C, z))
    batch, length, heads, channels = x.shape
    groups, d_state = B.shape[2:]
    tile = tiling(x, B, C)
    tiles, share = ceil_div(length, tile.Q), heads // groups

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    with torch.cuda.device_of(x):
        prepared = prepare(weights, log_decays, seq_idx, tile.Q)
        owners = prepared.owners
        if out is None:
            out = (*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C)), None)
        dx, dB, dC, dz = out
        if z is not None and dz is None:
            dz = new(*x.shape, dtype=z.dtype)
        dweights, dlogs = new(batch, length, heads), new(batch, length, heads)
        dD = None if D is None else new(batch, tiles, heads, channels)
        initial, dfinal = (None if t is None else t.contiguous() for t in (initial_state, dfinal_state))
        dinitial = None if initial is None else torch.empty_like(initial)
        states = 2 * batch * tiles * channels * d_state  # of one head
        at_once = heads_at_once(heads, share, max(LEAST_KEPT, min(2 * x.numel(), MOST_KEPT)) // states)
        some = min(share, at_once)
        block_heads = heads_of_a_block(some, batch * tiles * (at_once // some))
        parts, blocks = some // block_heads, at_once // block_heads
        # Sums over the heads of a group that more than one program makes; the last writes the gradients themselves.
        sums: Any = (None, None) if parts == 1 and some == share else (new(parts, *B.shape), new(parts, *C.shape))
        kept = torch.bfloat16 if tile.operand == tl.bfloat16 else torch.float32
        befores, afters = (new(batch, tiles, at_once, channels, d_state, dtype=kept) for _ in range(2))
        cut = Segments(x, B, prepared, tile, initial, at_once, ENOUGH, dout, z, C, dfinal)

        ends = prepared.weights.stride(0), 0 if owners is None else owners.stride(0)
        strides = [stride for t in (dout, x, B, C, z) for stride in row_strides(t)]
        outputs = (
            *skip_strides(D),
            *dx.stride()[:2],
            *row_strides(dz)[:2],
            *dweights.stride()[:2],
            *row_strides(dD)[:2],
        )
        sizes = {"P": channels, "N": d_state, **tile.sizes}
        count = batch * tiles * blocks
        for first in range(0, heads, at_once):
            cut.join(first)
            cut.keep(first, befores, afters, dinitial)
            launch(
                input_gradients_kernel, (batch * tiles * at_once,),
                dout, x, *prepared[:2], B, C, D, z, owners, befores, afters, dx, dweights, dlogs, dD, dz,
                length, at_once, first, share, tiles, *strides, *outputs, *ends, **sizes, num_warps=4,
            )  # fmt: skip
            earlier: Any = sums if first % share else (None, None)
            sum_strides = (0,) * 4 if earlier[0] is None else earlier[0].stride()[:4]
            to = (dB[None], dC[None]) if parts == 1 and (first + at_once) % share == 0 else sums
            launch(
                vector_gradients_kernel, (2 * count,),
                dout, x, *prepared[:2], B, C, z, owners, befores, afters, *earlier, *to,
                length, at_once, first, share, tiles, blocks, block_heads, count,
                *strides, *sum_strides, *to[0].stride()[:4], *ends, **sizes, num_warps=4,
            )  # fmt: skip
    if parts > 1:
        dB.copy_(sums[0].sum(0))
        dC.copy_(sums[1].sum(0))
    if dD is not None and D is not None:
        dD = dD.sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
    return dx, dweights.to(weights.dtype), dlogs.to(log_decays.dtype), dB, dC, dD, dz, dinitial


def heads_at_once(heads: int, share: int, most: int) -> int:
    """Heads whose states are kept at once: at most ``most``, and whole groups or an even part of one."""
    counts = [n for n in range(heads, 0, -1) if heads % n == 0 and (n % share == 0 or share % n == 0)]
    return next((n for n in counts if n <= most), 1)


def heads_of_a_block(share: int, others: int) -> int:
    """Heads that a program takes in turn: the most, dividing the ``share`` of a group, that leave PROGRAMS programs."""
    divisors = [heads for heads in range(share, 0, -1) if share % heads == 0]
    return next((heads for heads in divisors if others * (share // heads) >= PROGRAMS), 1)
