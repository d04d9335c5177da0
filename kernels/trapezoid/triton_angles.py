"""Triton kernels for the angles of Mamba-3's state: sums over time, forwards and backwards. Launches: triton_launch.py.

A program walks one chunk of T steps for HB heads and holds their sums, (HB, SP), in registers. It runs twice: once for
what the chunk adds up to, without a carry, and, when the chunks' sums are joined, once with the sum before the chunk.
Arithmetic is float32; offsets are int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from mambakit.kernels.trapezoid.triton_kernels import example

PI = tl.constexpr(3.141592653589793)


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def _start(carry, batch, H, S, HB: tl.constexpr, SP: tl.constexpr):
    """Heads (HB, 1), angles (1, SP), which of them exist, the offset of this chunk's sums (HB, SP), and the carry."""
    h, s = tl.program_id(2) * HB + tl.arange(0, HB)[:, None], tl.arange(0, SP)[None, :]
    there = (h < H) & (s < S)
    own = ((batch * tl.num_programs(0) + tl.program_id(0)) * H + h) * S + s
    if carry is None:
        return h, s, there, own, tl.zeros([HB, SP], tl.float32)
    else:
        return h, s, there, own, tl.load(carry + own, mask=there, other=0.0)


@triton.jit
def angles_forward(
    angles,
    dt,
    carry,
    runs,
    out,
    L,
    H,
    S,
    angles_batch,
    angles_step,
    T: tl.constexpr,
    HB: tl.constexpr,
    SP: tl.constexpr,
):
    """The sums of pi tanh(angles) dt from ``carry`` (B, chunks, H, S) on, (B, L, H, S); where carry is None, the sum of
    each chunk from zero, (B, chunks, H, S). A new sequence begins at 0. runs may be None. Grid (chunks, B, H / HB).
    """
    begin, batch = tl.program_id(0) * T, tl.program_id(1).to(tl.int64)
    h, s, there, own, total = _start(carry, batch, H, S, HB, SP)
    for t in range(begin, tl.minimum(begin + T, L)):
        row = batch * L + t
        raw = tl.load(angles + batch * angles_batch + (row - batch * L) * angles_step + s, mask=s < S, other=0.0)
        step = tl.load(dt + row * H + h, mask=h < H, other=0.0)
        if runs is not None:
            before = tl.load(runs + tl.maximum(row - 1, batch * L))
            total = tl.where(tl.load(runs + row) == before, total, 0.0)
        total += step * (_tanh(raw.to(tl.float32)) * PI)
        if carry is not None:
            tl.store(out + (row * H + h) * S + s, total, mask=there)
    if carry is None:
        tl.store(out + own, total, mask=there)


@triton.jit
def angles_backward(
    dsums,
    angles,
    dt,
    carry,
    runs,
    out,
    dangles,
    ddt,
    L,
    H,
    S,
    angles_batch,
    angles_step,
    T: tl.constexpr,
    HB: tl.constexpr,
    SP: tl.constexpr,
):
    """From the gradient of the sums, dsums (B, L, H, S), and what reaches back from later chunks, ``carry`` (B, chunks,
    H, S): ddt (B, L, H), and dangles (H / HB, B, L, S) of each block of heads. Where carry is None: out (B, chunks, H,
    S), what the chunk alone sends to the chunk before. Grid as before.
    """
    begin, batch = tl.program_id(0) * T, tl.program_id(1).to(tl.int64)
    h, s, there, own, total = _start(carry, batch, H, S, HB, SP)
    end = tl.minimum(begin + T, L)
    for i in range(end - begin):
        t = end - 1 - i
        row = batch * L + t
        total += tl.load(dsums + (row * H + h) * S + s, mask=there, other=0.0)
        if carry is not None:
            raw = tl.load(angles + batch * angles_batch + (row - batch * L) * angles_step + s, mask=s < S, other=0.0)
            step = tl.load(dt + row * H + h, mask=h < H, other=0.0)
            tanh = _tanh(raw.to(tl.float32))
            tl.store(ddt + row * H + h, tl.sum(total * (tanh * PI), axis=1, keep_dims=True), mask=h < H)
            slope = (1.0 - tanh * tanh) * PI * tl.sum(total * step, axis=0, keep_dims=True)
            of_block = tl.program_id(2) * tl.num_programs(1) + batch
            tl.store(dangles + (of_block * L + t) * S + s, slope, mask=s < S)
        if runs is not None:
            before = tl.load(runs + tl.maximum(row - 1, batch * L))
            total = tl.where(tl.load(runs + row) == before, total, 0.0)
    if carry is None:
        tl.store(out + own, total, mask=there)


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    inputs = {"angles": "*bf16", "dt": "*fp32", "carry": "*fp32", "runs": "*i32", "out": "*fp32"}
    numbers = {"L": "i32", "H": "i32", "S": "i32", "angles_batch": "i64", "angles_step": "i64"}
    gradients = {"dsums": "*fp32", "dangles": "*fp32", "ddt": "*fp32"}
    tile = {"T": 32, "HB": 16, "SP": 32}
    for given in ({"carry": None}, {"runs": None}, {"carry": None, "runs": None}, {}):
        yield example(angles_forward, inputs | numbers, tile | given, 4)
        yield example(angles_backward, inputs | gradients | numbers, tile | given, 4)
