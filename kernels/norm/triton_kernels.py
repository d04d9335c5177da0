"""One Triton kernel for every norm, and one for its gradient. Shapes, strides and launches are in triton_launch.py.

A row of K channels (a group of G * K) lies in registers, BR rows to a program; the second axis of the grid is the
group. What is normalised is ``s``: x, or x + residual, or x * silu(z). Arithmetic is float32; row offsets are int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

# Where the gate silu(z) stands.
NO_GATE, GATE_BEFORE_NORM, GATE_AFTER_NORM = (tl.constexpr(value) for value in range(3))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
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
    CENTERED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """y, and for the backward summed (with a residual), mean (when CENTERED) and rstd. Grid (tiles of R, G)."""
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    k = tl.arange(0, BK)
    column = group * K + k
    inside = (row < R)[:, None] & (k < K)[None, :]
    out = row[:, None] * (groups * K) + column[None, :]
    s = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual + row[:, None] * residual_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(summed.dtype.element_ty)
        tl.store(summed + out, rounded, mask=inside)
        s = rounded.to(tl.float32)
    if GATE != NO_GATE:
        gate = tl.load(z + row[:, None] * z_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = gate * _sigmoid(gate)
        if GATE == GATE_BEFORE_NORM:
            s = s * gate
    if CENTERED:
        centre = tl.sum(s, axis=1) / K
        tl.store(mean + row, centre, mask=row < R)
        s = tl.where(inside, s - centre[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / K + eps)
    tl.store(rstd + row * groups + group, scale, mask=row < R)
    result = s * scale[:, None] * tl.load(weight + column, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + column, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if GATE == GATE_AFTER_NORM:
        result = result * gate
    tl.store(y + out, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    dy,
    dsummed,
    s,
    z,
    weight,
    mean,
    rstd,
    dx,
    dz,
    dweight,
    dbias,
    R,
    K,
    dy_row,
    dsummed_row,
    s_row,
    z_row,
    CENTERED: tl.constexpr,
    HAS_DSUMMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """dx (the gradient of s where there is no gate), dz, and each program's share of dweight and dbias: partial sums
    that the caller adds up in a fixed order. Grid (programs, G); program p takes tiles p, p + programs, ...
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BK)
    column = group * K + k
    w = tl.load(weight + column, mask=k < K, other=0.0).to(tl.float32)[None, :]
    dweight_sum = tl.zeros([BK], tl.float32)
    dbias_sum = tl.zeros([BK], tl.float32)
    for tile in range(program, tl.cdiv(R, BR), programs):
        row = (tile * BR + tl.arange(0, BR)).to(tl.int64)
        inside = (row < R)[:, None] & (k < K)[None, :]
        out = row[:, None] * (groups * K) + column[None, :]
        grad = tl.load(dy + row[:, None] * dy_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(s + row[:, None] * s_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row * groups + group, mask=row < R, other=0.0)[:, None]
        normed = value
        if GATE != NO_GATE:
            before = tl.load(z + row[:, None] * z_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
            sigmoid = _sigmoid(before)
            gate = before * sigmoid
            slope = sigmoid * (1.0 + before * (1.0 - sigmoid))
            if GATE == GATE_BEFORE_NORM:
                normed = normed * gate
        if CENTERED:
            centre = tl.load(mean + row, mask=row < R, other=0.0)[:, None]
            normed = tl.where(inside, normed - centre, 0.0)
        normed = normed * scale
        if GATE == GATE_AFTER_NORM:
            tl.store(dz + out, (grad * normed * w * slope).to(dz.dtype.element_ty), mask=inside)
            grad = grad * gate
        dweight_sum += tl.sum(grad * normed, axis=0)
        if HAS_BIAS:
            dbias_sum += tl.sum(grad, axis=0)
        grad = grad * w
        ds = grad - normed * (tl.sum(grad * normed, axis=1) / K)[:, None]
        if CENTERED:
            ds -= (tl.sum(grad, axis=1) / K)[:, None]
        ds = ds * scale
        if HAS_DSUMMED:
            ds += tl.load(dsummed + row[:, None] * dsummed_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATE == GATE_BEFORE_NORM:
            tl.store(dz + out, (ds * value * slope).to(dz.dtype.element_ty), mask=inside)
            ds = ds * gate
        tl.store(dx + out, ds.to(dx.dtype.element_ty), mask=inside)
    partial = program.to(tl.int64) * (groups * K) + column
    tl.store(dweight + partial, dweight_sum, mask=k < K)
    if HAS_BIAS:
        tl.store(dbias + partial, dbias_sum, mask=k < K)


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    forward = {"x": "*bf16", "residual": "*fp32", "z": "*bf16", "weight": "*fp32", "bias": "*fp32", "y": "*bf16"}
    forward |= {"summed": "*fp32", "mean": "*fp32", "rstd": "*fp32", "R": "i32", "K": "i32", "eps": "fp32"}
    forward |= dict.fromkeys(("x_row", "residual_row", "z_row"), "i64")
    backward = {"dy": "*bf16", "dsummed": "*fp32", "s": "*fp32", "z": "*bf16", "weight": "*fp32"}
    backward |= dict.fromkeys(("mean", "rstd", "dx", "dz", "dweight", "dbias"), "*fp32") | {"R": "i32", "K": "i32"}
    backward |= dict.fromkeys(("dy_row", "dsummed_row", "s_row", "z_row"), "i64")
    for centered, gate in ((False, NO_GATE), (True, NO_GATE), (False, GATE_BEFORE_NORM), (False, GATE_AFTER_NORM)):
        plain = gate.value == NO_GATE.value
        flags = {"CENTERED": centered, "HAS_BIAS": plain, "GATE": gate.value, "BR": 2}
        constants = {**flags, "HAS_RESIDUAL": plain, "BK": 1024}
        yield norm_forward, forward | dict.fromkeys(constants, "constexpr"), constants, 4
        constants = {**flags, "HAS_DSUMMED": plain, "BK": 512}
        yield norm_backward, backward | dict.fromkeys(constants, "constexpr"), constants, 4
