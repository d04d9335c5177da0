"""Triton kernels of the causal convolution. Shapes, strides and launches are in triton_launch.py.

Every kernel counts time in the direction of the convolution: step t is row t of x, or row L-1-t when REVERSE, so the
rest of the kernel knows one direction only. Arithmetic is float32; base offsets are int64, since a long batch passes
2^31 elements. Letters: L length, D channels, W width; a tile is BL steps of BD channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def _rows(t, L, stride, REVERSE: tl.constexpr):
    """Offsets (BL, 1) of steps t; the caller masks those outside 0 .. L-1."""
    row = L - 1 - t if REVERSE else t
    return row.to(tl.int64)[:, None] * stride


@triton.jit
def _same_as_before(seq_idx, base, t, L, REVERSE: tl.constexpr):
    """(BL, 1), whether step t continues the sequence of step t-1; before the start and past the end nothing changes."""
    here = tl.minimum(tl.maximum(t, 0), L - 1)
    before = tl.minimum(tl.maximum(t - 1, 0), L - 1)
    here = L - 1 - here if REVERSE else here
    before = L - 1 - before if REVERSE else before
    return (tl.load(seq_idx + base + here) == tl.load(seq_idx + base + before))[:, None]


@triton.jit
def _input(x, state, t, d, L, D, stride, in_d, HAS_STATE: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr):
    """Inputs (BL, BD) of steps t as float32: from x, before its start from the state (W-1, D), past its end zero."""
    value = tl.load(
        x + _rows(t, L, stride, REVERSE) + d[None, :], mask=((t >= 0) & (t < L))[:, None] & in_d, other=0.0
    ).to(tl.float32)
    if HAS_STATE:
        old = (t < 0) & (t >= 1 - W)
        value += tl.load(state + (t + W - 1)[:, None] * D + d[None, :], mask=old[:, None] & in_d, other=0.0).to(
            tl.float32
        )
    return value


@triton.jit
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
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """One tile of y. Grid (tiles of D * tiles of L * batch). The W loads of neighbouring rows meet in the L1 cache."""
    d_tiles = tl.cdiv(D, BD)
    l_tiles = tl.cdiv(L, BL)
    pid = tl.program_id(0)
    d = (pid % d_tiles) * BD + tl.arange(0, BD)
    t = (pid // d_tiles) % l_tiles * BL + tl.arange(0, BL)
    b = (pid // d_tiles // l_tiles).to(tl.int64)
    in_d = (d < D)[None, :]
    x += b * x_batch
    state += b * D * (W - 1)
    acc = tl.zeros([BL, BD], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    reaches = (t < L)[:, None]
    for s in tl.static_range(W):
        if HAS_SEQ and s > 0:
            reaches = reaches & _same_as_before(seq_idx, b * L, t - s + 1, L, REVERSE)
        tap = tl.load(weight + d * W + (W - 1 - s), mask=d < D, other=0.0).to(tl.float32)[None, :]
        value = _input(x, state, t - s, d, L, D, x_row, in_d, HAS_STATE, REVERSE, W)
        acc += tap * tl.where(reaches, value, 0.0)
    if SILU:
        acc = acc * _sigmoid(acc)
    tl.store(
        out + b * L * D + _rows(t, L, D, REVERSE) + d[None, :],
        acc.to(out.dtype.element_ty),
        mask=(t < L)[:, None] & in_d,
    )


@triton.jit
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
    L,
    D,
    x_batch,
    x_row,
    dout_batch,
    dout_row,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
    TILES: tl.constexpr,
):
    """dx of TILES tiles along time, and their share of dweight (W, D) and dbias (D,): partial sums that the caller
    adds up in a fixed order. Grid (tiles of D * groups of TILES tiles of L * batch).

    dx_t = sum_s weight_{W-1-s} dpre_{t+s} needs the value before the activation at W steps, and those need inputs from
    t-W+1 to t+W-1: each of these 2W-1 tiles is loaded once and the values are computed again.
    """
    d_tiles = tl.cdiv(D, BD)
    l_groups = tl.cdiv(L, BL * TILES)
    pid = tl.program_id(0)
    d = (pid % d_tiles) * BD + tl.arange(0, BD)
    group = (pid // d_tiles) % l_groups
    b = (pid // d_tiles // l_groups).to(tl.int64)
    in_d = (d < D)[None, :]
    x += b * x_batch
    dout += b * dout_batch
    dx += b * L * D
    state += b * D * (W - 1)
    taps = ()
    sums = ()
    for s in tl.static_range(W):
        taps += (tl.load(weight + d * W + (W - 1 - s), mask=d < D, other=0.0).to(tl.float32)[None, :],)
        sums += (tl.zeros([BD], tl.float32),)
    shift = tl.zeros([1, BD], tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dbias_sum = tl.zeros([BD], tl.float32)

    for tile in range(tl.minimum(TILES, tl.cdiv(L - group * BL * TILES, BL))):
        t = (group * TILES + tile) * BL + tl.arange(0, BL)
        values = ()  # inputs of steps t-W+1 .. t+W-1
        same = ()  # whether each of those steps continues the sequence of the step before it
        for i in tl.static_range(2 * W - 1):
            step = t + (i - W + 1)
            values += (_input(x, state, step, d, L, D, x_row, in_d, HAS_STATE, REVERSE, W),)
            if HAS_SEQ:
                same += (_same_as_before(seq_idx, b * L, step, L, REVERSE),)
        grad = tl.zeros([BL, BD], tl.float32)
        carried = (t < L)[:, None]
        new_sums = ()
        for s in tl.static_range(W):  # the output at step t+s
            later = t + s
            dpre = tl.load(
                dout + _rows(later, L, dout_row, REVERSE) + d[None, :], mask=(later < L)[:, None] & in_d, other=0.0
            ).to(tl.float32)
            if SILU:
                pre = shift + taps[0] * values[W - 1 + s]
                reaches = (later < L)[:, None]
                for k in tl.static_range(1, W):
                    if HAS_SEQ:
                        reaches = reaches & same[W - 1 + s - k + 1]
                    pre += taps[k] * tl.where(reaches, values[W - 1 + s - k], 0.0)
                gate = _sigmoid(pre)
                dpre = dpre * gate * (1.0 + pre * (1.0 - gate))
            if HAS_SEQ and s > 0:
                carried = carried & same[W - 1 + s]
            grad += taps[s] * tl.where(carried, dpre, 0.0)
            if s == 0:
                dbias_sum += tl.sum(dpre, axis=0)
                reaches = (t < L)[:, None]
                for k in tl.static_range(W):
                    if HAS_SEQ and k > 0:
                        reaches = reaches & same[W - 1 - k + 1]
                    new_sums += (sums[k] + tl.sum(dpre * tl.where(reaches, values[W - 1 - k], 0.0), axis=0),)
        sums = new_sums
        tl.store(dx + _rows(t, L, D, REVERSE) + d[None, :], grad.to(dx.dtype.element_ty), mask=(t < L)[:, None] & in_d)

    partial = b * l_groups + group
    for s in tl.static_range(W):
        tl.store(dweight + (partial * W + (W - 1 - s)) * D + d, sums[s], mask=d < D)
    tl.store(dbias + partial * D + d, dbias_sum, mask=d < D)


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
            acc = acc * _sigmoid(acc)
        tl.store(out + t, tl.where(real, acc, 0.0).to(out.dtype.element_ty), mask=in_d)
        column = (start + t) % S if RING else S - T + t
        tl.store(state + column * state_column, value.to(state.dtype.element_ty), mask=real & (t >= T - S))


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    flags = {"HAS_BIAS": True, "HAS_STATE": True, "HAS_SEQ": True, "SILU": True, "REVERSE": False, "W": 4}
    sizes = {"L": "i32", "D": "i32", "x_batch": "i64", "x_row": "i64"}
    inputs = {"x": "*bf16", "weight": "*fp32", "bias": "*fp32", "state": "*fp32", "seq_idx": "*i32"}
    yield _example(conv_forward, {**inputs, "out": "*bf16", **sizes}, {**flags, "BL": 16, "BD": 64}, 4)
    yield _example(
        conv_backward,
        {"dout": "*bf16", **inputs, "dx": "*bf16", "dweight": "*fp32", "dbias": "*fp32", **sizes}
        | {"dout_batch": "i64", "dout_row": "i64"},
        {**flags, "REVERSE": True, "BL": 8, "BD": 64, "TILES": 16},
        4,
    )
    yield _example(
        conv_update,
        {"x": "*bf16", "state": "*fp32", "weight": "*fp32", "bias": "*fp32", "seen": "*i32", "lines": "*i32"}
        | {"out": "*bf16", "T": "i32", "D": "i32", "S": "i32"}
        | {f"x_{axis}": "i64" for axis in ("batch", "channel", "step")}
        | {f"state_{axis}": "i64" for axis in ("line", "channel", "column")},
        {"HAS_BIAS": True, "RING": True, "HAS_LINES": True, "SILU": True, "W": 4, "BD": 128},
        4,
    )


def _example(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    return kernel, signature | dict.fromkeys(constants, "constexpr"), constants, num_warps
