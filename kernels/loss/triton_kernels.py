"""Softmax cross-entropy of rows of logits in one Triton kernel, which leaves the gradient where the logits were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cap(logits, softcap):
    """softcap * tanh(logits / softcap), the hyperbolic tangent written with one exponential."""
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logits / softcap * 2.8853900817779268)))


@triton.jit
def cross_entropy_rows(
    logits,
    labels,
    row_scale,
    losses,
    V,
    ignore_index,
    label_smoothing,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BV: tl.constexpr,
):
    """One row of V contiguous logits a program: a pass for the maximum and the sum, a pass for the gradient.

    loss = log(sum exp(l)) - (1 - smoothing) * l_label - smoothing * mean(l), and its gradient
    softmax(l) - (1 - smoothing) * [v = label] - smoothing / V; zero where the label is ignored, NaN where it is none.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    ignored = label == ignore_index
    known = (label >= 0) & (label < V)
    # Read here, before any thread of the program can have overwritten it: the sums below wait for every thread.
    chosen = tl.load(logits + label, mask=known, other=0.0).to(tl.float32)
    if HAS_CAP:
        chosen = _cap(chosen, softcap)
    largest = -float("inf")
    total = 0.0
    mean = 0.0
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        value = tl.load(logits + v, mask=v < V, other=0.0).to(tl.float32)
        if HAS_CAP:
            value = _cap(value, softcap)
        mean += tl.sum(tl.where(v < V, value, 0.0), axis=0) / V
        value = tl.where(v < V, value, -float("inf"))
        larger = tl.maximum(largest, tl.max(value, axis=0))
        scaled = tl.exp2((value - larger) * 1.4426950408889634)
        total = total * tl.exp2((largest - larger) * 1.4426950408889634) + tl.sum(scaled, axis=0)
        largest = larger
    log_total = largest + tl.log2(total) * 0.6931471805599453
    loss = log_total - (1.0 - label_smoothing) * chosen - label_smoothing * mean
    loss = tl.where(known, loss, float("nan"))
    tl.store(losses + row, tl.where(ignored, 0.0, loss))
    if GRADIENTS:
        scale = tl.load(row_scale + row).to(tl.float32) if HAS_SCALE else 1.0
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            value = tl.load(logits + v, mask=v < V, other=0.0).to(tl.float32)
            slope = 1.0
            if HAS_CAP:
                value = _cap(value, softcap)
                slope = 1.0 - (value / softcap) * (value / softcap)
            grad = tl.exp2((value - log_total) * 1.4426950408889634) - label_smoothing / V
            grad = tl.where(v == label, grad - (1.0 - label_smoothing), grad) * slope * scale
            tl.store(logits + v, tl.where(ignored, 0.0, grad).to(logits.dtype.element_ty), mask=v < V)


def softmax_rows(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    row_scale: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.loss.chunked.softmax_rows`."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(4096, max(128, triton.next_power_of_2(vocabulary)))
    cross_entropy_rows[(rows,)](
        logits,
        labels.contiguous(),
        losses if row_scale is None else row_scale.contiguous(),
        losses,
        vocabulary,
        ignore_index,
        label_smoothing,
        1.0 if softcap is None else softcap,
        HAS_CAP=softcap is not None,
        HAS_SCALE=row_scale is not None,
        GRADIENTS=gradients,
        BV=block,
        num_warps=max(1, block // 512),
    )
    return losses, logits


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    signature = {"logits": "*bf16", "labels": "*i64", "row_scale": "*fp32", "losses": "*fp32", "V": "i32"}
    signature |= {"ignore_index": "i32", "label_smoothing": "fp32", "softcap": "fp32"}
    for extra in (False, True):
        constants = {"HAS_CAP": extra, "HAS_SCALE": extra, "GRADIENTS": True, "BV": 4096}
        yield cross_entropy_rows, signature | dict.fromkeys(constants, "constexpr"), constants, 8
