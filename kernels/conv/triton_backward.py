"""The Triton kernel of the causal convolution's gradient: one walk along time, like the forward's.

With dpre_t the gradient before the activation, and tap_s the weight of the input s steps ago,

    dx_u = sum_s tap_s dpre_{u+s}        dtap_s = sum_u x_u dpre_{u+s}        dbias = sum_u dpre_u

and dpre_t needs x_t .. x_{t-W+1} again. So a step of the walk stands at u and reads x and dout at its far end,
e = u + W - 1: the W inputs x_u .. x_e in registers give dpre_e, and the W values dpre_u .. dpre_e with x_u give
everything that belongs to u. Nothing is computed twice but at the W-1 steps where two chunks meet. A chunk's walk
begins at u = start - W + 1: there the first chunk finds what belongs to the state, the others only fill registers.
Program, tile and chunk are those of triton_kernels.py.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from mambakit.kernels.conv.triton_kernels import (
    example,
    filter_taps,
    hop,
    input_before,
    load_rows,
    place,
    row_of,
    sequence_at,
    sigmoid,
)


@triton.jit
def walk_backward(
    program, dout, x, weight, bias, state, seq_idx, dx, partials, dstate, L, D, dout_batch, dout_row, x_batch, x_row,
    dx_batch, dx_row, chunks, total, steps,
    SILU: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx (B, L, D), dstate (B, D, W-1), and of this tile of chunks its share of dweight (D, W) and dbias (D,), one
    behind the other. bias, state with dstate, and seq_idx may be None;
    steps + W - 1 is a multiple of U.
    """
    d, in_d, b, start, end = place(program, chunks, total, steps, L, D, W, BR, BD)
    x += b * x_batch + d
    first = tl.where(start == 0, 1 - W, start)  # the first u whose sums are this chunk's
    inputs = ()  # x_u .. x_{e-1}
    grads = ()  # dpre_u .. dpre_{e-1}
    same = ()  # whether steps u+1 .. e-1 each continue the sequence of the step before
    dshift = tl.zeros([BR, BD], tl.float32)
    dtaps = (dshift,)
    for s in tl.static_range(W - 1):
        inputs += (input_before(x, state, b, start - (W - 1 - s), d, in_d, L, D, x_row, REVERSE, W),)
        grads += (dshift,)
        dtaps += (dshift,)
    if seq_idx is not None:
        sequence = sequence_at(seq_idx, b, start - (W - 1), L, REVERSE)
        for s in tl.static_range(W - 2):
            present = sequence_at(seq_idx, b, start - (W - 2 - s), L, REVERSE)
            same += (present == sequence,)
            sequence = present
    x_hop, dout_hop, dx_hop = hop(x_row, REVERSE), hop(dout_row, REVERSE), hop(dx_row, REVERSE)
    x += row_of(start, L, REVERSE) * x_row
    dout += b * dout_batch + d + row_of(start, L, REVERSE) * dout_row
    dx += b * dx_batch + d + row_of(start, L, REVERSE) * dx_row - (W - 1) * dx_hop
    known = tl.minimum(end + W - 1, L)
    x_rows = load_rows(x, known - start, 0, x_hop, in_d, U)
    dout_rows = load_rows(dout, known - start, 0, dout_hop, in_d, U)
    taps, shift = filter_taps(weight, bias, d, in_d, W)

    for i in range(0, steps + W - 1, U):
        left = known - start - i
        next_x_rows = load_rows(x, left, U, x_hop, in_d, U)
        next_dout_rows = load_rows(dout, left, U, dout_hop, in_d, U)
        for j in tl.static_range(U):
            e = start + i + j
            u = e - (W - 1)
            if seq_idx is not None:
                present = sequence_at(seq_idx, b, e, L, REVERSE)
                same += (present == sequence,)
                sequence = present
            inputs += (x_rows[j].to(tl.float32),)
            dpre = dout_rows[j].to(tl.float32)
            if SILU:
                pre = shift + taps[0] * inputs[W - 1]
                reaches = start >= 0
                for s in tl.static_range(1, W):
                    value = inputs[W - 1 - s]
                    if seq_idx is not None:
                        reaches = reaches & same[W - 1 - s]
                        value = tl.where(reaches, value, 0.0)
                    pre += taps[s] * value
                gate = sigmoid(pre)
                dpre = dpre * (gate + pre * gate * (1.0 - gate))
            grads += (dpre,)
            mine = tl.where(u >= first, inputs[0], 0.0)
            gradient = taps[0] * grads[0]
            sums = (dtaps[0] + mine * grads[0],)
            dshift += grads[0]
            reaches = start >= 0
            for s in tl.static_range(1, W):
                value = grads[s]
                if seq_idx is not None:
                    reaches = reaches & same[s - 1]
                    value = tl.where(reaches, value, 0.0)
                gradient += taps[s] * value
                sums += (dtaps[s] + mine * value,)
            dtaps = sums
            inside = (u >= start) & (u < end) & in_d
            tl.store(dx + j * dx_hop, gradient.to(dx.dtype.element_ty), mask=inside)
            if state is not None and i < W - 1:
                tl.store(
                    dstate + (b * D + d) * (W - 1) + (u + W - 1),
                    gradient.to(dstate.dtype.element_ty),
                    mask=(start == 0) & (u < 0) & in_d,
                )
            inputs = _without_the_first(inputs, W)
            grads = _without_the_first(grads, W)
            if seq_idx is not None:
                same = _without_the_first(same, W - 1)
        x += U * x_hop
        dout += U * dout_hop
        dx += U * dx_hop
        x_rows, dout_rows = next_x_rows, next_dout_rows

    columns = D * W if bias is None else D * W + D
    partials += (program // tl.cdiv(D, BD)).to(tl.int64) * columns
    for s in tl.static_range(W):
        tl.store(partials + d * W + (W - 1 - s), tl.sum(dtaps[s], axis=0, keep_dims=True), mask=in_d)
    if bias is not None:
        tl.store(partials + D * W + d, tl.sum(dshift, axis=0, keep_dims=True), mask=in_d)


@triton.jit(do_not_specialize=["L", "chunks", "total", "steps"])
def conv_backward(
    dout,
    x,
    weight,
    bias,
    state,
    seq_idx,
    dx,
    partials,
    dstate,
    L,
    D,
    dout_batch,
    dout_row,
    x_batch,
    x_row,
    dx_batch,
    dx_row,
    chunks,
    total,
    steps,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    U: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Every tile's. Grid (tiles of D * tiles of chunks,)."""
    walk_backward(
        tl.program_id(0), dout, x, weight, bias, state, seq_idx, dx, partials, dstate, L, D, dout_batch, dout_row,
        x_batch, x_row, dx_batch, dx_row, chunks, total, steps, SILU, REVERSE, W, U, BR, BD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["L", "chunks", "total", "steps", "tiles"])
def conv_backward_both(
    dout, x, weight, bias, seq_idx, dx, dx_back, partials, L, D, dout_batch, dout_row, x_batch, x_row, dx_batch, dx_row,
    back_batch, back_row, chunks, total, steps, tiles,
    SILU: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of ``conv_forward_both``: dout (B, L, 2D), x's gradient by either direction apart, and partials one
    direction behind the other, of ``tiles`` tiles of chunks each. Programs as there.
    """
    program = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        walk_backward(
            program, dout, x, weight, bias, None, seq_idx, dx, partials, None, L, D, dout_batch, dout_row, x_batch,
            x_row, dx_batch, dx_row, chunks, total, steps, SILU, False, W, U, BR, BD,
        )  # fmt: skip
    else:
        columns = D * W if bias is None else D * W + D
        if bias is not None:
            bias += D
        walk_backward(
            program, dout + D, x, weight + D * W, bias, None, seq_idx, dx_back, partials + tiles.to(tl.int64) * columns,
            None, L, D, dout_batch, dout_row, x_batch, x_row, back_batch, back_row, chunks, total, steps, SILU, True, W,
            U, BR, BD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def sum_partials(partials, dweight, dbias, count, D, W: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """dweight and dbias (or None), each the sum of ``count`` partial ones in a fixed order.

    Grid (tiles of columns, convolutions): partials, sums and biases of several convolutions lie one behind the other.
    """
    columns = D * W if dbias is None else D * W + D
    partials += tl.program_id(1).to(tl.int64) * count * columns
    dweight += tl.program_id(1) * D * W
    if dbias is not None:
        dbias += tl.program_id(1) * D
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BP, BC], tl.float32)
    for first in range(0, count, BP):
        p = first + tl.arange(0, BP)
        inside = (p < count)[:, None] & (c < columns)[None, :]
        total += tl.load(partials + p.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(dweight + c, result.to(dweight.dtype.element_ty), mask=c < D * W)
    if dbias is not None:
        tl.store(dbias + (c - D * W), result.to(dbias.dtype.element_ty), mask=(c >= D * W) & (c < columns))


@triton.jit
def _without_the_first(values, COUNT: tl.constexpr):
    rest = ()
    for s in tl.static_range(1, COUNT):
        rest += (values[s],)
    return rest


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    pointers = {"dout": "*bf16", "x": "*bf16", "weight": "*fp32", "bias": "*fp32", "state": "*fp32", "seq_idx": "*i32"}
    pointers |= {"dx": "*bf16", "partials": "*fp32", "dstate": "*fp32"}
    numbers = {"L": "i32", "D": "i32", "dout_batch": "i64", "dout_row": "i64", "x_batch": "i64", "x_row": "i64"}
    numbers |= {"dx_batch": "i64", "dx_row": "i64", "chunks": "i32", "total": "i32", "steps": "i32"}
    constants = {"SILU": True, "REVERSE": True, "W": 4, "U": 4, "BR": 4, "BD": 128}
    absent = dict.fromkeys(("bias", "state", "dstate", "seq_idx"))
    yield example(conv_backward, pointers | numbers, constants, 4)
    yield example(conv_backward, pointers | numbers, constants | absent, 4)
    either = {key: value for key, value in constants.items() if key != "REVERSE"}
    for name in ("state", "dstate"):
        pointers.pop(name)
    pointers |= {"dx_back": "*bf16"}
    numbers |= {"back_batch": "i64", "back_row": "i64", "tiles": "i32"}
    yield example(conv_backward_both, pointers | numbers, either, 4)
    yield example(conv_backward_both, pointers | numbers, either | {"bias": None, "seq_idx": None}, 4)
    sums = {"partials": "*fp32", "dweight": "*bf16", "dbias": "*fp32", "count": "i32", "D": "i32"}
    yield example(sum_partials, sums, {"W": 4, "BP": 64, "BC": 32}, 4)
