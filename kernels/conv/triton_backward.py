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
    input_before,
    place,
    row_of,
    sequence_at,
    sigmoid,
)


@triton.jit(do_not_specialize=["L", "chunks", "total", "steps"])
def conv_backward(
    dout,
    x,
    weight,
    bias,
    state,
    seq_idx,
    dx,
    dweight,
    dbias,
    dstate,
    L,
    D,
    dout_batch,
    dout_row,
    x_batch,
    x_row,
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
    """dx (B, L, D), dstate (B, D, W-1), and the tile's share of dweight (D, W) and dbias (D,): partial sums that the
    caller adds up in a fixed order. Grid (tiles of D * tiles of chunks). bias with dbias, state with dstate, and
    seq_idx may be None; steps + W - 1 is a multiple of U, and U is at least W - 1.
    """
    d, in_d, b, start, end = place(chunks, total, steps, L, D, W, BR, BD)
    x += b * x_batch + d
    dout += b * dout_batch + d
    dx += b * L * D + d
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
    taps, shift = filter_taps(weight, bias, d, in_d, W)

    for i in range(0, steps + W - 1, U):
        x_rows = ()
        dout_rows = ()
        for j in tl.static_range(U):
            e = start + i + j
            inside = (e < L) & (e < end + W - 1) & in_d
            row = row_of(e, L, REVERSE)
            x_rows += (tl.load(x + row * x_row, mask=inside, other=0.0),)
            dout_rows += (tl.load(dout + row * dout_row, mask=inside, other=0.0),)
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
            tl.store(
                dx + row_of(u, L, REVERSE) * D,
                gradient.to(dx.dtype.element_ty),
                mask=(u >= start) & (u < end) & in_d,
            )
            if state is not None and i == 0:
                tl.store(
                    dstate + (b * D + d) * (W - 1) + (u + W - 1),
                    gradient.to(dstate.dtype.element_ty),
                    mask=(start == 0) & (u < 0) & in_d,
                )
            inputs = _without_the_first(inputs, W)
            grads = _without_the_first(grads, W)
            if seq_idx is not None:
                same = _without_the_first(same, W - 1)

    partial = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64) * D + d
    for s in tl.static_range(W):
        tl.store(dweight + partial * W + (W - 1 - s), tl.sum(dtaps[s], axis=0, keep_dims=True), mask=in_d)
    if bias is not None:
        tl.store(dbias + partial, tl.sum(dshift, axis=0, keep_dims=True), mask=in_d)


@triton.jit
def _without_the_first(values, COUNT: tl.constexpr):
    rest = ()
    for s in tl.static_range(1, COUNT):
        rest += (values[s],)
    return rest


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    pointers = {"dout": "*bf16", "x": "*bf16", "weight": "*fp32", "bias": "*fp32", "state": "*fp32", "seq_idx": "*i32"}
    pointers |= {"dx": "*bf16", "dweight": "*fp32", "dbias": "*fp32", "dstate": "*fp32"}
    numbers = {"L": "i32", "D": "i32", "dout_batch": "i64", "dout_row": "i64", "x_batch": "i64", "x_row": "i64"}
    numbers |= {"chunks": "i32", "total": "i32", "steps": "i32"}
    constants = {"SILU": True, "REVERSE": True, "W": 4, "U": 4, "BR": 4, "BD": 128}
    absent = dict.fromkeys(("bias", "dbias", "state", "dstate", "seq_idx"))
    yield example(conv_backward, pointers | numbers, constants, 4)
    yield example(conv_backward, pointers | numbers, constants | absent, 4)
