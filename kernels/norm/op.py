"""The registered operators and the public functions :func:`rms_norm`, :func:`layer_norm`, :func:`gated_rms_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from mambakit.kernels.dispatch import as_they_are, choose
from mambakit.kernels.norm import chunked, reference
from mambakit.kernels.registration import call, register

MAX_TRITON_CHANNELS = 8192  # a row is held in registers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    backend: str = "auto",
) -> Any:
    """Add the residual, then normalise by the root mean square (Zhang & Sennrich, arXiv:1910.07467), in one pass.

    ``s = x + residual``; ``y = s / sqrt(mean(s^2) + eps) * weight + bias``, the mean over the last axis. Statistics
    are float32 whatever the input (float64 for float64).

    Args:
        x: (..., D), float16, bfloat16, float32 or float64, any strides.
        weight: (D,), any of those dtypes.
        bias: (D,).
        residual: x's shape, any of those dtypes: the residual stream so far.
        eps: added to the mean square.
        prenorm: also return s, the residual stream for the next block.
        residual_in_fp32: s is float32 (or wider) instead of the dtype of residual (of x where there is none).
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y of x's shape and dtype; or ``(y, s)``. Gradients flow to x, weight, bias and residual, from y and s.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or backend, named.
    """
    return _norm("rms_norm", x, weight, bias, residual, eps, prenorm, residual_in_fp32, backend)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    backend: str = "auto",
) -> Any:
    """Add the residual, then layer norm (Ba et al., arXiv:1607.06450): :func:`rms_norm` of s minus its mean.

    ``s = x + residual``; ``y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias``, the variance without Bessel's
    correction. Arguments, results and errors as in :func:`rms_norm`.
    """
    return _norm("layer_norm", x, weight, bias, residual, eps, prenorm, residual_in_fp32, backend)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    group_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The gated RMS norm before the output projection of Mamba-2 (arXiv:2405.21060).

    ``y = norm(x * silu(z)) * weight``, or ``y = norm(x) * weight * silu(z)`` with ``norm_before_gate``, where
    ``norm(s) = s / sqrt(mean(s^2) + eps)`` over each group of ``group_size`` neighbouring channels. Arithmetic is
    float32 whatever the input (float64 for float64).

    Args:
        x, z: (..., D), float16, bfloat16, float32 or float64, any strides.
        weight: (D,), any of those dtypes.
        eps: added to the mean square.
        norm_before_gate: normalise first, then gate.
        group_size: divides D; None is D, one group.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y of x's shape and dtype. Gradients flow to x, z and weight.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, group size or backend, named.
    """
    name = "gated_rms_norm"
    _check_rows(name, x, z=z)
    _check_channels(name, x, weight=weight)
    group = x.shape[-1] if group_size is None else group_size
    if group < 1 or x.shape[-1] % group:
        raise ValueError(f"{name}: group_size={group_size} must divide the {x.shape[-1]} channels of x")
    chosen = choose(name, backend, x, _not_in_triton(group, x, z)).backend
    if chosen == "reference":
        return reference.gated_rms_norm(x, z, weight, eps, norm_before_gate, group)
    return _gated_rms_norm(x, z, weight, float(eps), norm_before_gate, group, chosen)[0]


def _norm(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
    backend: str,
) -> Any:
    _check_rows(name, x, residual=residual)
    _check_channels(name, x, weight=weight, bias=bias)
    dtype = (x if residual is None else residual).dtype
    if residual_in_fp32:
        dtype = torch.promote_types(dtype, torch.float32)
    centered = name == "layer_norm"
    chosen = choose(name, backend, x, _not_in_triton(x.shape[-1], x, residual)).backend
    if chosen == "reference":
        y, summed = reference.add_norm(x, residual, weight, bias, eps, centered, dtype)
    else:
        y, summed, _, _ = _add_norm(x, residual, weight, bias, float(eps), centered, dtype, chosen)
        if residual is None:  # s is x itself, and an operator may not return its own input
            summed = x.to(dtype)
    return (y, summed) if prenorm else y


