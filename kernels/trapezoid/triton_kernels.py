"""Triton kernels before Mamba-3's recurrence, which itself is Mamba-2's. Shapes and launches are in triton_launch.py.

``keys_forward`` makes q and k of every head: bias and rotation. A program takes T steps of a few heads, whose B and C
are loaded once. ``keys_backward`` goes through all heads of a group in turn, so that the gradients of B and C are added
up in registers.

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
def _rotation(angle, here, S, HALF: tl.constexpr):
    """Cosine and sine of rows of S angles, (T, HALF) each: 1 and 0 of the pairs that do not rotate."""
    s = tl.arange(0, HALF)[None, :]
    return _cos_sin(tl.load(angle + s, mask=here & (s < S), other=0.0))


@triton.jit
def _biased(pairs, bias, h, N, HALF: tl.constexpr):
    """Pairs with the bias (H, N) of one head, which may be None."""
    if bias is None:
        return pairs
    else:
        one = tl.zeros([1, 1], tl.int32)
        first, second = _load_pairs(bias + h * N + one, one == 0, N, HALF)
        return pairs[0] + first, pairs[1] + second


@triton.jit
def keys_forward(
    B,
    C,
    B_bias,
    C_bias,
    angle,
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
    T: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """q of the step after (the last row zeros), k, and the product of the two at the same step. Grid (chunks, B, blocks
    of HEADS heads of one group). B_bias and C_bias may be None.
    """
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(2) // G
    group, block = tl.program_id(2) // blocks, tl.program_id(2) % blocks
    t = (chunk * T + tl.arange(0, T)).to(tl.int64)[:, None]
    here = t < L
    b = _load_pairs(B + batch * B_batch + group * B_group + t * B_step, here, N, HALF)
    c = _load_pairs(C + batch * C_batch + group * C_group + t * C_step, here, N, HALF)
    for i in range(HEADS):
        h = group * (H // G) + block * HEADS + i
        if h < (group + 1) * (H // G):
            row = (batch * L + t) * H + h
            cos, sin = _rotation(angle + row * S, here, S, HALF)
            k0, k1 = _biased(b, B_bias, h, N, HALF)
            q0, q1 = _biased(c, C_bias, h, N, HALF)
            tl.store(dots + row, tl.sum(q0 * k0 + q1 * k1, axis=1, keep_dims=True), mask=here)
            _store_pairs(k + row * N, here, k0 * cos - k1 * sin, k0 * sin + k1 * cos, N, HALF)
            earlier = row * N - H * N
            _store_pairs(q + earlier, here & (t > 0), q0 * cos - q1 * sin, q0 * sin + q1 * cos, N, HALF)
            if chunk * T + T >= L:
                zero = tl.zeros([T, HALF], tl.float32)
                _store_pairs(q + row * N, t == L - 1, zero, zero, N, HALF)


@triton.jit
def keys_backward(
    dq,
    dk,
    ddots,
    B,
    C,
    B_bias,
    C_bias,
    angle,
    dB,
    dC,
    dbias,
    dangle,
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
    T: tl.constexpr,
    HALF: tl.constexpr,
):
    """Gradients of ``keys_forward``. Grid (chunks, B, G); dB, dC (B, L, G, N); dangle (B, L, H, S); each program's sums
    over its steps, of both biases, dbias (B, chunks, H, 2, N).
    """
    chunk, batch, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    t = (chunk * T + tl.arange(0, T)).to(tl.int64)[:, None]
    here = t < L
    b = _load_pairs(B + batch * B_batch + group * B_group + t * B_step, here, N, HALF)
    c = _load_pairs(C + batch * C_batch + group * C_group + t * C_step, here, N, HALF)
    s, n = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)[None, :]
    zero = tl.zeros([T, HALF], tl.float32)
    db0, db1, dc0, dc1 = zero, zero, zero, zero
    for i in range(H // G):
        h = group * (H // G) + i
        row = (batch * L + t) * H + h
        g0, g1 = _load_pairs(dk + row * N, here, N, HALF)
        f0, f1 = _load_pairs(dq + (row - H) * N, here & (t > 0), N, HALF)
        dot = tl.load(ddots + row, mask=here, other=0.0)
        cos, sin = _rotation(angle + row * S, here, S, HALF)
        # Turned back, the gradients are those of the biased rows, and the angle's is the cross product with these.
        g0, g1 = g0 * cos + g1 * sin, g1 * cos - g0 * sin
        f0, f1 = f0 * cos + f1 * sin, f1 * cos - f0 * sin
        k0, k1 = _biased(b, B_bias, h, N, HALF)
        q0, q1 = _biased(c, C_bias, h, N, HALF)
        tl.store(dangle + row * S + s, (g1 * k0 - g0 * k1) + (f1 * q0 - f0 * q1), mask=here & (s < S))
        g0, g1, f0, f1 = g0 + dot * q0, g1 + dot * q1, f0 + dot * k0, f1 + dot * k1
        db0, db1, dc0, dc1 = db0 + g0, db1 + g1, dc0 + f0, dc1 + f1
        # One sum of all four, since each is a round through shared memory: (HALF, pair, B or C).
        sums = tl.sum(tl.join(tl.join(g0, g1), tl.join(f0, f1)), axis=0)
        sums = tl.reshape(tl.permute(sums, (2, 0, 1)), [2, 2 * HALF])
        of_pair = 2 * ((batch * tl.num_programs(0) + chunk) * H + h) + tl.arange(0, 2)[:, None]
        tl.store(dbias + of_pair * N + n, sums, mask=n < N)
    row = ((batch * L + t) * G + group) * N
    _store_pairs(dB + row, here, db0, db1, N, HALF)
    _store_pairs(dC + row, here, dc0, dc1, N, HALF)


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    numbers = dict.fromkeys(("L", "H", "G", "N", "S"), "i32")
    numbers |= {f"{name}_{axis}": "i64" for name in "BC" for axis in ("batch", "step", "group")}
    inputs = {"B": "*bf16", "C": "*bf16", "B_bias": "*fp32", "C_bias": "*fp32", "angle": "*fp32"}
    outputs = {"q": "*bf16", "k": "*bf16", "dots": "*fp32"}
    gradients = {"dq": "*bf16", "dk": "*bf16", "ddots": "*fp32", "dB": "*bf16", "dC": "*bf16"}
    gradients |= {"dbias": "*fp32", "dangle": "*fp32"}
    for given in ({}, {"B_bias": None, "C_bias": None}):
        tile = {"T": 16, "HALF": 64} | given
        yield example(keys_forward, inputs | outputs | numbers, tile | {"HEADS": 4}, 8)
        yield example(keys_backward, gradients | inputs | numbers, tile | {"T": 32}, 8)


def example(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    return kernel, signature | dict.fromkeys(constants, "constexpr"), constants, num_warps
