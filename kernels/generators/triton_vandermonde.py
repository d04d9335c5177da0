"""Sums of exponentials in Triton, and their transpose. Shapes and launches are in triton_launch.py.

A program has one row (a channel) and a tile of BI * BJ times, l = begin + BJ i + j. exp(x l) = exp(x (begin + BJ i))
exp(x j): the tile is the product of a (BI, N) and an (N, BJ) matrix, BI + BJ exponentials a state in place of BI BJ.
The products run on tensor cores, three of tf32 for one, which keeps float32's precision. Arithmetic is float32, phases
are integers; complex numbers lie in memory as pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TURNS_A_RADIAN = tl.constexpr(0.15915494309189535)
RADIANS_AN_INTEGER = tl.constexpr(6.283185307179586 / 2**32)


@triton.jit
def _base(x, place, mask):
    """x at ``place`` as log2 |exp(x)| and as the phase in units of 2^-64 turns.

    Integers wrap at a whole turn, so the phase of any power is an integer product, exact where Im(x) l is 1e5 radians.
    """
    real = tl.load(x + 2 * place, mask=mask, other=0.0)
    turns = tl.load(x + 2 * place + 1, mask=mask, other=0.0).to(tl.float64) * TURNS_A_RADIAN
    turns -= tl.floor(turns)
    return real * LOG2E, (turns * 9223372036854775808.0).to(tl.int64) * 2


@triton.jit
def _power(log2, phase, times):
    """exp(x t), real and imaginary part.

    The nearest quarter turn is taken off, and what is left, at most pi / 4, goes into the polynomials of Cephes' sinf
    and cosf: errors of a unit in the last place, and none of the branches that a sine of any argument needs.
    """
    turn = ((phase * times) >> 32).to(tl.int32)
    quarter = (turn + 536870912) >> 30
    angle = (turn - (quarter << 30)).to(tl.float32) * RADIANS_AN_INTEGER
    square = angle * angle
    sine = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    sine = sine * square * angle + angle
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = (cosine * square - 0.5) * square + 1.0
    odd = (quarter & 1) != 0
    size = tl.exp2(log2 * times.to(tl.float32))
    real = tl.where(odd, sine, cosine) * tl.where(((quarter + 1) & 2) != 0, -size, size)
    return real, tl.where(odd, cosine, sine) * tl.where((quarter & 2) != 0, -size, size)


@triton.jit
def vandermonde_kernel(v, x, out, length, states, BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr):
    """2 Re sum_n v_n exp(x_n l): v, x (rows, N, 2), out (rows, length). Grid (rows, tiles of time)."""
    row = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1).to(tl.int64) * BI + tl.arange(0, BI)) * BJ
    j = tl.arange(0, BJ).to(tl.int64)
    total = tl.zeros([BI, BJ], tl.float32)
    for start in range(0, states, BN):
        n = start + tl.arange(0, BN)
        here = n < states
        place = row * states + n
        v_re = tl.load(v + 2 * place, mask=here, other=0.0)[None, :]
        v_im = tl.load(v + 2 * place + 1, mask=here, other=0.0)[None, :]
        log2, phase = _base(x, place, here)
        re, im = _power(log2[None, :], phase[None, :], i[:, None])
        left_re, left_im = 2.0 * (v_re * re - v_im * im), -2.0 * (v_re * im + v_im * re)
        right_re, right_im = _power(log2[:, None], phase[:, None], j[None, :])
        total = tl.dot(left_re, right_re, total, input_precision="tf32x3")
        total = tl.dot(left_im, right_im, total, input_precision="tf32x3")
    times = i[:, None] + j[None, :]
    tl.store(out + row * length + times, total, mask=times < length)


@triton.jit
def vandermonde_moments_kernel(
    u,
    x,
    zeroth,
    first,
    length,
    states,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
):
    """Each tile's share of sum_l u_l exp(x_n l), and unless ``first`` is None of sum_l l u_l exp(x_n l).

    u (rows, length), x (rows, N, 2), zeroth and first (tiles, rows, N, 2). Grid (rows, tiles of time, tiles of N).
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    here = n < states
    log2, phase = _base(x, row * states + n, here)
    i = (tile * BI + tl.arange(0, BI)) * BJ
    j = tl.arange(0, BJ).to(tl.int64)
    times = i[:, None] + j[None, :]
    signal = tl.load(u + row * length + times, mask=times < length, other=0.0)
    # One product for all that is asked: its columns are n, then real and imaginary part, then the moment.
    columns = tl.join(*_power(log2[None, :], phase[None, :], j[:, None]))
    if first is not None:
        columns = tl.join(columns, columns * j.to(tl.float32)[:, None, None])
        inner = tl.dot(signal, tl.reshape(columns, (BJ, 4 * BN)), input_precision="tf32x3")
        inner, later = tl.split(tl.reshape(inner, (BI, BN, 2, 2)))
    else:
        inner = tl.dot(signal, tl.reshape(columns, (BJ, 2 * BN)), input_precision="tf32x3")
        inner = tl.reshape(inner, (BI, BN, 2))
    outer_re, outer_im = _power(log2[None, :], phase[None, :], i[:, None])
    out = ((tile * tl.num_programs(0) + row) * states + n) * 2
    re, im = tl.split(inner)
    tl.store(zeroth + out, tl.sum(outer_re * re - outer_im * im, axis=0), mask=here)
    tl.store(zeroth + out + 1, tl.sum(outer_re * im + outer_im * re, axis=0), mask=here)
    if first is not None:
        re, im = tl.split(later + i.to(tl.float32)[:, None, None] * inner)
        tl.store(first + out, tl.sum(outer_re * re - outer_im * im, axis=0), mask=here)
        tl.store(first + out + 1, tl.sum(outer_re * im + outer_im * re, axis=0), mask=here)


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    sizes = {"length": "i32", "states": "i32"}
    constants: dict[str, Any] = {"BI": 32, "BJ": 128, "BN": 32}
    signature = {"v": "*fp32", "x": "*fp32", "out": "*fp32"} | sizes | dict.fromkeys(constants, "constexpr")
    yield vandermonde_kernel, signature, constants, 4
    signature = {"u": "*fp32", "x": "*fp32", "zeroth": "*fp32", "first": "*fp32"} | sizes
    for absent in ({}, {"first": None}):
        constants = {"BI": 32, "BJ": 64, "BN": 32} | absent
        yield vandermonde_moments_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, 4
