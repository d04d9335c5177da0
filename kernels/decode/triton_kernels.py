"""The kernels of a decoding step: linear maps of few rows, the selective state's step, and the ends of the model.

They read their weights before ``gdc_wait``. With programmatic dependent launch (PDL, compute capability 9.0 on) the
kernel starts while the one before it still runs, and ``gdc_wait`` holds it until the other's results are visible: the
weights, which no kernel writes, then arrive during that time. Every kernel waits, so a kernel that has passed its wait
knows all earlier ones of the step finished. Arithmetic is float32; what a model's own ``step`` rounds to the
computing dtype between two operators is rounded here too.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import cuda

from mambakit.kernels.scan.triton_common import LOG2E, sigmoid, softplus


@triton.jit
def embed_kernel(ids, table, out, K, BK: tl.constexpr):
    """out (B, K) = table[ids]. Grid (B,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    line = tl.load(table + tl.load(ids + row).to(tl.int64) * K + k, mask=k < K)
    tl.store(out + row * K + k, line.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def linear_step_kernel(
    x, norm_weight, weight, bias, out, conv_state, conv_weight, conv_bias,
    x_b, out_b, K, R, conv_first, conv_channels, eps,
    BATCH: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, W: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out (B, R) = x (B, K) weight (R, K)ᵀ + bias. Grid (programs,), each of which takes every so-manieth BR outputs.

    With NORM, x is normalised first (root mean square, gain ``norm_weight``); with ADD, out += instead of =; with W
    above 0, ``conv_channels`` outputs from ``conv_first`` on go through SiLU(causal convolution) of width W with its
    state (B, conv_channels, W-1), oldest input first. Every program normalises all of x again: it is a few kilobytes.
    While it works on one tile of weights, the next is on its way.
    """
    k = tl.arange(0, BK)
    in_k = k < K
    tile = _weights(weight, tl.program_id(0), R, K, BR, BK)
    filters = (conv_weight, conv_bias, conv_state, conv_first, conv_channels)
    taps, windows = _filters(filters, tl.program_id(0), BATCH, W, BR)
    if NORM:
        gain = tl.load(norm_weight + k, mask=in_k, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    sums = _sums(out, out_b, tl.program_id(0), R, BATCH, ADD, BR)
    vectors = ()
    for row in tl.static_range(BATCH):
        vector = tl.load(x + row * x_b + k, mask=in_k, other=0.0).to(tl.float32)
        if NORM:
            scale = 1.0 / tl.sqrt(tl.sum(vector * vector, axis=0) / K + eps)
            vector = (vector * scale * gain).to(weight.dtype.element_ty).to(tl.float32)
        vectors += (vector,)

    for number in range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0)):
        following = number + tl.num_programs(0)
        next_tile = _weights(weight, following, R, K, BR, BK)
        next_taps, next_windows = _filters(filters, following, BATCH, W, BR)
        next_sums = _sums(out, out_b, following, R, BATCH, ADD, BR)
        r = number * BR + tl.arange(0, BR)
        channel = r - conv_first
        live = (channel >= 0) & (channel < conv_channels)
        for row in tl.static_range(BATCH):
            y = tl.sum(tile.to(tl.float32) * vectors[row][None, :], axis=1)
            if bias is not None:
                y += tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)
            y = y.to(weight.dtype.element_ty).to(tl.float32)
            tl.debug_barrier()  # threads may hold copies of one output: all have read before any writes in place
            if W > 0:
                states = conv_state + (row * conv_channels + channel) * (W - 1)
                filtered = taps[W] + taps[W - 1] * y
                for j in tl.static_range(W - 1):
                    past = windows[row * (W - 1) + j]
                    filtered += taps[j] * past
                    if j > 0:
                        tl.store(states + j - 1, past.to(conv_state.dtype.element_ty), mask=live)
                tl.store(states + W - 2, y.to(conv_state.dtype.element_ty), mask=live)
                y = tl.where(live, filtered * sigmoid(filtered), y)
            if ADD:
                y += sums[row]
            tl.store(out + row * out_b + r, y.to(out.dtype.element_ty), mask=r < R)
        tile, taps, windows, sums = next_tile, next_taps, next_windows, next_sums


@triton.jit
def _weights(weight, number, R, K, BR: tl.constexpr, BK: tl.constexpr):
    """Tile ``number`` of weight (R, K): BR rows in weight's dtype; nothing is read past its end."""
    r = number * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)
    inside = (r < R)[:, None] & (k < K)[None, :]
    return tl.load(weight + r.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _filters(given, number, BATCH: tl.constexpr, W: tl.constexpr, BR: tl.constexpr):
    """The convolution of tile ``number``: its W taps and its bias, and the W-1 past inputs of each row."""
    weight, bias, state, first, channels = given
    r = number * BR + tl.arange(0, BR) - first
    live = (r >= 0) & (r < channels)
    taps = ()
    windows = ()
    if W > 0:
        for j in tl.static_range(W):
            taps += (tl.load(weight + r * W + j, mask=live, other=0.0).to(tl.float32),)
        shift = tl.zeros([BR], tl.float32)
        if bias is not None:
            shift += tl.load(bias + r, mask=live, other=0.0).to(tl.float32)
        taps += (shift,)
        for row in tl.static_range(BATCH):
            for j in tl.static_range(W - 1):
                past = tl.load(state + (row * channels + r) * (W - 1) + j, mask=live, other=0.0)
                windows += (past.to(tl.float32),)
    return taps, windows


@triton.jit
def _sums(out, out_b, number, R, BATCH: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr):
    """What tile ``number`` of each row of ``out`` holds, to be added to."""
    r = number * BR + tl.arange(0, BR)
    sums = ()
    if ADD:
        for row in tl.static_range(BATCH):
            sums += (tl.load(out + row * out_b + r, mask=r < R, other=0.0).to(tl.float32),)
    return sums


@triton.jit
def state_step_kernel(
    state, x, z, selected, dt_weight, dt_bias, A_log, D, out,
    channels, x_b, z_b, selected_b, P,
    N: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """delta, the selective state's step and the gate, of BD channels of one row. Grid (tiles of channels, batch).

    ``selected`` (B, P + 2N) holds delta's low-rank form, B and C. With delta = softplus(dt_weight dt + dt_bias) and
    A = -exp(A_log): state <- exp(delta A) state + delta x B; out = (C state + D x) SiLU(z).
    """
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row = tl.program_id(1).to(tl.int64)
    n, p = tl.arange(0, BN), tl.arange(0, BP)
    in_d, in_n, in_p = d < channels, n < N, p < P
    in_tile = in_d[:, None] & in_n[None, :]
    projection = tl.load(dt_weight + d[:, None] * P + p[None, :], mask=in_d[:, None] & in_p[None, :], other=0.0)
    rate = tl.load(A_log + d[:, None] * N + n[None, :], mask=in_tile, other=0.0).to(tl.float32)
    rate = tl.exp2(rate * LOG2E) * -LOG2E
    offset = tl.load(dt_bias + d, mask=in_d, other=0.0).to(tl.float32)
    skip = tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)
    # The last step wrote the state, so it too may be read before the wait.
    states = state + (row * channels + d)[:, None] * N + n[None, :]
    h = tl.load(states, mask=in_tile, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    selected += row * selected_b
    low_rank = tl.load(selected + p, mask=in_p, other=0.0).to(tl.float32)
    entry = tl.load(selected + P + n, mask=in_n, other=0.0).to(tl.float32)
    exit = tl.load(selected + P + N + n, mask=in_n, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_b + d, mask=in_d, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_b + d, mask=in_d, other=0.0).to(tl.float32)

    raw = tl.sum(projection.to(tl.float32) * low_rank[None, :], axis=1)
    step = softplus(raw.to(dt_weight.dtype.element_ty).to(tl.float32) + offset)
    h = tl.exp2(step[:, None] * rate) * h + (step * value)[:, None] * entry[None, :]
    tl.store(states, h.to(state.dtype.element_ty), mask=in_tile)
    y = tl.sum(h * exit[None, :], axis=1) + skip * value
    y *= gate * sigmoid(gate)
    tl.store(out + row * channels + d, y.to(out.dtype.element_ty), mask=in_d)


@triton.jit
def head_step_kernel(
    state, x, B, C, z, dt, dt_bias, A_log, D, out,
    heads, channels, group_heads, x_b, z_b, dt_b, D_h, D_p, least, most,
    N: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The step of a state with heads, BP channels of one head of one row. Grid (heads * tiles of channels, batch).

    x, z (B, H P), B and C (B, G N), which lie x_b apart from row to row as x does, dt (B, H). With
    delta = clamp(softplus(dt + dt_bias), least, most) and A = -exp(A_log), for each head:
    state <- exp(delta A) state + delta x B; out = C state + D x, with GATE times SiLU(z). Where out is wider than x, a
    norm follows in the kernel after this one: then out is rounded to x's dtype ahead of the gate.
    """
    tiles = tl.cdiv(channels, BP)
    head = tl.program_id(0) // tiles
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    in_p, in_n = p < channels, n < N
    in_tile = in_p[:, None] & in_n[None, :]
    d = head * channels + p
    rate = -tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E)
    offset = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(D + head * D_h + p * D_p, mask=in_p, other=0.0).to(tl.float32)
    # The last step wrote the state, so it too may be read before the wait.
    states = state + (row * heads * channels + d)[:, None] * N + n[None, :]
    h = tl.load(states, mask=in_tile, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    k = head // group_heads * N + n
    entry = tl.load(B + row * x_b + k, mask=in_n, other=0.0).to(tl.float32)
    exit = tl.load(C + row * x_b + k, mask=in_n, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_b + d, mask=in_p, other=0.0).to(tl.float32)
    step = softplus(tl.load(dt + row * dt_b + head).to(tl.float32) + offset)
    step = tl.minimum(tl.maximum(step, least), most)

    h = tl.exp2(step * rate * LOG2E) * h + (step * value)[:, None] * entry[None, :]
    tl.store(states, h.to(state.dtype.element_ty), mask=in_tile)
    y = tl.sum(h * exit[None, :], axis=1) + skip * value
    if GATE:
        if out.dtype.element_ty == tl.float32:
            y = y.to(x.dtype.element_ty).to(tl.float32)
        gate = tl.load(z + row * z_b + d, mask=in_p, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    tl.store(out + row * heads * channels + d, y.to(out.dtype.element_ty), mask=in_p)


@triton.jit
def argmax_kernel(x, out, x_b, V, BV: tl.constexpr, PDL: tl.constexpr):
    """out (B,) = the first index of the largest of x (B, V). Grid (B,)."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    x += tl.program_id(0).to(tl.int64) * x_b
    v = tl.arange(0, BV)
    best = tl.load(x + v, mask=v < V, other=float("-inf")).to(tl.float32)
    where = v
    for start in range(BV, V, BV):
        value = tl.load(x + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, start + v, where)
    first = tl.where(best == tl.max(best, axis=0), where, V)
    # Where not even one is equal to the largest, as with NaN, the answer is still an index.
    tl.store(out + tl.program_id(0), tl.minimum(tl.min(first, axis=0), V - 1).to(out.dtype.element_ty))


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps) of typical calls, for tests/kernels/test_triton_compiles.py."""
    half, wide = "*bf16", "*fp32"
    pointers = {"x": wide, "norm_weight": half, "weight": half, "bias": half, "out": half, "conv_state": wide}
    signature = pointers | {"conv_weight": half, "conv_bias": half}
    signature |= dict.fromkeys(("x_b", "out_b", "K", "R", "conv_first", "conv_channels"), "i32") | {"eps": "fp32"}
    tile = {"BATCH": 2, "BR": 8, "BK": 1024, "PDL": False}
    yield linear_step_kernel, signature, {"NORM": True, "ADD": False, "W": 4} | tile, 4
    yield linear_step_kernel, signature | {"x": half, "out": wide}, {"NORM": False, "ADD": True, "W": 0} | tile, 4
    signature = dict.fromkeys(("state",), wide) | dict.fromkeys(("x", "z", "selected", "dt_weight"), half)
    signature |= dict.fromkeys(("dt_bias", "A_log", "D", "out"), half)
    signature |= dict.fromkeys(("channels", "x_b", "z_b", "selected_b", "P"), "i32")
    yield state_step_kernel, signature, {"N": 16, "BN": 16, "BP": 64, "BD": 16, "PDL": False}, 4
    signature = {"state": wide} | dict.fromkeys(("x", "B", "C", "z", "dt", "dt_bias", "A_log", "D"), half)
    signature |= {"out": wide, "heads": "i32", "channels": "i32", "group_heads": "i32"}
    signature |= dict.fromkeys(("x_b", "z_b", "dt_b", "D_h", "D_p"), "i32") | {"least": "fp32", "most": "fp32"}
    yield head_step_kernel, signature, {"N": 128, "BN": 128, "BP": 4, "GATE": True, "PDL": False}, 4
    yield embed_kernel, {"ids": "*i64", "table": half, "out": wide, "K": "i32"}, {"BK": 1024}, 4
    signature = {"x": half, "out": "*i64", "x_b": "i32", "V": "i32"}
    yield argmax_kernel, signature, {"BV": 16384, "PDL": False}, 16
