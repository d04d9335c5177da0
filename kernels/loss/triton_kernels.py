"""Softmax cross-entropy of rows of logits in one Triton kernel, which leaves the gradient where the logits were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The vocabulary is padded to a multiple of this, so that the rows of bfloat16 logits start at multiples of 16 bytes:
# matrix units and vector loads ask for that, and 50,257 would be odd.
MULTIPLE = 64


@triton.jit
def _cap(logits, softcap):
    """softcap * tanh(logits / softcap), the hyperbolic tangent written with one exponential."""
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logits / softcap * 2.8853900817779268)))


@triton.jit
def _load(logits, v, width, softcap, HAS_CAP: tl.constexpr, WHOLE: tl.constexpr):
    """The (capped) logits at columns v of a row, in float32.

    WHOLE: all columns are below V, the vocabulary. Otherwise the row is read up to ``width``, a multiple of 16, so that
    eight neighbours share a mask and are one load.
    """
    if WHOLE:
        value = tl.load(logits + v).to(tl.float32)
    else:
        value = tl.load(logits + v, mask=v < width, other=0.0).to(tl.float32)
    if HAS_CAP:
        value = _cap(value, softcap)
    return value


@triton.jit
def _accumulate(
    largest, total, summed, logits, v, V, width, softcap,
    HAS_CAP: tl.constexpr, SMOOTHING: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Largest, sum of 2^(l - largest) and sum of logits, of each thread's eight columns and those before."""
    value = _load(logits, v, width, softcap, HAS_CAP, WHOLE)
    if SMOOTHING:
        summed += tl.sum(value if WHOLE else tl.where(v < V, value, 0.0), axis=1)
    value *= 1.4426950408889634
    if not WHOLE:
        value = tl.where(v < V, value, -float("inf"))
    larger = tl.maximum(largest, tl.max(value, axis=1))
    total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(value - larger[:, None]), axis=1)
    return larger, total, summed


@triton.jit
def _differentiate(
    logits, v, V, width, log_total, label_smoothing, softcap, scale,
    HAS_CAP: tl.constexpr, SMOOTHING: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Put scale * (softmax(l) - smoothing / V) in the logits' place."""
    value = _load(logits, v, width, softcap, HAS_CAP, WHOLE)
    grad = tl.exp2(value * 1.4426950408889634 - log_total)
    if SMOOTHING:
        grad -= label_smoothing / V
    grad *= scale
    if HAS_CAP:
        grad *= 1.0 - (value / softcap) * (value / softcap)
    if WHOLE:
        tl.store(logits + v, grad.to(logits.dtype.element_ty))
    else:
        tl.store(logits + v, tl.where(v < V, grad, 0.0).to(logits.dtype.element_ty), mask=v < width)


@triton.jit
def cross_entropy_rows(
    logits,
    labels,
    row_scale,
    losses,
    V,
    width,
    ignore_index,
    label_smoothing,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BV: tl.constexpr,
):
    """One row of V logits a program, ``width`` apart: a pass for maximum and sum, a pass for the gradient.

    loss = log(sum exp(l)) - (1 - smoothing) * l_label - smoothing * mean(l), and its gradient
    softmax(l) - (1 - smoothing) * [v = label] - smoothing / V; zero where the label is ignored, NaN where it is none.
    Columns from V to width get a gradient of zero.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    # Eight neighbouring columns are one load of one thread, which keeps one maximum and one sum for all its columns.
    tile = tl.arange(0, BV // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENTS:
            for start in range(0, width, BV):
                v = start + tile
                tl.store(logits + v, tl.zeros([BV // 8, 8], logits.dtype.element_ty), mask=v < width)
    else:
        known = (label >= 0) & (label < V)
        # Read here, before any thread of the program can have overwritten it: the sums below wait for every thread.
        chosen = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
        if HAS_CAP:
            chosen = _cap(chosen, softcap)
        largest = tl.full([BV // 8], -1e30, tl.float32)
        total = tl.zeros([BV // 8], tl.float32)
        summed = tl.zeros([BV // 8], tl.float32)
        whole = V // BV * BV
        for start in range(0, whole, BV):
            largest, total, summed = _accumulate(
                largest, total, summed, logits, start + tile, V, width, softcap, HAS_CAP, SMOOTHING, True
            )
        for start in range(whole, V, BV):
            largest, total, summed = _accumulate(
                largest, total, summed, logits, start + tile, V, width, softcap, HAS_CAP, SMOOTHING, False
            )
        peak = tl.max(largest, axis=0)
        log_total = peak + tl.log2(tl.sum(total * tl.exp2(largest - peak), axis=0))
        loss = log_total * 0.6931471805599453 - (1.0 - label_smoothing) * chosen
        if SMOOTHING:
            loss -= label_smoothing * (tl.sum(summed, axis=0) / V)
        tl.store(losses + row, loss)
        if GRADIENTS:
            scale = tl.load(row_scale + row).to(tl.float32) if HAS_SCALE else 1.0
            for start in range(0, whole, BV):
                _differentiate(
                    logits, start + tile, V, width, log_total, label_smoothing, softcap, scale, HAS_CAP, SMOOTHING, True
                )
            for start in range(whole, width, BV):
                _differentiate(
                    logits, start + tile, V, width, log_total, label_smoothing, softcap, scale,
                    HAS_CAP, SMOOTHING, False,
                )  # fmt: skip
            # The label's own share is added once the others lie in memory: comparing each column with it costs more.
            tl.debug_barrier()
            grad = tl.exp2(chosen * 1.4426950408889634 - log_total) - label_smoothing / V - (1.0 - label_smoothing)
            if HAS_CAP:
                grad *= 1.0 - (chosen / softcap) * (chosen / softcap)
            tl.store(logits + label, (grad * scale).to(logits.dtype.element_ty), mask=known)


def softmax_rows(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    row_scale: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.loss.chunked.softmax_rows`, the gradient always where the logits were.

    Rows lie a multiple of ``MULTIPLE`` apart, and what is between them becomes zero.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    # Eight logits a thread, up to 32 warps: few rows are in flight then, and the second pass finds them in the cache.
    block = min(8192, max(256, triton.next_power_of_2(vocabulary)))
    cross_entropy_rows[(rows,)](
        logits,
        labels.contiguous(),
        losses if row_scale is None else row_scale.contiguous(),
        losses,
        vocabulary,
        logits.stride(0),
        ignore_index,
        label_smoothing,
        1.0 if softcap is None else softcap,
        HAS_CAP=softcap is not None,
        HAS_SCALE=row_scale is not None,
        SMOOTHING=label_smoothing > 0,
        GRADIENTS=gradients,
        BV=block,
        num_warps=block // 256,
    )
    return losses, logits


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    signature = {"logits": "*bf16", "labels": "*i64", "row_scale": "*fp32", "losses": "*fp32", "V": "i32"}
    signature |= {"width": "i32", "ignore_index": "i32", "label_smoothing": "fp32", "softcap": "fp32"}
    for extra in (False, True):
        constants = {"HAS_CAP": extra, "HAS_SCALE": extra, "SMOOTHING": extra, "GRADIENTS": True, "BV": 8192}
        yield cross_entropy_rows, signature | dict.fromkeys(constants, "constexpr"), constants, 32
