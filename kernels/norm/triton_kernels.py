"""One Triton kernel for every norm, and one for its gradient. Shapes, strides and launches are in triton_launch.py.

A row of K channels (a group of G * K) lies in registers as NT tiles of TK channels, BR rows to a program; the second
axis of the grid is the group. A tile gives each thread four neighbouring channels, so that float32 moves 16 bytes and
bfloat16 8 a thread, side by side; one warp (of short rows half of one) holds a row up to 1,024 channels, and its sums
need no shared memory. All tiles are loaded before the first store: a load may not pass a store to who knows where.
What is normalised is ``s``: x, or x + residual, or x * silu(z). Arithmetic is float32; row offsets are int64.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

# Where the gate silu(z) stands.
NO_GATE, GATE_BEFORE_NORM, GATE_AFTER_NORM = (tl.constexpr(value) for value in range(3))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)). A division costs five instructions, a reciprocal square root one and its square another."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _load_tiles(rows, in_rows, K, NT: tl.constexpr, TK: tl.constexpr):
    """The NT tiles of rows (BR, 1), as they are stored, zero outside."""
    tiles = ()
    for i in tl.static_range(NT):
        k = (i * TK + tl.arange(0, TK))[None, :]
        tiles += (tl.load(rows + k, mask=in_rows & (k < K), other=0.0),)
    return tiles


@triton.jit
def _store_tiles(rows, in_rows, tiles, K, NT: tl.constexpr, TK: tl.constexpr):
    for i in tl.static_range(NT):
        k = (i * TK + tl.arange(0, TK))[None, :]
        tl.store(rows + k, tiles[i].to(rows.dtype.element_ty), mask=in_rows & (k < K))


@triton.jit
def _mean_of_products(left, right, K, NT: tl.constexpr):
    """(BR, 1), the mean over the channels of left * right; of left alone where right is None."""
    total = left[0] if right is None else left[0] * right[0]
    for i in tl.static_range(1, NT):
        total += left[i] if right is None else left[i] * right[i]
    return tl.sum(total, axis=1, keep_dims=True) / K


@triton.jit
def _less(tiles, mean, in_rows, K, NT: tl.constexpr, TK: tl.constexpr):
    """tiles - mean, still zero outside."""
    out = ()
    for i in tl.static_range(NT):
        k = (i * TK + tl.arange(0, TK))[None, :]
        out += (tl.where(in_rows & (k < K), tiles[i] - mean, 0.0),)
    return out


@triton.jit(do_not_specialize=["R"])
def norm_forward(
    x,
    residual,
    z,
    weight,
    bias,
    y,
    summed,
    mean,
    rstd,
    R,
    K,
    eps,
    x_row,
    residual_row,
    z_row,
    GATE: tl.constexpr,
    BR: tl.constexpr,
    NT: tl.constexpr,
    TK: tl.constexpr,
):
    """y, and for the backward rstd, with a residual summed, and unless mean is None (an RMS norm) mean. Grid (tiles of
    R, G). residual with summed, z and bias may be None.
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    here = row < R
    column = group * K
    out = row * (groups * K) + column
    x_tiles = _load_tiles(x + row * x_row + column, here, K, NT, TK)
    if residual is not None:
        residual_tiles = _load_tiles(residual + row * residual_row + column, here, K, NT, TK)
    if GATE != NO_GATE:
        z_tiles = _load_tiles(z + row * z_row + column, here, K, NT, TK)
    every = tl.zeros([BR, 1], tl.int32) + column  # each row loads the weights itself: 16 bytes a thread, no exchange
    w = _load_tiles(weight + every, here, K, NT, TK)
    if bias is not None:
        shift = _load_tiles(bias + every, here, K, NT, TK)
    s = ()
    gates = ()
    for i in tl.static_range(NT):
        value = x_tiles[i].to(tl.float32)
        if residual is not None:
            value = (value + residual_tiles[i].to(tl.float32)).to(summed.dtype.element_ty).to(tl.float32)
        if GATE != NO_GATE:
            gate = z_tiles[i].to(tl.float32)
            gate = gate * _sigmoid(gate)
            gates += (gate,)
            if GATE == GATE_BEFORE_NORM:
                value = value * gate
        s += (value,)
    if residual is not None:
        _store_tiles(summed + out, here, s, K, NT, TK)
    if mean is not None:
        centre = _mean_of_products(s, None, K, NT)
        tl.store(mean + row, centre, mask=here)
        s = _less(s, centre, here, K, NT, TK)
    scale = tl.rsqrt(_mean_of_products(s, s, K, NT) + eps)
    tl.store(rstd + row * groups + group, scale, mask=here)
    results = ()
    for i in tl.static_range(NT):
        result = s[i] * scale * w[i].to(tl.float32)
        if bias is not None:
            result += shift[i].to(tl.float32)
        if GATE == GATE_AFTER_NORM:
            result = result * gates[i]
        results += (result,)
    _store_tiles(y + out, here, results, K, NT, TK)


