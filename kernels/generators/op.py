"""The registered operators and the public functions :func:`log_vandermonde`, its transpose, and :func:`cauchy`."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.checks import COMPLEX, check_device, check_dtype
from mambakit.kernels.dispatch import choose
from mambakit.kernels.generators import chunked, reference
from mambakit.kernels.registration import call, register


def log_vandermonde(v: Tensor, x: Tensor, length: int, *, backend: str = "auto") -> Tensor:
    """The impulse response of a diagonal state space, a sum of exponentials with conjugate pairs joined.

        K_l = 2 Re sum_n v_n exp(x_n l),   l from 0 to L-1

    S4D's kernel (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893, there a product with a Vandermonde matrix), with
    v = C dB and x = log dA. No tensor of (channels, states, length) is made, and phases are right however long: whole
    turns of Im(x) l are taken off beyond float32's precision.

    Args:
        v: weights (..., N), complex64 or complex128.
        x: logarithms of the bases (..., N), one of each conjugate pair; leading axes broadcast against v's.
        length: L, at least 1.
        backend: "auto", "triton" (complex64), "torch" or "reference".

    Returns:
        K (..., L), float32, or float64 where v or x is complex128. Gradients flow to v and x.

    Raises:
        ValueError: a wrong shape, length or device, or a backend that cannot serve.
        TypeError: a wrong dtype.
    """
    name = "log_vandermonde"
    _check(name, v=v, x=x)
    if length < 1:
        raise ValueError(f"{name}: length={length}, expected at least 1")
    if v.shape[-1] != x.shape[-1]:
        raise ValueError(f"{name}: v has {v.shape[-1]} states, x has {x.shape[-1]}; expected as many of each")
    axes = _leading_axes(name, v=v, x=x)
    wide = torch.promote_types(v.dtype, x.dtype)
    v, x = (t.to(wide).expand(*axes, -1) for t in (v, x))
    chosen = choose(name, backend, x, _not_in_triton(wide)).backend
    if chosen == "reference":
        return reference.log_vandermonde(v, x, length)
    return _log_vandermonde(_rows(v), _rows(x), length, chosen).view(*axes, length)


def log_vandermonde_transpose(u: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """A signal summed up under exponentials: what a diagonal state space makes of it.

        s_n = sum_l u_l exp(x_n l)

    The state after a signal is dB times this of the signal from its end (l counts back from the last element).

    Args:
        u: (..., L), float32 or float64.
        x: (..., N), complex64 or complex128; leading axes broadcast against u's.
        backend: "auto", "triton" (complex64), "torch" or "reference".

    Returns:
        s (..., N), complex64, or complex128 where u or x is of 64 bits a number. Gradients flow to u and x.

    Raises:
        ValueError: a wrong shape or device, or a backend that cannot serve.
        TypeError: a wrong dtype.
    """
    name = "log_vandermonde_transpose"
    _check(name, x=x)
    _check(name, like=x, dtypes=(torch.float32, torch.float64), u=u)
    axes = _leading_axes(name, u=u, x=x)
    wide = torch.promote_types(u.dtype, x.dtype)
    x = x.to(wide).expand(*axes, -1)
    u = u.to(x.real.dtype).expand(*axes, -1)
    chosen = choose(name, backend, x, _not_in_triton(wide)).backend
    if chosen == "reference":
        return reference.log_vandermonde_transpose(u, x)
    return _log_vandermonde_transpose(_rows(u), _rows(x), chosen).view(*axes, -1)


def cauchy(v: Tensor, z: Tensor, w: Tensor, *, backend: str = "auto") -> Tensor:
    """A rational function by its poles, at many nodes: S4's Cauchy product with conjugate pairs joined.

        r_m = sum_n v_n / (z_m - w_n) + v_n* / (z_m - w_n*)

    (Gu, Goel and Ré 2022, arXiv 2111.00396.) Several v over the same poles share one pass: the division is done once.

    Args:
        v: numerators (..., *w's shape), complex64 or complex128: w's shape behind any further axes, such as the four
            products of S4's low-rank correction.
        z: nodes (M,), finite, of w's precision; no gradient flows to them.
        w: poles (..., N), one of each conjugate pair.
        backend: "auto", "triton" (complex64), "torch" or "reference".

    Returns:
        r (v's axes but the last, M), complex64, or complex128 where an argument is. Gradients flow to v and w. At a
        pole the value is infinite or NaN.

    Raises:
        ValueError: a wrong shape or device, z with requires_grad, or a backend that cannot serve.
        TypeError: a wrong dtype.
    """
    name = "cauchy"
    _check(name, w=w)
    _check(name, like=w, v=v, z=z)
    if z.dim() != 1:
        raise ValueError(f"{name}: z has shape {tuple(z.shape)}, expected (nodes,)")
    if v.shape[-w.dim() :] != w.shape:
        raise ValueError(f"{name}: v has shape {tuple(v.shape)}, expected (..., *w's), w's being {tuple(w.shape)}")
    if z.requires_grad:
        raise ValueError(f"{name}: z requires a gradient, which is not computed; give z.detach()")
    wide = torch.promote_types(torch.promote_types(v.dtype, w.dtype), z.dtype)
    v, z, w = (t.to(wide) for t in (v, z, w))
    chosen = choose(name, backend, w, _not_in_triton(wide)).backend
    if chosen == "reference":
        return reference.cauchy(v, z, w)
    residues = torch.stack((v.real, -(v * w.conj()).real), -1)
    poles = torch.view_as_real(w.resolve_conj())
    sets = math.prod(v.shape[: -w.dim()])
    out = _cauchy(
        residues.reshape(sets, -1, w.shape[-1], 2),
        poles.reshape(-1, w.shape[-1], 2),
        torch.view_as_real(z.resolve_conj()).contiguous(),
        chosen,
    )
    return torch.view_as_complex(out).view(*v.shape[:-1], len(z))


def _check(name: str, like: Tensor | None = None, dtypes: tuple[torch.dtype, ...] = COMPLEX, **tensors: Tensor) -> None:
    """Tensors of at least one axis, none of them empty, of one of the dtypes, on one device."""
    for argument, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(tensor.shape)}, expected (..., n) with no empty axis"
            )
        check_dtype(name, argument, tensor, *dtypes)
        like = tensor if like is None else like
        check_device(name, argument, tensor, like, "the first")


def _leading_axes(name: str, **tensors: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors.values()))
    except RuntimeError:
        shapes = " and ".join(f"{argument} {tuple(tensor.shape)}" for argument, tensor in tensors.items())
        raise ValueError(f"{name}: shapes {shapes} do not broadcast before their last axes") from None


def _not_in_triton(dtype: torch.dtype) -> str | None:
    return "its kernel computes in float32 and an input is of float64" if dtype == torch.complex128 else None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous().resolve_conj()


def _implementation(backend: str) -> Any:
    if backend == "triton":
        from mambakit.kernels.generators import triton_launch

        return triton_launch
    return chunked


def _as_they_are(backend: str, tensor: Tensor) -> Any:
    """Autocast off for vectorised PyTorch, whose products are to stay in float32."""
    return nullcontext() if backend == "triton" else torch.autocast(tensor.device.type, enabled=False)


def _sums(v: Tensor, x: Tensor, length: int, backend: str) -> Tensor:
    with _as_they_are(backend, x):
        return _implementation(backend).log_vandermonde(v, x, length)


def _fake_sums(v: Tensor, x: Tensor, length: int, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], length, dtype=x.real.dtype)


def _save_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, x, _, ctx.backend = inputs
    ctx.save_for_backward(v, x)


def _sums_gradients(ctx: Any, dK: Tensor) -> tuple[Tensor | None, ...]:
    """With the moments W0 = sum_l dK_l exp(x l) and W1 = sum_l l dK_l exp(x l): dv = 2 W0*, dx = 2 (v W1)*."""
    v, x = ctx.saved_tensors
    zeroth, first = call(_log_vandermonde_moments, dK.contiguous(), x, ctx.backend)
    return 2 * zeroth.conj_physical(), 2 * (v * first).conj_physical(), None, None


def _moments(u: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with _as_they_are(backend, x):
        return _implementation(backend).log_vandermonde_moments(u, x, True)


def _fake_moments(u: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _transpose(u: Tensor, x: Tensor, backend: str) -> Tensor:
    with _as_they_are(backend, x):
        return _implementation(backend).log_vandermonde_moments(u, x, False)[0]


def _fake_transpose(u: Tensor, x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


def _save_transpose(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, x, ctx.backend = inputs
    ctx.save_for_backward(u, x)


def _transpose_gradients(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
    """du_l = Re sum_n ds_n* exp(x_n l), half of what log_vandermonde gives for ds*; dx = ds W1*."""
    u, x = ctx.saved_tensors
    du = dx = None
    if ctx.needs_input_grad[0]:
        du = call(_log_vandermonde, ds.conj_physical().contiguous(), x, u.shape[1], ctx.backend) / 2
    if ctx.needs_input_grad[1]:
        dx = ds * call(_log_vandermonde_moments, u, x, ctx.backend)[1].conj_physical()
    return du, dx, None


_log_vandermonde_moments = register("log_vandermonde_moments", _moments, _fake_moments)
_log_vandermonde = register("log_vandermonde", _sums, _fake_sums, _save_sums, _sums_gradients)
_log_vandermonde_transpose = register(
    "log_vandermonde_transpose", _transpose, _fake_transpose, _save_transpose, _transpose_gradients
)


def _poles(residues: Tensor, poles: Tensor, z: Tensor, backend: str) -> Tensor:
    with _as_they_are(backend, z):
        return _implementation(backend).cauchy(residues, poles, z)


def _fake_poles(residues: Tensor, poles: Tensor, z: Tensor, backend: str) -> Tensor:
    return residues.new_empty(*residues.shape[:2], z.shape[0], 2)


def _poles_backward(dout: Tensor, residues: Tensor, poles: Tensor, z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with _as_they_are(backend, z):
        return _implementation(backend).cauchy_backward(dout, residues, poles, z)


def _fake_poles_backward(
    dout: Tensor, residues: Tensor, poles: Tensor, z: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residues), torch.empty_like(poles)


def _save_poles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _poles_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dresidues, dpoles = call(_cauchy_backward, dout.contiguous(), *ctx.saved_tensors, ctx.backend)
    return dresidues, dpoles, None, None


_cauchy_backward = register("cauchy_backward", _poles_backward, _fake_poles_backward)
_cauchy = register("cauchy", _poles, _fake_poles, _save_poles, _poles_gradients)
