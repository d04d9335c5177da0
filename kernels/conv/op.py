"""The registered operator and the public function :func:`causal_conv1d`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_seq_idx, check_shape
from mambakit.kernels.conv import chunked, reference
from mambakit.kernels.dispatch import choose
from mambakit.kernels.registration import call, register

WIDTHS = (2, 3, 4)
ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Depthwise causal convolution along time, the short one before every selective scan (Mamba, arXiv:2312.00752).

    ``y_t = act(bias + sum_k weight[:, k] * x_{t-(W-1)+k})`` for each channel on its own, k from 0 to W-1. Inputs
    before the first come from ``initial_state``, or are zero. Arithmetic is float32 whatever the input (float64 for
    float64). Letters: B batch, L length, D channels, W width.

    Args:
        x: (B, L, D), float16, bfloat16, float32 or float64, any strides.
        weight: (D, W), W from 2 to 4, any of those dtypes; the last column multiplies the newest input.
        bias: (D,).
        activation: None, or "silu" (also called "swish").
        initial_state: (B, D, W-1), the W-1 inputs before the first, oldest first. With ``seq_idx`` it reaches the
            first sequence of each row alone.
        seq_idx: (B, L) int32 or int64; where its value changes another sequence begins and nothing is carried over.
        reverse: run from the end to the beginning, so that y_t sees x_t .. x_{t+W-1}; equal to
            ``flip(causal_conv1d(flip(x)))`` in time, states and all.
        return_final_state: also return the state after the last element.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y (B, L, D) in x's dtype, contiguous; or ``(y, final_state)`` with final_state (B, D, W-1) float32 (float64
        for float64), the last W-1 inputs of the last sequence, oldest first. Gradients flow to x, weight, bias and
        initial_state, from y and from final_state.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, activation or backend, named.
    """
    name = "causal_conv1d"
    check_shape(name, "x", x, batch=None, length=None, channels=None)
    _check_filter(name, x, x.shape[2], weight, bias, activation)
    if initial_state is not None:
        check_shape(
            name,
            "initial_state",
            initial_state,
            batch=x.shape[0],
            channels=x.shape[2],
            width_less_1=weight.shape[1] - 1,
        )
        check_dtype(name, "initial_state", initial_state, *FLOATS)
        check_device(name, "initial_state", initial_state, x, "x")
    check_seq_idx(name, seq_idx, x, "x")
    chosen = choose(name, backend, x, _not_in_triton(x)).backend
    if chosen == "reference":
        y, final_state = reference.causal_conv1d(
            x, weight, bias, activation, initial_state=initial_state, seq_idx=seq_idx, reverse=reverse
        )
        return (y, final_state) if return_final_state else y
    y = _conv(x, weight, bias, initial_state, seq_idx, activation is not None, reverse, chosen)
    if not return_final_state:
        return y
    return y, _last_inputs(x, initial_state, seq_idx, weight.shape[1] - 1, reverse)


def _check_filter(
    name: str, x: Tensor, channels: int, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    """What causal_conv1d and causal_conv1d_update ask of x's dtype, weight, bias and activation alike."""
    check_dtype(name, "x", x, *FLOATS)
    check_shape(name, "weight", weight, channels=channels, width=None)
    if weight.shape[1] not in WIDTHS:
        raise ValueError(f"{name}: weight has width {weight.shape[1]} (its axis 1), expected one of 2, 3, 4")
    check_dtype(name, "weight", weight, *FLOATS)
    check_device(name, "weight", weight, x, "x")
    if bias is not None:
        check_shape(name, "bias", bias, channels=channels)
        check_dtype(name, "bias", bias, *FLOATS)
        check_device(name, "bias", bias, x, "x")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation={activation!r} is unknown; expected None, 'silu' or 'swish'")


def _not_in_triton(x: Tensor) -> str | None:
    return "its kernel computes in float32 and x is float64" if x.dtype == torch.float64 else None


def _last_inputs(x: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None, count: int, reverse: bool) -> Tensor:
    """The final state (B, D, count), from a few elements of x: plain operations, so autograd sees through them."""
    if reverse:
        x = x[:, :count].flip(1)
        seq_idx = None if seq_idx is None else seq_idx[:, :count].flip(1)
    x = x[:, -count:]
    tail = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
    missing = count - tail.shape[2]
    if missing and initial_state is None:
        tail = F.pad(tail, (missing, 0))
    elif missing and initial_state is not None:
        tail = torch.cat([initial_state[..., -missing:].to(tail.dtype), tail], dim=2)
    if seq_idx is not None:
        seq_idx = seq_idx[:, -count:]
        changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).int().flip(1).cumsum(dim=1).flip(1)  # after each but the last
        changes = F.pad(changes, (0, 1))
        foreign = torch.cat([changes[:, :1].expand(-1, missing), changes], dim=1) > 0
        tail = tail.masked_fill(foreign.unsqueeze(1), 0)
    return tail.contiguous()


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    backend: str,
) -> Tensor:
    arguments = (x, weight, bias, initial_state, seq_idx, silu, reverse)
    if backend == "triton":
        from mambakit.kernels.conv import triton_launch

        return triton_launch.forward(*arguments)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes here are chosen, not autocast's to change
        return chunked.forward(*arguments)


def _fake_forward(x, weight, bias, initial_state, seq_idx, silu, reverse, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dinitial_state; an operator returns tensors alone, so an absent one is empty."""
    arguments = (dout, x, weight, bias, initial_state, seq_idx, silu, reverse)
    if backend == "triton":
        from mambakit.kernels.conv import triton_launch

        dx, dweight, dbias, dinitial_state = triton_launch.backward(*arguments)
    else:
        with torch.autocast(x.device.type, enabled=False):
            dx, dweight, dbias, dinitial_state = chunked.backward(*arguments)
    absent = [x.new_empty(0) if gradient is None else gradient for gradient in (dbias, dinitial_state)]
    return dx, dweight, absent[0], absent[1]


def _fake_backward(dout, x, weight, bias, initial_state, seq_idx, silu, reverse, backend):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    _, _, bias, initial_state, _ = saved = ctx.saved_tensors
    dx, dweight, dbias, dinitial_state = call(_conv_backward, dout, *saved, *ctx.options)
    absent = (None, None, None, None)  # of seq_idx and the options
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dinitial_state, *absent


_conv_backward = register("causal_conv1d_backward", _backward, _fake_backward)
_conv = register("causal_conv1d", _forward, _fake_forward, _save, _gradients)
