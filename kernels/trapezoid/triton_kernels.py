"""Triton kernels before Mamba-3's recurrence, which itself is Mamba-2's. Shapes and launches are in triton_launch.py.

``keys_forward`` makes q and k of every head: bias and rotation. A program takes T steps of a few heads, whose B and C
are loaded once. The angle at a step is the sum of the turns since the chunk began, a product with a triangle of ones,
from which steps of an earlier sequence are left out, and the carry, the angle before the chunk. ``keys_backward`` goes
back the same way for all heads of a group in turn, so that the gradients of B, C and the angles are added up in
registers.

A row of N numbers is held as its pairs, (T, N/2) twice: loaded and stored side by side, split and joined in registers.
Arithmetic is float32; offsets are int64.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

PI = tl.constexpr(3.141592653589793)


@triton.jit
def _load_pairs(rows, here, N, HALF: tl.constexpr):
    """Rows (T, 1) of N numbers: the first and the second of each pair, (T, HALF) each, float32, zero outside."""
    n = tl.arange(0, 2 * HALF)[None, :]
    values = tl.load(rows + n, mask=here & (n < N), other=0.0).to(tl.float32)
    return tl.split(tl.reshape(values, [values.shape[0], HALF, 2]))


@triton.jit
def _store_pairs(rows, here, first, second, N, HALF: tl.constexpr):
    """The inverse of ``_load_pairs``."""
    n = tl.arange(0, 2 * HALF)[None, :]
    values = tl.reshape(tl.join(first, second), [first.shape[0], 2 * HALF])
    tl.store(rows + n, values.to(rows.dtype.element_ty), mask=here & (n < N))


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def _cos_sin(x):
    """Both at once, to the last places of float32 while x is below some thousands.

    Triton's own also serve numbers past 10^5, by code that takes registers and local memory from every other call. As
    in Cephes: the nearest multiple of pi/2 is subtracted in three parts, and two polynomials serve the rest.
    """
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)
    r = ((x - quarter * 1.5703125) - quarter * 4.837512969970703e-4) - quarter * 7.549789954891882e-8
    r2 = r * r
    sin = r + r * r2 * (-1.6666654611e-1 + r2 * (8.3321608736e-3 - r2 * 1.9515295891e-4))
    cos = 1.0 - 0.5 * r2 + r2 * r2 * (4.166664568298827e-2 + r2 * (-1.388731625493765e-3 + r2 * 2.443315711809948e-5))
    turns = quarter.to(tl.int32)
    odd = (turns & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((turns + 1) & 2) == 2, -cos, cos), tl.where((turns & 2) == 2, -sin, sin)


@triton.jit
def _speeds(angles, t, L, S, step_stride, HALF: tl.constexpr):
    """(T, HALF): pi tanh(angles) of each pair, zero for the pairs that do not rotate."""
    s = tl.arange(0, HALF)[None, :]
    raw = tl.load(angles + t[:, None] * step_stride + s, mask=(t < L)[:, None] & (s < S), other=0.0)
    return _tanh(raw.to(tl.float32)) * PI


@triton.jit
def _same_sequence(runs, t, L, T: tl.constexpr):
    """Which earlier steps a step's sum takes, (T, T) ones and zeros, and which steps the carry reaches, (T, 1)."""
    steps = tl.arange(0, T)
    summed = steps[:, None] >= steps[None, :]
    carried = t < L
    if runs is not None:
        run = tl.load(runs + t, mask=t < L, other=-1)
        begin = tl.min(t, axis=0)
        carried = run == tl.load(runs + tl.maximum(begin - 1, 0))  # the element before the chunk; of the first, itself
        across = tl.load(runs + begin + steps[None, :], mask=begin + steps[None, :] < L, other=-1)
        summed = summed & (run[:, None] == across)
    return summed.to(tl.float32), carried[:, None]


