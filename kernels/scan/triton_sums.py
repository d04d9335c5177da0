"""One launch that adds up every partial sum the scan's backward leaves, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.launch import launch

# Partial sums of a number in flight together, and numbers a program adds up: of B and C, whose numbers are many and
# whose parts (a tile of channels each) are few, and of A, D and the bias, whose parts (a batch row each) may be many.
ROWS, WIDTH = 8, 512
TALL, NARROW = 32, 128


@triton.jit
def add_rows(
    partial, out, start, count, rows, apart, from_l, to_l, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """out[e] = sum of ``rows`` partial[e], each ``apart`` elements from the one before, e from ``start`` to ``count``.

    Element e lies (e // N) * from_l + e % N after the start of a row of ``partial``, and with to_l likewise in ``out``.
    """
    e = start + tl.arange(0, WIDTH)
    inside = e < count
    block = (e // N).to(tl.int64)
    source = partial + block * from_l + e % N
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        parts = tl.load(source[None, :] + row.to(tl.int64)[:, None] * apart, mask=mask, other=0.0)
        total += parts.to(tl.float32)
    tl.store(out + block * to_l + e % N, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_rows_of(partial, out, start, count, rows, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``add_rows`` of rows of ``count`` elements without gaps; nothing where ``out`` is None."""
    if out is not None:
        add_rows(partial, out, start, count, rows, count, N, N, N, ROWS, WIDTH)


@triton.jit(do_not_specialize=["positions", "B_groups", "B_tiles", "C_groups", "C_tiles", "rows"])
def add_partials_kernel(
    dBC, dA_partial, dD_partial, dbias_partial, dB, dC, dA, dD, dbias,
    positions, channels, B_groups, B_tiles, C_groups, C_tiles, rows,
    N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TALL: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Grid ((B_groups + C_groups) * programs a group + programs of dA + programs of dD + as many of dbias,)."""
    program = tl.program_id(0)
    vectors = positions * N
    pieces = tl.cdiv(vectors, WIDTH)
    A_pieces, D_pieces = tl.cdiv(channels * N, NARROW), tl.cdiv(channels, NARROW)
    apart = vectors.to(tl.int64) * 2
    if program < pieces * B_groups:
        group = program // pieces
        start = program % pieces * WIDTH
        first = dBC + group.to(tl.int64) * B_tiles * apart
        add_rows(first, dB + group * N, start, vectors, B_tiles, apart, 2 * N, B_groups * N, N, ROWS, WIDTH)
    elif program < pieces * (B_groups + C_groups):
        group = program // pieces - B_groups
        start = program % pieces * WIDTH
        first = dBC + group.to(tl.int64) * C_tiles * apart + N
        add_rows(first, dC + group * N, start, vectors, C_tiles, apart, 2 * N, C_groups * N, N, ROWS, WIDTH)
    elif program < pieces * (B_groups + C_groups) + A_pieces:
        start = (program - pieces * (B_groups + C_groups)) * NARROW
        add_rows_of(dA_partial, dA, start, channels * N, rows, N, TALL, NARROW)
    else:
        piece = program - pieces * (B_groups + C_groups) - A_pieces
        start = piece % D_pieces * NARROW
        if piece < D_pieces:
            add_rows_of(dD_partial, dD, start, channels, rows, N, TALL, NARROW)
        else:
            add_rows_of(dbias_partial, dbias, start, channels, rows, N, TALL, NARROW)


def add_partials(
    dBC: Tensor,
    dA_partial: Tensor,
    dD_partial: Tensor | None,
    dbias_partial: Tensor | None,
    dB: Tensor,
    dC: Tensor,
    dA: Tensor,
    dD: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Write the sums, rounded to their tensors' dtypes.

    Args:
        dBC: (tiles, B, L, 2, N) float32 or bfloat16, of each tile of channels its part of B's and of C's gradient.
        dA_partial: (rows, D, N) float32; dD_partial, dbias_partial: (rows, D) float32 or None.
        dB, dC: (B, L, N), or (B, L, G, N) for the sums over the tiles of each of G groups; contiguous, as the rest.
        dA: (D, N). dD, dbias: (D,) or None.
    """
    tiles, batch, length, _, d_state = dBC.shape
    rows, channels, _ = dA_partial.shape
    B_groups, C_groups = (t.shape[2] if t.dim() == 4 else 1 for t in (dB, dC))
    pieces = -(-batch * length * d_state // WIDTH)
    programs = (B_groups + C_groups) * pieces - (-channels * d_state // NARROW) - 2 * (-channels // NARROW)
    launch(
        add_partials_kernel, (programs,), dBC, dA_partial, dD_partial, dbias_partial, dB, dC, dA, dD, dbias,
        batch * length, channels, B_groups, tiles // B_groups, C_groups, tiles // C_groups, rows,
        N=d_state, ROWS=ROWS, WIDTH=WIDTH, TALL=TALL, NARROW=NARROW, num_warps=4,
    )  # fmt: skip


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """As ``mambakit.kernels.scan.triton_kernels.compile_examples``."""
    for dtype, absent in (("bf16", ()), ("fp32", ("dD_partial", "dbias_partial", "dD", "dbias"))):
        constants: dict[str, Any] = (
            {"N": 16, "ROWS": ROWS, "WIDTH": WIDTH, "TALL": TALL} | {"NARROW": NARROW} | dict.fromkeys(absent)
        )
        pointers = dict.fromkeys(add_partials_kernel.arg_names[:9], "*fp32") | dict.fromkeys(
            ("dBC", "dB", "dC"), f"*{dtype}"
        )
        types = pointers | dict.fromkeys(constants, "constexpr")
        yield (
            add_partials_kernel,
            {name: types.get(name, "i32") for name in add_partials_kernel.arg_names},
            constants,
            4,
        )
