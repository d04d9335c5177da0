"""The registered operator and the public function :func:`mamba_inner`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_seq_idx, check_shape
from mambakit.kernels.dispatch import choose
from mambakit.kernels.inner import fused, reference
from mambakit.kernels.inner.reference import padding
from mambakit.kernels.registration import call, register

NAME = "mamba_inner"
WIDTHS = (2, 3, 4)


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None = None,
    *,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What the Mamba-1 block (Gu and Dao 2023, arXiv 2312.00752, section 3.4) does behind its input projection.

    With x, z the halves of xz:

        u = SiLU(causal_conv1d(x));    dt, B, C = the parts of x_proj_weight u;    delta = dt_proj_weight dt
        out = out_proj_weight selective_scan(u, softplus(delta + dt_bias), A, B, C, D, z) + out_proj_bias

    It equals those operators one after another and keeps less for its backward: xz, the parts dt, B and C and a few
    states, where they would keep u, delta and y as well; u and delta cost little to compute again, and the scan's
    backward recomputes y anyway.

    Letters: B batch, L length, D channels, N state size, R rank of dt, W convolution width, M d_model.

    Args:
        xz: (B, L, 2D), float16, bfloat16, float32 or float64, as every argument below. The matrix products are taken
            in its dtype (under autocast: autocast's), convolution and scan in float32 at least.
        conv_weight: (D, W), W from 2 to 4.
        conv_bias: (D,) or None.
        x_proj_weight: (R + 2N, D).
        dt_proj_weight: (D, R).
        A: (D, N), negative in a stable system.
        D: skip weight (D,).
        dt_bias: (D,), added to delta before softplus.
        out_proj_weight: (M, D).
        out_proj_bias: (M,) or None.
        conv_state: (B, D, W-1), the inputs x before the first, oldest first; zeros if None.
        ssm_state: (B, D, N), the scan's state before the first element; zeros if None.
        seq_idx: (B, L) int32 or int64; where its value changes another sequence begins and nothing is carried over.
        lengths: (B,) integers; elements of row b from ``lengths[b]`` on are padding, which changes no state. ``out``
            is finite and means nothing there.
        reverse: convolve and scan from the last element to the first, from each row's own last one where ``lengths``
            is given. ``ssm_state`` then enters at the end; ``conv_state`` too, but not beside ``lengths``.
        backend: "auto", "triton", "torch" or "reference"; see ``mambakit.kernels.dispatch``.

    Returns:
        out (B, L, M) in xz's dtype (autocast's under autocast), and the scan's final state (B, D, N), float32 (float64
        for float64). Gradients flow to every argument but seq_idx and lengths, also back through the final state. For
        gradients of gradients use ``backend="reference"``.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or backend, named.
    """
    given = fused.Arguments(
        xz,
        conv_weight,
        conv_bias,
        x_proj_weight,
        dt_proj_weight,
        A,
        D,
        dt_bias,
        out_proj_weight,
        out_proj_bias,
        conv_state,
        ssm_state,
        seq_idx,
        lengths,
    )
    _check(given)
    if reverse and lengths is not None:
        if conv_state is not None:
            raise ValueError(f"{NAME}: conv_state is given with reverse and lengths, expected None beside these two")
        # The convolution comes from the padding's side here: an input of zero is what lies beyond a row's end.
        given = given._replace(xz=xz.masked_fill(padding(xz, lengths), 0))
        xz = given.xz
    device = xz.device.type
    if torch.is_autocast_enabled(device) and xz.dtype != torch.float64:
        given = given._replace(xz=xz.to(torch.get_autocast_dtype(device)))
    chosen = choose(NAME, backend, xz, _not_in_triton(given)).backend
    if chosen == "reference":
        with torch.autocast(device, enabled=False):
            return reference.mamba_inner(*given, reverse)
    out, final_state, *_ = _inner(*given, reverse, chosen)
    return out, final_state


