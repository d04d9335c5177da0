"""Sums of conjugate pairs of simple poles in Triton, and their gradients. Shapes and launches are in triton_launch.py.

A pair of poles w = c + i e with numerators v, v* is ``2 (a z + b) / ((z - c)^2 + e^2)``, a = Re v, b = -Re(v w*): one
complex reciprocal q a pair and node, and four multiply-adds for each set of numerators. The denominator's real part is
taken from factors, (Re z - c)^2 + (e - Im z)(e + Im z): next to a pole a difference of squares would cancel. Sets are a
tuple, one register (or a few) each. Arithmetic is float32; complex numbers lie in memory as pairs.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _reciprocal(c, e, z_re, z_im):
    """q = 1 / ((z - c)^2 + e^2), and z q, real and imaginary parts."""
    x = z_re - c
    re, im = x * x + (e - z_im) * (e + z_im), 2.0 * x * z_im
    scale = 1.0 / (re * re + im * im)
    q_re, q_im = re * scale, -im * scale
    return q_re, q_im, q_re * z_re - q_im * z_im, q_re * z_im + q_im * z_re


@triton.jit
def cauchy_kernel(residues, poles, z, out, rows, nodes, states, SETS: tl.constexpr, BM: tl.constexpr):
    """residues (K, rows, N, 2) as (a, b), poles (rows, N, 2) as (c, e), z (M, 2) to out (K, rows, M, 2).

    Grid (rows, tiles of M, K / SETS).
    """
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64) * SETS
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    here = m < nodes
    z_re, z_im = tl.load(z + 2 * m, mask=here, other=0.0), tl.load(z + 2 * m + 1, mask=here, other=0.0)
    sums_re = ()
    sums_im = ()
    for _ in tl.static_range(SETS):
        sums_re += (tl.zeros([BM], tl.float32),)
        sums_im += (tl.zeros([BM], tl.float32),)
    for n in range(states):
        pole = row * states + n
        q_re, q_im, y_re, y_im = _reciprocal(tl.load(poles + 2 * pole), tl.load(poles + 2 * pole + 1), z_re, z_im)
        new_re = ()
        new_im = ()
        for k in tl.static_range(SETS):
            residue = residues + 2 * ((first + k) * rows * states + pole)
            a, b = tl.load(residue), tl.load(residue + 1)
            new_re += (sums_re[k] + a * y_re + b * q_re,)
            new_im += (sums_im[k] + a * y_im + b * q_im,)
        sums_re = new_re
        sums_im = new_im
    for k in tl.static_range(SETS):
        place = out + 2 * (((first + k) * rows + row) * nodes + m[:, None]) + tl.arange(0, 2)[None, :]
        tl.store(place, 2.0 * tl.join(sums_re[k], sums_im[k]), mask=here[:, None])


@triton.jit
def cauchy_backward_kernel(
    dout,
    residues,
    poles,
    z,
    dresidues,
    dpoles,
    rows,
    nodes,
    states,
    segment,
    SETS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """Each segment's share of the gradients; formulas in chunked.py.

    dout (K, rows, M, 2), dresidues (segments, K, rows, N, 2), dpoles (segments, K / SETS, rows, N, 2).
    Grid (rows, tiles of N, segments * K / SETS); a segment is ``segment`` nodes, a multiple of BM.
    """
    row, groups = tl.program_id(0).to(tl.int64), tl.num_programs(2) // tl.cdiv(nodes, segment)
    part, group = tl.program_id(2) // groups, tl.program_id(2) % groups
    first = group.to(tl.int64) * SETS
    n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    in_states = n < states
    pole = row * states + n
    c = tl.load(poles + 2 * pole, mask=in_states, other=-1.0)
    e = tl.load(poles + 2 * pole + 1, mask=in_states, other=0.0)
    numbers = ()  # a and b of each set
    sums = ()  # their gradients
    for k in tl.static_range(SETS):
        residue = residues + 2 * ((first + k) * rows * states + pole)
        numbers += (tl.load(residue, mask=in_states, other=0.0), tl.load(residue + 1, mask=in_states, other=0.0))
        sums += (tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32))
    dc = tl.zeros([BN, BM], tl.float32)
    de = tl.zeros([BN, BM], tl.float32)
    for start in range(part * segment, tl.minimum(part * segment + segment, nodes), BM):
        m = start + tl.arange(0, BM)[None, :]
        here = m < nodes
        z_re, z_im = tl.load(z + 2 * m, mask=here, other=0.0), tl.load(z + 2 * m + 1, mask=here, other=0.0)
        q_re, q_im, y_re, y_im = _reciprocal(c, e, z_re, z_im)
        on_a_re, on_a_im = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
        on_b_re, on_b_im = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
        new = ()
        for k in tl.static_range(SETS):
            gradient = dout + 2 * (((first + k) * rows + row) * nodes + m)
            g_re = tl.load(gradient, mask=here, other=0.0)
            g_im = tl.load(gradient + 1, mask=here, other=0.0)
            new += (sums[2 * k] + g_re * y_re + g_im * y_im, sums[2 * k + 1] + g_re * q_re + g_im * q_im)
            on_a_re += numbers[2 * k] * g_re
            on_a_im += numbers[2 * k] * g_im
            on_b_re += numbers[2 * k + 1] * g_re
            on_b_im += numbers[2 * k + 1] * g_im
        sums = new
        # P = sum_k dout_k* (a_k z + b_k), times q^2
        p_re = on_a_re * z_re + on_a_im * z_im + on_b_re
        p_im = on_a_re * z_im - on_a_im * z_re - on_b_im
        square_re, square_im = q_re * q_re - q_im * q_im, 2.0 * q_re * q_im
        common_re = p_re * square_re - p_im * square_im
        common_im = p_re * square_im + p_im * square_re
        dc += common_re * (z_re - c) - common_im * z_im
        de += common_re
    for k in tl.static_range(SETS):
        place = 2 * ((part.to(tl.int64) * groups * SETS + first + k) * rows * states + pole)
        tl.store(dresidues + place, 2.0 * tl.sum(sums[2 * k], axis=1, keep_dims=True), mask=in_states)
        tl.store(dresidues + place + 1, 2.0 * tl.sum(sums[2 * k + 1], axis=1, keep_dims=True), mask=in_states)
    place = 2 * ((part.to(tl.int64) * groups + group) * rows * states + pole)
    tl.store(dpoles + place, 4.0 * tl.sum(dc, axis=1, keep_dims=True), mask=in_states)
    tl.store(dpoles + place + 1, -4.0 * e * tl.sum(de, axis=1, keep_dims=True), mask=in_states)


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    tensors = dict.fromkeys(("residues", "poles", "z"), "*fp32")
    sizes = dict.fromkeys(("rows", "nodes", "states"), "i32")
    for sets in (1, 4):
        constants = {"SETS": sets, "BM": 512}
        yield cauchy_kernel, tensors | {"out": "*fp32"} | sizes | dict.fromkeys(constants, "constexpr"), constants, 4
        constants = {"SETS": sets, "BN": 32, "BM": 32}
        signature = {"dout": "*fp32"} | tensors | {"dresidues": "*fp32", "dpoles": "*fp32"} | sizes
        signature |= {"segment": "i32"} | dict.fromkeys(constants, "constexpr")
        yield cauchy_backward_kernel, signature, constants, 8
