"""Triton kernels of the causal convolution: the forward and the step for generation. The backward is in
triton_backward.py; shapes, strides and launches are in triton_launch.py.

The forward and the backward walk along time and keep the last inputs in registers, so that each input is read once
(and W-1 more at the start of a chunk). A program is a tile of BR chunks and BD channels; a chunk is STEPS steps of one
row of the batch, and the chunks of all rows are numbered through. U rows of a chunk are loaded before the first is
used: that many loads in flight keep the memory busy.

Every kernel counts time in the direction of the convolution: step t is row t of x, or row L-1-t when REVERSE, so the
rest of the kernel knows one direction only. Arithmetic is float32; row offsets are int64, since a long batch passes
2^31 elements. Letters: L length, D channels, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). A division costs five instructions, a reciprocal square root one and its square another."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def place(program, chunks, total, steps, L, D, W: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """The tile of a program: channels d (1, BD) and which exist; of each chunk the row of the batch (BR, 1), the first
    step and the end. A chunk past the last lies behind the end of time, where every access is masked.
    """
    d_tiles = tl.cdiv(D, BD)
    d = ((program % d_tiles) * BD + tl.arange(0, BD))[None, :]
    chunk = ((program // d_tiles) * BR + tl.arange(0, BR))[:, None]
    start = tl.where(chunk < total, chunk % chunks * steps, L + W)
    b = (tl.minimum(chunk, total - 1) // chunks).to(tl.int64)
    return d, d < D, b, start, tl.minimum(start + steps, L)


@triton.jit
def row_of(t, L, REVERSE: tl.constexpr):
    row = L - 1 - t if REVERSE else t
    return row.to(tl.int64)


@triton.jit
def hop(stride, REVERSE: tl.constexpr):
    """Elements from one step to the next."""
    one = tl.full((), -1 if REVERSE else 1, tl.int64)
    return one * stride


@triton.jit
def load_rows(x, left, j, x_hop, in_d, U: tl.constexpr):
    """Rows j .. j+U-1 after x, of which ``left`` exist."""
    rows = ()
    for k in tl.static_range(U):
        rows += (tl.load(x + (j + k) * x_hop, mask=(j + k < left) & in_d, other=0.0),)
    return rows


@triton.jit
def input_before(x, state, b, t, d, in_d, L, D, x_row, REVERSE: tl.constexpr, W: tl.constexpr):
    """The input (BR, BD) at step t as float32: from x, before its start from the state (B, D, W-1) or zero."""
    value = tl.load(x + row_of(t, L, REVERSE) * x_row, mask=(t >= 0) & (t < L) & in_d, other=0.0).to(tl.float32)
    if state is not None:
        column = state + (b * D + d) * (W - 1) + (t + W - 1)
        value += tl.load(column, mask=(t < 0) & (t >= 1 - W) & in_d, other=0.0).to(tl.float32)
    return value


@triton.jit
def sequence_at(seq_idx, b, t, L, REVERSE: tl.constexpr):
    """The number (BR, 1) of the sequence at step t; before the start and past the end that of the nearest step."""
    return tl.load(seq_idx + b * L + row_of(tl.minimum(tl.maximum(t, 0), L - 1), L, REVERSE))


@triton.jit
def filter_taps(weight, bias, d, in_d, W: tl.constexpr):
    """The W taps (1, BD), that of the newest input first, and the bias, as float32."""
    taps = ()
    for s in tl.static_range(W):
        taps += (tl.load(weight + d * W + (W - 1 - s), mask=in_d, other=0.0).to(tl.float32),)
    shift = tl.zeros_like(taps[0])
    if bias is not None:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def walk_forward(
    program, x, weight, bias, state, seq_idx, out, L, D, x_batch, x_row, out_batch, out_row, chunks, total, steps,
    SILU: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y of one tile. bias, state and seq_idx may be None; steps is a multiple of U."""
    d, in_d, b, start, end = place(program, chunks, total, steps, L, D, W, BR, BD)
    x += b * x_batch + d
    if seq_idx is not None:
        sequence = sequence_at(seq_idx, b, start - 1, L, REVERSE)
        later = sequence
        belongs = start >= 0
    window = ()  # the last W-1 inputs, newest first; zero for those of another sequence than the newest
    for s in tl.static_range(1, W):
        value = input_before(x, state, b, start - s, d, in_d, L, D, x_row, REVERSE, W)
        if seq_idx is not None:
            earlier = sequence_at(seq_idx, b, start - s, L, REVERSE)
            belongs = belongs & (earlier == later)
            value = tl.where(belongs, value, 0.0)
            later = earlier
        window += (value,)
    x_hop, out_hop = hop(x_row, REVERSE), hop(out_row, REVERSE)
    x += row_of(start, L, REVERSE) * x_row
    out += b * out_batch + d + row_of(start, L, REVERSE) * out_row
    rows = load_rows(x, end - start, 0, x_hop, in_d, U)
    taps, shift = filter_taps(weight, bias, d, in_d, W)
    for i in range(0, steps, U):
        left = end - start - i
        following = load_rows(x, left, U, x_hop, in_d, U)
        for j in tl.static_range(U):
            if seq_idx is not None:
                present = sequence_at(seq_idx, b, start + i + j, L, REVERSE)
                kept = ()
                for s in tl.static_range(W - 1):
                    kept += (tl.where(present == sequence, window[s], 0.0),)
                window = kept
                sequence = present
            value = rows[j].to(tl.float32)
            y = shift + taps[0] * value
            moved = (value,)
            for s in tl.static_range(1, W):
                y += taps[s] * window[s - 1]
                if s < W - 1:
                    moved += (window[s - 1],)
            window = moved
            if SILU:
                y = y * sigmoid(y)
            tl.store(out + j * out_hop, y.to(out.dtype.element_ty), mask=(j < left) & in_d)
        x += U * x_hop
        out += U * out_hop
        rows = following