def _check(given: fused.Arguments) -> None:
    xz = given.xz
    check_shape(NAME, "A", given.A, channels=None, d_state=None)
    channels, d_state = given.A.shape
    check_shape(NAME, "xz", xz, batch=None, length=None, twice_channels=2 * channels)
    batch = xz.shape[0]
    check_shape(NAME, "conv_weight", given.conv_weight, channels=channels, width=None)
    taps = given.conv_weight.shape[1]
    if taps not in WIDTHS:
        raise ValueError(f"{NAME}: conv_weight has width {taps} (its axis 1), expected one of 2, 3, 4")
    check_shape(NAME, "dt_proj_weight", given.dt_proj_weight, channels=channels, dt_rank=None)
    rows = given.dt_proj_weight.shape[1] + 2 * d_state
    check_shape(NAME, "x_proj_weight", given.x_proj_weight, dt_rank_and_twice_d_state=rows, channels=channels)
    check_shape(NAME, "out_proj_weight", given.out_proj_weight, d_model=None, channels=channels)
    for name, vector in (("conv_bias", given.conv_bias), ("D", given.D), ("dt_bias", given.dt_bias)):
        if vector is not None:
            check_shape(NAME, name, vector, channels=channels)
    if given.out_proj_bias is not None:
        check_shape(NAME, "out_proj_bias", given.out_proj_bias, d_model=given.out_proj_weight.shape[0])
    if given.conv_state is not None:
        check_shape(NAME, "conv_state", given.conv_state, batch=batch, channels=channels, width_less_1=taps - 1)
    if given.ssm_state is not None:
        check_shape(NAME, "ssm_state", given.ssm_state, batch=batch, channels=channels, d_state=d_state)
    if given.lengths is not None:
        check_shape(NAME, "lengths", given.lengths, batch=batch)
        check_dtype(NAME, "lengths", given.lengths, torch.int32, torch.int64)
        check_device(NAME, "lengths", given.lengths, xz, "xz")
    check_seq_idx(NAME, given.seq_idx, xz, "xz")
    for name, tensor in zip(given._fields[:-2], given[:-2], strict=True):
        if tensor is not None:
            check_dtype(NAME, name, tensor, *FLOATS)
            check_device(NAME, name, tensor, xz, "xz")


def _not_in_triton(given: fused.Arguments) -> str | None:
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in given):
        return "an argument is float64, and its kernels compute in float32"
    if given.A.shape[1] > 256:
        return f"d_state is {given.A.shape[1]}, and the scan's kernel holds at most 256 states a channel"
    return None


def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, the final state, and what the backward wants kept: x_dbl, checkpoints, y (perhaps empty)."""
    given = fused.Arguments(
        xz,
        conv_weight,
        conv_bias,
        x_proj_weight,
        dt_proj_weight,
        A,
        D,
        dt_bias,
        out_proj_weight,
        out_proj_bias,
        conv_state,
        ssm_state,
        seq_idx,
        lengths,
    )
    with torch.autocast(xz.device.type, enabled=False):  # the dtypes here are chosen, not autocast's to change
        return fused.forward(given, reverse, backend)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    given, backend = fused.Arguments(*arguments[:-2]), arguments[-1]
    (batch, length, _), (channels, d_state) = given.xz.shape, given.A.shape
    exact = torch.promote_types(torch.promote_types(given.xz.dtype, given.A.dtype), torch.float32)
    checkpoints = fused.implementations(backend)[1].checkpoint_shape(batch, length, channels, d_state)
    return (
        given.xz.new_empty(batch, length, given.out_proj_weight.shape[0]),
        given.xz.new_empty(batch, channels, d_state, dtype=exact),
        given.xz.new_empty(batch * length, given.x_proj_weight.shape[0]),
        given.xz.new_empty(checkpoints, dtype=exact),
        given.xz.new_empty(0) if backend == "triton" else given.xz.new_empty(batch * length, channels),
    )


def _backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x_dbl: Tensor,
    checkpoints: Tensor,
    y: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """The gradients of xz .. ssm_state; an operator returns tensors alone, so an absent one is empty."""
    given = fused.Arguments(
        xz,
        conv_weight,
        conv_bias,
        x_proj_weight,
        dt_proj_weight,
        A,
        D,
        dt_bias,
        out_proj_weight,
        out_proj_bias,
        conv_state,
        ssm_state,
        seq_idx,
        lengths,
    )
    with torch.autocast(xz.device.type, enabled=False):
        gradients = fused.backward(dout, dfinal_state, given, (x_dbl, checkpoints, y), reverse, backend)
    return [xz.new_empty(0) if gradient is None else gradient for gradient in gradients[:-2]]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    given = fused.Arguments(*arguments[5:-2])
    return [given.xz.new_empty(0) if t is None else t.new_empty(t.shape) for t in given[:-2]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # no zeros as large as the checkpoints for gradients they never get
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x_dbl, checkpoints, y, *tensors = ctx.saved_tensors
    given = fused.Arguments(*tensors)
    if dout is None:
        dout = given.xz.new_zeros(*given.xz.shape[:2], given.out_proj_weight.shape[0])
    gradients = call(_inner_backward, dout, dfinal_state, x_dbl, checkpoints, y, *tensors, ctx.reverse, ctx.backend)
    kept = (None if tensor is None else gradient for tensor, gradient in zip(given, gradients, strict=False))
    return *kept, None, None, None, None


_inner = register(NAME, _forward, _fake_forward, _setup_context, _gradients)
_inner_backward = register(NAME + "_backward", _backward, _fake_backward)
