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
def _load(logits, v, width, softcap, HAS_CAP: tl.constexpr):
    """The (capped) logits at columns v of a row of ``width``, padding included, in float32."""
    # width is a multiple of 16, so that eight neighbours share a mask and are one load.
    value = tl.load(logits + v, mask=v < width, other=0.0).to(tl.float32)
    return _cap(value, softcap) if HAS_CAP else value


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
    ignored = label == ignore_index
    known = (label >= 0) & (label < V)
    # Read here, before any thread of the program can have overwritten it: the sums below wait for every thread.
    chosen = tl.load(logits + label, mask=known, other=0.0).to(tl.float32)
    if HAS_CAP:
        chosen = _cap(chosen, softcap)
    # Each of BV lanes keeps its own maximum and sum: they meet once, behind the loop.
    largest = tl.full([BV], -1e30, tl.float32)
    total = tl.zeros([BV], tl.float32)
    summed = tl.zeros([BV], tl.float32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        value = _load(logits, v, width, softcap, HAS_CAP)
        summed += tl.where(v < V, value, 0.0)
        value = tl.where(v < V, value * 1.4426950408889634, -1e30)
        # One exponential rescales the sum or adds to it, whichever the larger of the two maxima asks for.
        scale = tl.exp2(-tl.abs(value - largest))
        total = tl.where(value > largest, total * scale + 1.0, total + scale)
        largest = tl.maximum(largest, value)
    peak = tl.max(largest, axis=0)
    log_total = peak + tl.log2(tl.sum(total * tl.exp2(largest - peak), axis=0))
    loss = log_total * 0.6931471805599453 - (1.0 - label_smoothing) * chosen
    loss -= label_smoothing * (tl.sum(summed, axis=0) / V)
    loss = tl.where(known, loss, float("nan"))
    tl.store(losses + row, tl.where(ignored, 0.0, loss))
    if GRADIENTS:
        scale = tl.load(row_scale + row).to(tl.float32) if HAS_SCALE else 1.0
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            value = _load(logits, v, width, softcap, HAS_CAP)
            grad = tl.exp2(value * 1.4426950408889634 - log_total) - label_smoothing / V
            grad = tl.where(v == label, grad - (1.0 - label_smoothing), grad) * scale
            if HAS_CAP:
                grad *= 1.0 - (value / softcap) * (value / softcap)
            grad = tl.where(ignored | (v >= V), 0.0, grad)
            tl.store(logits + v, grad.to(logits.dtype.element_ty), mask=v < width)


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
    # 32 warps a row keep the rows in flight few enough for the second pass to find them in the cache.
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
        constants = {"HAS_CAP": extra, "HAS_SCALE": extra, "GRADIENTS": True, "BV": 8192}
        yield cross_entropy_rows, signature | dict.fromkeys(constants, "constexpr"), constants, 32
