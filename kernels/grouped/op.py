"""The registered operators and the public function :func:`grouped_linear`.

One product for each run of rows, by torch's own matrix product. How long the runs are is data, so the loop over them
lies inside an operator, where ``torch.compile`` does not look. ``torch.nn.functional.grouped_mm`` does the same in one
launch, but only for sizes that are multiples of 16 bytes, and not in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from mambakit.kernels.registration import register

NAME = "grouped_linear"


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y_t = weight_e x_t, where row t lies in the e-th run: the first ``counts[0]`` rows are run 0, and so on.

    Letters: T rows, E runs (experts), D inputs, F outputs. A run may be empty. On a GPU ``counts`` is read by the host,
    which waits for it.

    Args:
        x: (T, D), float16, bfloat16, float32 or float64.
        weight: (E, F, D), of x's dtype but under autocast, which decides the dtype of both.
        counts: (E,) integers whose sum is T.

    Returns:
        y (T, F) in x's dtype (autocast's under autocast). Gradients of every order flow to x and weight.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, named.
    """
    check_shape(NAME, "weight", weight, experts=None, outputs=None, inputs=None)
    if x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}, expected (rows, inputs={weight.shape[2]})")
    check_shape(NAME, "counts", counts, experts=weight.shape[0])
    check_dtype(NAME, "x", x, *FLOATS)
    check_dtype(NAME, "counts", counts, torch.int32, torch.int64)
    check_device(NAME, "weight", weight, x, "x")
    check_device(NAME, "counts", counts, x, "x")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        weight = weight.to(x.dtype)
    check_dtype(NAME, "weight", weight, x.dtype)
    return _linear(x, weight, counts)


def _forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = x.new_empty(len(x), weight.shape[1])
    for matrix, rows, out in zip(weight, _runs(x, counts), _runs(y, counts), strict=True):
        torch.mm(rows, matrix.t(), out=out)
    return y


def _fake_forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _outer(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """For each run the sum of dy_t x_tᵀ over its rows: (E, F, D)."""
    sums = x.new_empty(len(counts), dy.shape[1], x.shape[1])
    for left, right, out in zip(_runs(dy, counts), _runs(x, counts), sums, strict=True):
        torch.mm(left.t(), right, out=out)
    return sums


def _fake_outer(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _runs(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    sizes = counts.tolist()
    if min(sizes) < 0 or sum(sizes) != len(x):
        raise ValueError(f"{NAME}: counts are {sizes}, expected numbers from 0 that add up to the {len(x)} rows of x")
    return x.split(sizes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    dx = _linear(dy, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    return dx, _sums(dy, x, counts) if ctx.needs_input_grad[1] else None, None


def _outer_gradients(ctx: Any, dsums: Tensor) -> tuple[Tensor, Tensor, None]:
    dy, x, counts = ctx.saved_tensors
    return _linear(x, dsums, counts), _linear(dy, dsums.transpose(1, 2), counts), None


_linear = register(NAME, _forward, _fake_forward, _keep, _linear_gradients)
_sums = register(NAME + "_outer", _outer, _fake_outer, _keep, _outer_gradients)