@triton.jit(do_not_specialize=["R"])
def norm_backward(
    dy,
    dsummed,
    s,
    z,
    weight,
    mean,
    rstd,
    ds,
    dx,
    dz,
    recomputed,
    dweight,
    dbias,
    R,
    K,
    dy_row,
    dsummed_row,
    s_row,
    z_row,
    dz_row,
    GATE: tl.constexpr,
    BR: tl.constexpr,
    NT: tl.constexpr,
    TK: tl.constexpr,
):
    """ds, the gradient of s or of x under a gate, the same again in dx's dtype, dz, under a gate the forward's y
    (``recomputed``), and each program's share of dweight and dbias: partial sums that the caller adds up in a fixed
    order. Grid (programs, G); program p takes the BR rows number p, p + programs, ... dsummed, z with dz, mean (an RMS
    norm), dx, recomputed and dbias may be None.
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = group * K
    every = tl.zeros([BR, 1], tl.int32)
    w = _load_tiles(weight + every + column, every == 0, K, NT, TK)
    zero = tl.zeros([BR, TK], tl.float32)
    dweights = ()
    dbiases = ()
    for _ in tl.static_range(NT):
        dweights += (zero,)
        dbiases += (zero,)
    for tile in range(program, tl.cdiv(R, BR), programs):
        row = (tile * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
        here = row < R
        out = row * (groups * K) + column
        dy_tiles = _load_tiles(dy + row * dy_row + column, here, K, NT, TK)
        s_tiles = _load_tiles(s + row * s_row + column, here, K, NT, TK)
        if dsummed is not None:
            dsummed_tiles = _load_tiles(dsummed + row * dsummed_row + column, here, K, NT, TK)
        if GATE != NO_GATE:
            z_tiles = _load_tiles(z + row * z_row + column, here, K, NT, TK)
        scale = tl.load(rstd + row * groups + group, mask=here, other=0.0)
        values = ()
        for i in tl.static_range(NT):
            value = s_tiles[i].to(tl.float32)
            if GATE == GATE_BEFORE_NORM:
                gate = z_tiles[i].to(tl.float32)
                value = value * (gate * _sigmoid(gate))
            values += (value,)
        if mean is not None:
            centre = tl.load(mean + row, mask=here, other=0.0)
            values = _less(values, centre, here, K, NT, TK)
        normed = ()
        grads = ()
        more_dweights = ()
        more_dbiases = ()
        dzs = ()
        ys = ()
        for i in tl.static_range(NT):
            grad = dy_tiles[i].to(tl.float32)
            normed += (values[i] * scale,)
            if recomputed is not None:
                again = normed[i] * w[i].to(tl.float32)
                if GATE == GATE_AFTER_NORM:
                    again = again * z_tiles[i].to(tl.float32) * _sigmoid(z_tiles[i].to(tl.float32))
                ys += (again,)
            if GATE == GATE_AFTER_NORM:
                before = z_tiles[i].to(tl.float32)
                sigmoid = _sigmoid(before)
                dzs += (grad * normed[i] * w[i].to(tl.float32) * (sigmoid * (1.0 + before * (1.0 - sigmoid))),)
                grad = grad * (before * sigmoid)
            more_dweights += (dweights[i] + grad * normed[i],)
            if dbias is not None:
                more_dbiases += (dbiases[i] + grad,)
            grads += (grad * w[i].to(tl.float32),)
        dweights = more_dweights
        if dbias is not None:
            dbiases = more_dbiases
        along = _mean_of_products(grads, normed, K, NT)
        if mean is not None:
            shared = _mean_of_products(grads, None, K, NT)
        results = ()
        for i in tl.static_range(NT):
            result = grads[i] - normed[i] * along
            if mean is not None:
                result -= shared
            result = result * scale
            if dsummed is not None:
                result += dsummed_tiles[i].to(tl.float32)
            if GATE == GATE_BEFORE_NORM:
                before = z_tiles[i].to(tl.float32)
                sigmoid = _sigmoid(before)
                dzs += (result * s_tiles[i].to(tl.float32) * (sigmoid * (1.0 + before * (1.0 - sigmoid))),)
                result = result * (before * sigmoid)
            results += (result,)
        if GATE != NO_GATE:
            _store_tiles(dz + row * dz_row + column, here, dzs, K, NT, TK)
            if recomputed is not None:
                _store_tiles(recomputed + out, here, ys, K, NT, TK)
        _store_tiles(ds + out, here, results, K, NT, TK)
        if dx is not None:
            _store_tiles(dx + out, here, results, K, NT, TK)
    partial = program.to(tl.int64) * (groups * K) + column
    for i in tl.static_range(NT):
        k = i * TK + tl.arange(0, TK)
        tl.store(dweight + partial + k, tl.sum(dweights[i], axis=0), mask=k < K)
        if dbias is not None:
            tl.store(dbias + partial + k, tl.sum(dbiases[i], axis=0), mask=k < K)


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    forward = {"x": "*bf16", "residual": "*fp32", "z": "*bf16", "weight": "*fp32", "bias": "*fp32", "y": "*bf16"}
    forward |= {"summed": "*fp32", "mean": "*fp32", "rstd": "*fp32", "R": "i32", "K": "i32", "eps": "fp32"}
    forward |= dict.fromkeys(("x_row", "residual_row", "z_row"), "i64")
    backward = {"dy": "*bf16", "dsummed": "*fp32", "s": "*fp32", "z": "*bf16", "weight": "*fp32", "dx": "*bf16"}
    backward |= {"recomputed": "*bf16", "dz_row": "i64"}
    backward |= dict.fromkeys(("mean", "rstd", "ds", "dz", "dweight", "dbias"), "*fp32") | {"R": "i32", "K": "i32"}
    backward |= dict.fromkeys(("dy_row", "dsummed_row", "s_row", "z_row"), "i64")
    for centered, gate in ((False, NO_GATE), (True, NO_GATE), (False, GATE_BEFORE_NORM), (False, GATE_AFTER_NORM)):
        constants = {"GATE": gate.value, "BR": 4, "NT": 6, "TK": 128}
        absent: list[str] = [] if centered else ["mean", "bias", "dbias"]
        absent += ["residual", "summed", "dsummed", "dx"] if gate.value else ["z", "dz", "recomputed"]
        for kernel, signature in ((norm_forward, forward), (norm_backward, backward)):
            fixed = constants | {name: None for name in absent if name in signature}
            yield kernel, signature | dict.fromkeys(fixed, "constexpr"), fixed, 4