@triton.jit
def keys_forward(
    B,
    C,
    B_bias,
    C_bias,
    angles,
    dt,
    carry,
    runs,
    q,
    k,
    dots,
    L,
    H,
    G,
    N,
    S,
    B_batch,
    B_step,
    B_group,
    C_batch,
    C_step,
    C_group,
    angles_batch,
    angles_step,
    T: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """q of the step after (the last row zeros), k, and the product of the two at the same step. Grid (chunks, B, blocks
    of HEADS heads of one group). B_bias and C_bias, and runs, may be None.
    """
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(2) // G
    group, block = tl.program_id(2) // blocks, tl.program_id(2) % blocks
    begin = chunk * T
    t = begin + tl.arange(0, T)
    wide_t = t.to(tl.int64)
    here = (t < L)[:, None]
    if runs is not None:
        runs += batch * L
    summed, carried = _same_sequence(runs, t, L, T)
    speeds = _speeds(angles + batch * angles_batch, wide_t, L, S, angles_step, HALF)
    b0, b1 = _load_pairs(B + batch * B_batch + group * B_group + wide_t[:, None] * B_step, here, N, HALF)
    c0, c1 = _load_pairs(C + batch * C_batch + group * C_group + wide_t[:, None] * C_step, here, N, HALF)
    s = tl.arange(0, HALF)[None, :]
    one = tl.zeros([1, 1], tl.int32)
    last_head = (group + 1) * (H // G)
    for i in range(HEADS):
        h = group * (H // G) + block * HEADS + i
        if h < last_head:
            row = (batch * L + wide_t) * H + h
            step = tl.load(dt + row, mask=t < L, other=0.0)[:, None]
            before = tl.load(carry + ((batch * tl.cdiv(L, T) + chunk) * H + h) * S + s, mask=s < S, other=0.0)
            angle = tl.dot(summed, speeds * step, input_precision="tf32x3") + tl.where(carried, before, 0.0)
            cos, sin = _cos_sin(angle)
            k0, k1, q0, q1 = b0, b1, c0, c1
            if B_bias is not None:
                bias0, bias1 = _load_pairs(B_bias + h * N + one, one == 0, N, HALF)
                k0, k1 = k0 + bias0, k1 + bias1
            if C_bias is not None:
                bias0, bias1 = _load_pairs(C_bias + h * N + one, one == 0, N, HALF)
                q0, q1 = q0 + bias0, q1 + bias1
            tl.store(dots + row, tl.sum(q0 * k0 + q1 * k1, axis=1), mask=t < L)
            rows = row[:, None] * N
            _store_pairs(k + rows, here, k0 * cos - k1 * sin, k0 * sin + k1 * cos, N, HALF)
            _store_pairs(q + rows - H * N, here & (t > 0)[:, None], q0 * cos - q1 * sin, q0 * sin + q1 * cos, N, HALF)
            if begin + T >= L:
                zero = tl.zeros([T, HALF], tl.float32)
                _store_pairs(q + rows, (t == L - 1)[:, None], zero, zero, N, HALF)


@triton.jit
def keys_backward(
    dq,
    dk,
    ddots,
    B,
    C,
    B_bias,
    C_bias,
    angles,
    dt,
    carry,
    runs,
    dB,
    dC,
    dB_bias,
    dC_bias,
    dangles,
    ddt,
    dcarry,
    L,
    H,
    G,
    N,
    S,
    B_batch,
    B_step,
    B_group,
    C_batch,
    C_step,
    C_group,
    angles_batch,
    angles_step,
    T: tl.constexpr,
    HALF: tl.constexpr,
):
    """Gradients of ``keys_forward``. Grid (chunks, B, G); dB, dC (B, L, G, N); dangles (G, B, L, S); each program's
    sums over its steps dB_bias, dC_bias (B, chunks, H, N); ddt (B, L, H); dcarry (B, chunks, H, S).
    """
    chunk, batch, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    chunks = tl.num_programs(0)
    begin = chunk * T
    t = begin + tl.arange(0, T)
    wide_t = t.to(tl.int64)
    here = (t < L)[:, None]
    if runs is not None:
        runs += batch * L
    summed, carried = _same_sequence(runs, t, L, T)
    speeds = _speeds(angles + batch * angles_batch, wide_t, L, S, angles_step, HALF)
    b0, b1 = _load_pairs(B + batch * B_batch + group * B_group + wide_t[:, None] * B_step, here, N, HALF)
    c0, c1 = _load_pairs(C + batch * C_batch + group * C_group + wide_t[:, None] * C_step, here, N, HALF)
    s = tl.arange(0, HALF)[None, :]
    zero = tl.zeros([T, HALF], tl.float32)
    db0, db1, dc0, dc1, dspeeds = zero, zero, zero, zero, zero
    one = tl.zeros([1, 1], tl.int32)
    for i in range(H // G):
        h = group * (H // G) + i
        row = (batch * L + wide_t) * H + h
        rows = row[:, None] * N
        g0, g1 = _load_pairs(dk + rows, here, N, HALF)
        f0, f1 = _load_pairs(dq + rows - H * N, here & (t > 0)[:, None], N, HALF)
        dot = tl.load(ddots + row, mask=t < L, other=0.0)[:, None]
        step = tl.load(dt + row, mask=t < L, other=0.0)[:, None]
        of_chunk = (batch * chunks + chunk) * H + h
        before = tl.load(carry + of_chunk * S + s, mask=s < S, other=0.0)
        angle = tl.dot(summed, speeds * step, input_precision="tf32x3") + tl.where(carried, before, 0.0)
        cos, sin = _cos_sin(angle)
        # Turned back, the gradients are those of the biased rows, and the angle's is the cross product with these.
        g0, g1 = g0 * cos + g1 * sin, g1 * cos - g0 * sin
        f0, f1 = f0 * cos + f1 * sin, f1 * cos - f0 * sin
        k0, k1, q0, q1 = b0, b1, c0, c1
        if B_bias is not None:
            bias0, bias1 = _load_pairs(B_bias + h * N + one, one == 0, N, HALF)
            k0, k1 = k0 + bias0, k1 + bias1
        if C_bias is not None:
            bias0, bias1 = _load_pairs(C_bias + h * N + one, one == 0, N, HALF)
            q0, q1 = q0 + bias0, q1 + bias1
        dangle = (g1 * k0 - g0 * k1) + (f1 * q0 - f0 * q1)
        # What does not rotate has an angle of 0 all the same: its gradient is not one.
        dangle = tl.where(s < S, dangle, 0.0)
        dturns = tl.dot(tl.trans(summed), dangle, input_precision="tf32x3")
        tl.store(ddt + row, tl.sum(dturns * speeds, axis=1), mask=t < L)
        tl.store(dcarry + of_chunk * S + s, tl.sum(tl.where(carried, dangle, 0.0), axis=0)[None, :], mask=s < S)
        dspeeds += dturns * step
        g0, g1, f0, f1 = g0 + dot * q0, g1 + dot * q1, f0 + dot * k0, f1 + dot * k1
        db0, db1, dc0, dc1 = db0 + g0, db1 + g1, dc0 + f0, dc1 + f1
        if dB_bias is not None:
            bias0, bias1 = tl.sum(g0, axis=0)[None, :], tl.sum(g1, axis=0)[None, :]
            _store_pairs(dB_bias + of_chunk * N + one, one == 0, bias0, bias1, N, HALF)
        if dC_bias is not None:
            bias0, bias1 = tl.sum(f0, axis=0)[None, :], tl.sum(f1, axis=0)[None, :]
            _store_pairs(dC_bias + of_chunk * N + one, one == 0, bias0, bias1, N, HALF)
    rows = ((batch * L + wide_t) * G + group)[:, None] * N
    _store_pairs(dB + rows, here, db0, db1, N, HALF)
    _store_pairs(dC + rows, here, dc0, dc1, N, HALF)
    # The derivative of pi tanh is pi (1 - tanh²).
    tanh = speeds / PI
    rows = ((group * tl.num_programs(1) + batch) * L + wide_t)[:, None] * S
    tl.store(dangles + rows + s, (1.0 - tanh * tanh) * PI * dspeeds, mask=here & (s < S))


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    strides = {f"{name}_{axis}": "i64" for name in "BC" for axis in ("batch", "step", "group")}
    strides |= {"angles_batch": "i64", "angles_step": "i64"}
    sizes = dict.fromkeys(("L", "H", "G", "N", "S"), "i32")
    inputs = {"B": "*bf16", "C": "*bf16", "B_bias": "*fp32", "C_bias": "*fp32", "angles": "*bf16", "dt": "*fp32"}
    inputs |= {"carry": "*fp32", "runs": "*i32"}
    outputs = {"q": "*bf16", "k": "*bf16", "dots": "*fp32"}
    gradients = {"dB": "*bf16", "dC": "*bf16"}
    gradients |= dict.fromkeys(("dB_bias", "dC_bias", "dangles", "ddt", "dcarry"), "*fp32")
    tile = {"T": 16, "HALF": 64}
    for given in ({}, {"runs": None}, {"B_bias": None, "C_bias": None}):
        constants = tile | given | {"HEADS": 4}
        yield example(keys_forward, inputs | outputs | sizes | strides, constants, 4)
        given = given | {f"d{name}": None for name in given if name != "runs"}
        arguments = {"dq": "*bf16", "dk": "*bf16", "ddots": "*fp32"} | inputs | gradients | sizes | strides
        yield example(keys_backward, arguments, tile | given, 8)


def example(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    return kernel, signature | dict.fromkeys(constants, "constexpr"), constants, num_warps
