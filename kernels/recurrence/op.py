"""The registered operator and the public function :func:`linear_scan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.kernels import checks
from mambakit.kernels.dispatch import choose
from mambakit.kernels.recurrence import chunked, reference
from mambakit.kernels.registration import register
from mambakit.kernels.scan.reference import state_dtype

NAME = "linear_scan"


def linear_scan(
    a: Tensor, b: Tensor, *, initial_state: Tensor | None = None, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """Every state of ``h_t = a_t h_{t-1} + b_t``, element by element: S5's parallel scan (arXiv 2208.04933).

    Nothing is divided, so coefficients of 0 are as good as others: a_t = 0 forgets all before t, which is how packed
    sequences are cut apart.

    Args:
        a: coefficients, with as many axes as b, each of b's size or of size 1 (then the same all along it); float16,
            bfloat16, float32, float64, complex64 or complex128.
        b: inputs (B, L, ...) with any trailing axes, of any of those dtypes.
        initial_state: (B, ...), h before the first element; zeros if None.
        reverse: run from the last element to the first, h_t = a_t h_{t+1} + b_t.
        backend: "auto", "torch" or "reference"; there is no Triton kernel.

    Returns:
        h (B, L, ...), contiguous, in the widest of the arguments' dtypes and float32 at least. Its last element (the
        first one in reverse) is the final state. Gradients of any order flow to a, b and initial_state.

    Raises:
        ValueError: a wrong shape or device, an empty axis, or a backend that cannot serve.
        TypeError: a wrong dtype.
    """
    _check(a, b, initial_state)
    chosen = choose(NAME, backend, b, "it has no Triton kernel").backend
    if chosen == "reference":
        return reference.linear_scan(a, b, initial_state, reverse)
    return _scan(a, b, initial_state, reverse)


def _check(a: Tensor, b: Tensor, initial_state: Tensor | None) -> None:
    if not isinstance(b, Tensor):
        raise TypeError(f"{NAME}: b must be a tensor, got {type(b).__name__}")
    if b.dim() < 2 or 0 in b.shape:
        raise ValueError(f"{NAME}: b has shape {tuple(b.shape)}, expected (batch, length, ...) with no empty axis")
    if not isinstance(a, Tensor):
        raise TypeError(f"{NAME}: a must be a tensor, got {type(a).__name__}; a number is torch.full((1, 1), number)")
    if a.dim() != b.dim() or any(one not in (1, other) for one, other in zip(a.shape, b.shape, strict=True)):
        raise ValueError(f"{NAME}: a has shape {tuple(a.shape)}, expected b's {tuple(b.shape)}, or 1 along some axes")
    if initial_state is not None:
        sizes = {f"axis_{i}": size for i, size in enumerate(b.shape[2:], start=2)}
        checks.check_shape(NAME, "initial_state", initial_state, batch=b.shape[0], **sizes)
    for name, tensor in (("a", a), ("b", b), ("initial_state", initial_state)):
        if tensor is not None:
            checks.check_dtype(NAME, name, tensor, *checks.FLOATS, *checks.COMPLEX)
            checks.check_device(NAME, name, tensor, b, "b")


def _forward(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    return chunked.linear_scan(a, b, initial_state, reverse)


def _fake_forward(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    dtype = state_dtype(a, b, *(() if initial_state is None else (initial_state,)))
    return torch.empty(b.shape, dtype=dtype, device=b.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient g_t = dh_t + conj(a_{t+1}) g_{t+1} of b is the same recurrence against time; a's is g_t h_{t-1}*."""
    a, b, initial_state, h = ctx.saved_tensors
    first, towards = (-1, 1) if ctx.reverse else (0, -1)
    coefficients = a.conj() if a.shape[1] == 1 else a.roll(towards, 1).conj()
    g = _scan(coefficients.resolve_conj(), dh, None, not ctx.reverse)
    da = dstate = None
    if ctx.needs_input_grad[0]:
        start = torch.zeros_like(h[:, :1]) if initial_state is None else initial_state.to(h.dtype).unsqueeze(1)
        before = torch.cat((h[:, 1:], start) if ctx.reverse else (start, h[:, :-1]), dim=1)
        da = _as(g * before.conj(), a)
    if ctx.needs_input_grad[2]:
        dstate = _as(g[:, first] * a[:, first].conj(), initial_state)
    return da, _as(g, b), dstate, None


def _as(gradient: Tensor, like: Tensor) -> Tensor:
    """Summed along the axes of size 1 of ``like``, its real part for a real one, in its dtype."""
    gradient = gradient if like.is_complex() else gradient.real
    return gradient.sum_to_size(like.shape).to(like.dtype)


_scan = register("linear_scan", _forward, _fake_forward, _save, _differentiate)