def _check_rows(name: str, x: Tensor, **others: Tensor | None) -> None:
    """x (..., D) and tensors of its shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, expected (..., channels); every axis needs at least one element"
        )
    check_dtype(name, "x", x, *FLOATS)
    for argument, tensor in others.items():
        if tensor is None:
            continue
        if tensor.shape != x.shape:
            raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}, expected x's, {tuple(x.shape)}")
        check_dtype(name, argument, tensor, *FLOATS)
        check_device(name, argument, tensor, x, "x")


def _check_channels(name: str, x: Tensor, **parameters: Tensor | None) -> None:
    for argument, tensor in parameters.items():
        if tensor is not None:
            check_shape(name, argument, tensor, channels=x.shape[-1])
            check_dtype(name, argument, tensor, *FLOATS)
            check_device(name, argument, tensor, x, "x")


def _not_in_triton(channels: int, *tensors: Tensor | None) -> str | None:
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return "its kernel computes in float32 and an input is float64"
    if channels > MAX_TRITON_CHANNELS:
        return f"its kernel holds a row of at most {MAX_TRITON_CHANNELS} channels, not {channels}"
    return None


def _implementation(backend: str) -> Any:
    if backend == "triton":
        from mambakit.kernels.norm import triton_launch

        return triton_launch
    return chunked


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty without residual), mean (empty unless centered), rstd."""
    with as_they_are(backend, x):
        y, summed, mean, rstd = _implementation(backend).add_norm(
            _rows(x), None if residual is None else _rows(residual), weight, bias, eps, centered, dtype
        )
    rows = x.shape[:-1]
    return (
        y.view(x.shape),
        x.new_empty(0, dtype=dtype) if summed is None else summed.view(x.shape),
        rstd.new_empty(0) if mean is None else mean.view(rows),
        rstd.view(rows),
    )


def _fake_forward(x, residual, weight, bias, eps, centered, dtype, backend):  # type: ignore[no-untyped-def]
    exact = torch.promote_types(dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape, dtype=dtype),
        x.new_empty(x.shape[:-1] if centered else 0, dtype=exact),
        x.new_empty(x.shape[:-1], dtype=exact),
    )


def _backward(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    centered: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of s in its dtype, the same in ``dtype`` (empty where that is s's), dweight, dbias (empty without
    bias).
    """
    with as_they_are(backend, s):
        ds, dx, dweight, dbias = _implementation(backend).add_norm_backward(
            _rows(dy),
            None if dsummed is None else _rows(dsummed),
            _rows(s),
            weight,
            bias,
            mean.view(-1) if centered else None,
            rstd.view(-1),
            dtype,
        )
    dx = s.new_empty(0) if dtype == s.dtype else dx.view(s.shape)
    return ds.view(s.shape), dx, dweight, weight.new_empty(0) if dbias is None else dbias


def _fake_backward(dy, dsummed, s, weight, bias, mean, rstd, centered, dtype, backend):  # type: ignore[no-untyped-def]
    dx = s.new_empty(0 if dtype == s.dtype else s.shape, dtype=dtype)
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return s.new_empty(s.shape), dx, weight.new_empty(weight.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.centered, _, ctx.backend = inputs
    _, summed, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else summed, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # no zeros for the half that was not used


def _gradients(ctx: Any, dy: Tensor | None, dsummed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    s, weight, bias, mean, rstd = ctx.saved_tensors
    if ctx.residual_dtype is None:
        dsummed = None  # the empty placeholder's
    dweight, dbias = None, None
    if dy is None:
        ds = dsummed
        dx = None if ds is None else ds.to(ctx.x_dtype)
    else:
        ds, dx, dweight, dbias = call(
            _add_norm_backward, dy, dsummed, s, weight, bias, mean, rstd, ctx.centered, ctx.x_dtype, ctx.backend
        )
        dx = ds if ctx.x_dtype == s.dtype else dx
    dresidual = None if ds is None or ctx.residual_dtype is None else ds.to(ctx.residual_dtype)
    return dx, dresidual, dweight, None if bias is None else dbias, None, None, None, None


_add_norm_backward = register("add_norm_backward", _backward, _fake_backward)
_add_norm = register("add_norm", _forward, _fake_forward, _save, _gradients)


def _gated_forward(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool, group_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    """y, rstd (..., G)."""
    with as_they_are(backend, x):
        y, rstd = _implementation(backend).gated_rms_norm(_rows(x), _rows(z), weight, eps, norm_before_gate, group_size)
    return y.view(x.shape), rstd.view(*x.shape[:-1], -1)


def _fake_gated_forward(x, z, weight, eps, norm_before_gate, group_size, backend):  # type: ignore[no-untyped-def]
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], x.shape[-1] // group_size, dtype=exact)


def _gated_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    norm_before_gate: bool,
    group_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with as_they_are(backend, x):
        dx, dz, dweight = _implementation(backend).gated_rms_norm_backward(
            _rows(dy), _rows(x), _rows(z), weight, _rows(rstd), norm_before_gate, group_size
        )
    return dx.view(x.shape), dz.view(x.shape), dweight


def _fake_gated_backward(dy, x, z, weight, rstd, norm_before_gate, group_size, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _gated_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, z, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gated_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dz, dweight = call(_gated_rms_norm_backward, dy, *ctx.saved_tensors, *ctx.options)
    return dx, dz, dweight, None, None, None, None


_gated_rms_norm_backward = register("gated_rms_norm_backward", _gated_backward, _fake_gated_backward)
_gated_rms_norm = register("gated_rms_norm", _gated_forward, _fake_gated_forward, _gated_save, _gated_gradients)