@triton.jit(do_not_specialize=["L", "chunks", "total", "steps"])
def conv_forward(
    x,
    weight,
    bias,
    state,
    seq_idx,
    out,
    L,
    D,
    x_batch,
    x_row,
    out_batch,
    out_row,
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
    """y. Grid (tiles of D * tiles of chunks,)."""
    walk_forward(
        tl.program_id(0), x, weight, bias, state, seq_idx, out, L, D, x_batch, x_row, out_batch, out_row, chunks, total,
        steps, SILU, REVERSE, W, U, BR, BD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["L", "chunks", "total", "steps"])
def conv_forward_both(
    x, weight, bias, seq_idx, out, L, D, x_batch, x_row, out_batch, out_row, chunks, total, steps,
    SILU: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y of one x by two filters, forwards and from the end: weight (2, D, W), bias (2, D) or None, out (B, L, 2D).

    Grid (2 * tiles of D * tiles of chunks,): programs of one row and either direction are neighbours, and read x once.
    """
    program = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        walk_forward(
            program, x, weight, bias, None, seq_idx, out, L, D, x_batch, x_row, out_batch, out_row, chunks, total,
            steps, SILU, False, W, U, BR, BD,
        )  # fmt: skip
    else:
        if bias is not None:
            bias += D
        walk_forward(
            program, x, weight + D * W, bias, None, seq_idx, out + D, L, D, x_batch, x_row, out_batch, out_row, chunks,
            total, steps, SILU, True, W, U, BR, BD,
        )  # fmt: skip


@triton.jit
def conv_update(
    x,
    state,
    weight,
    bias,
    seen,
    lines,
    out,
    T,
    D,
    S,
    x_batch,
    x_channel,
    x_step,
    state_line,
    state_channel,
    state_column,
    HAS_BIAS: tl.constexpr,
    RING: tl.constexpr,
    HAS_LINES: tl.constexpr,
    SILU: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
):
    """T steps of BD channels of one row. Grid (tiles of D, batch). The window lives in registers; the state, S columns
    wide, is read before anything is written to it. BD is 32 times the warps: were one channel held by two threads, one
    could read a column that the other has already written.
    """
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row = tl.program_id(1).to(tl.int64)
    in_d = d < D
    line = tl.load(lines + row).to(tl.int64) if HAS_LINES else row
    start = tl.load(seen + row).to(tl.int32) if RING else S
    real = in_d & (line >= 0)
    state += tl.maximum(line, 0) * state_line + d * state_channel
    x += row * x_batch + d * x_channel
    out += (row * D + d) * T
    shift = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    taps = ()
    window = ()  # the W-1 inputs before step 0, newest first
    for s in tl.static_range(W):
        taps += (tl.load(weight + d * W + (W - 1 - s), mask=in_d, other=0.0).to(tl.float32),)
        if s > 0:
            column = (start - s + W * S) % S  # W * S keeps the dividend positive
            window += (tl.load(state + column * state_column, mask=real, other=0.0).to(tl.float32),)
    if not RING:
        for column in range(0, S - T):  # what stays moves to the front, oldest first: no column is read after a write
            kept = tl.load(state + (column + T) * state_column, mask=real, other=0.0)
            tl.store(state + column * state_column, kept, mask=real)
    for t in range(T):
        value = tl.load(x + t * x_step, mask=real, other=0.0)
        wide = value.to(tl.float32)
        acc = shift + taps[0] * wide
        moved = (wide,)
        for s in tl.static_range(1, W):
            acc += taps[s] * window[s - 1]
            if s < W - 1:
                moved += (window[s - 1],)
        window = moved
        if SILU:
            acc = acc * sigmoid(acc)
        tl.store(out + t, tl.where(real, acc, 0.0).to(out.dtype.element_ty), mask=in_d)
        column = (start + t) % S if RING else S - T + t
        tl.store(state + column * state_column, value.to(state.dtype.element_ty), mask=real & (t >= T - S))


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    pointers = {"x": "*bf16", "weight": "*fp32", "bias": "*fp32", "state": "*fp32", "seq_idx": "*i32", "out": "*bf16"}
    numbers = {
        "L": "i32",
        "D": "i32",
        "x_batch": "i64",
        "x_row": "i64",
        "out_batch": "i64",
        "out_row": "i64",
        "chunks": "i32",
        "total": "i32",
        "steps": "i32",
    }
    constants = {"SILU": True, "REVERSE": False, "W": 4, "U": 8, "BR": 4, "BD": 256}
    yield example(conv_forward, pointers | numbers, constants, 4)
    absent = dict.fromkeys(("bias", "state", "seq_idx"))
    yield example(conv_forward, pointers | numbers, constants | absent, 4)
    either = {key: value for key, value in constants.items() if key != "REVERSE"}
    pointers.pop("state")
    yield example(conv_forward_both, pointers | numbers, either, 4)
    yield example(conv_forward_both, pointers | numbers, either | {"bias": None, "seq_idx": None}, 4)
    yield example(
        conv_update,
        {"x": "*bf16", "state": "*fp32", "weight": "*fp32", "bias": "*fp32", "seen": "*i32", "lines": "*i32"}
        | {"out": "*bf16", "T": "i32", "D": "i32", "S": "i32"}
        | {f"x_{axis}": "i64" for axis in ("batch", "channel", "step")}
        | {f"state_{axis}": "i64" for axis in ("line", "channel", "column")},
        {"HAS_BIAS": True, "RING": True, "HAS_LINES": True, "SILU": True, "W": 4, "BD": 128},
        4,
    )


def example(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    return kernel, signature | dict.fromkeys(constants, "constexpr"), constants, num_warps
