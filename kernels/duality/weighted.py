"""``weighted_ssd``, the heart of ``ssd``: input weights and decays of their own; the torch operators behind it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambakit.kernels import dispatch
from mambakit.kernels.duality import chunked
from mambakit.kernels.duality.reference import ssd_dtype, ssd_reference
from mambakit.kernels.registration import call, register

NAME = "ssd"


def weighted_ssd(
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    chunk_size: int = 256,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrence of ``ssd`` with weights and decays that need not come from one step size.

        h_t = exp(log_decays_t) h_{t-1} + weights_t x_t B_tᵀ            (P, N), for each head
        y_t = h_t C_t + D x_t,    out_t = y_t SiLU(z_t)

    Mamba-2 (arXiv 2405.21060) has weights = dt and log_decays = dt A. For other operators of this package: shapes are
    taken on trust.

    Args:
        x: (B, L, H, P), float16, bfloat16, float32 or float64, as every argument below.
        weights: (B, L, H).
        log_decays: (B, L, H), at most 0. Below -120 the Triton kernel takes a decay for 0, as it is in float32.
        B, C: (B, L, G, N), G a divisor of H (of one group a head, G = H).
        D: (H,) or (H, P).
        z: (B, L, H, P).
        chunk_size: the most steps that PyTorch computes at once.
        initial_state: (B, H, P, N); zeros if None.
        seq_idx: (B, L) int32 or int64; a change of value clears the state.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        out (B, L, H, P) in x's dtype and the final state (B, H, P, N), float32, or float64 where x, weights,
        log_decays, B or C is. Gradients flow to every tensor but ``seq_idx``, also back through the final state; for
        gradients of gradients use ``backend="reference"``.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the call.
    """
    chosen = dispatch.choose(NAME, backend, x, not_in_triton(x, weights, log_decays, B, C)).backend
    tensors = (x, weights, log_decays, B, C, D, z, initial_state, seq_idx)
    if chosen == "reference":
        return ssd_reference(*tensors)
    out, final_state, _ = _ssd(*tensors, chunk_size, chosen)
    return out, final_state


def _implementation(backend: str) -> ModuleType:
    """The module whose ``ssd_forward``, ``ssd_backward`` and ``span_count`` serve; Triton loads here."""
    if backend == "triton":
        from mambakit.kernels.duality import triton_kernels

        return triton_kernels
    return chunked


def not_in_triton(x: Tensor, weights: Tensor, log_decays: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why the Triton kernels do not take a call of weights and decays, or of dt and A in their places."""
    if ssd_dtype(x, weights, log_decays, B, C) == torch.float64:
        return "an argument is float64, and the kernel computes in float32"
    return too_large(x.shape[3], B.shape[3], {x.dtype, B.dtype, C.dtype} == {torch.bfloat16})


def too_large(channels: int, d_state: int, narrow: bool) -> str | None:
    """Why the Triton kernels do not take heads of so many channels and states; ``narrow``: x, B and C are bfloat16."""
    numbers = 128 * 128 if narrow else 64 * 128
    if channels > 128 or d_state > 256 or channels * d_state > numbers:
        return (
            f"a head has {channels} channels of {d_state} states, and the kernel holds at most 128 channels, "
            f"256 states, and {numbers:,} of both multiplied"
        )
    return None


def _forward(
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x, weights, log_decays, B, C, D, z, initial_state, seq_idx)
    with dispatch.as_they_are(backend, x):
        return _implementation(backend).ssd_forward(*tensors, chunk_size)


def _fake_forward(
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, channels = x.shape
    state = (batch, heads, channels, B.shape[3])
    dtype = ssd_dtype(x, weights, log_decays, B, C)
    spans = _implementation(backend).span_count(x, chunk_size)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty(state, dtype=dtype),
        x.new_empty((spans, *state), dtype=dtype),
    )


def _backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, weights, log_decays, B, C, D, z, initial_state, seq_idx)
    with dispatch.as_they_are(backend, x):
        gradients = _implementation(backend).ssd_backward(dout, dfinal_state, *tensors, starts, chunk_size)
    # An operator returns tensors only: an empty one stands for the gradient of an argument that was not given.
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


def _fake_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, ...]:
    arguments = (x, weights, log_decays, B, C, D, z, initial_state)
    return tuple(
        x.new_empty(0) if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in arguments
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros as large as the states for the gradient they never get
    *tensors, ctx.chunk_size, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    gradients = call(_ssd_backward, dout, dfinal_state, *tensors, starts, ctx.chunk_size, ctx.backend)
    given = (None if t is None else gradient for t, gradient in zip(tensors, gradients, strict=False))
    return *given, None, None, None


_ssd = register("ssd", _forward, _fake_forward, _save, _differentiate)
_ssd_backward = register("ssd_backward", _backward, _fake_backward)
