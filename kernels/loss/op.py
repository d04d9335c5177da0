"""The registered operator and the public function :func:`linear_cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from mambakit.kernels.dispatch import choose
from mambakit.kernels.loss import chunked, reference
from mambakit.kernels.registration import call, register

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``labels``, without ever holding all of these logits.

    With ``l = hidden @ weight.T + bias``, or ``softcap * tanh(l / softcap)`` (Gemma 2, arXiv:2408.00118), the loss of
    a token is ``logsumexp(l) - (1 - s) * l[label] - s * mean(l)``, s the label smoothing (Szegedy et al.,
    arXiv:1512.00567); in nats. The logits exist for a chunk of tokens at a time. The products are taken in hidden's
    dtype (under autocast: autocast's), the log-sum-exp and the sum of the weight's gradient in float32.

    The gradients of "mean" and "sum" are computed in the forward pass, while a chunk's logits are there: three matrix
    products in all, as many as the plain loss needs, where computing the logits again would need four. What they cost
    is memory between forward and backward, that of hidden and of a float32 weight. With "none" each token's gradient
    is known in the backward alone, so there the logits are computed again.

    Args:
        hidden: (..., D), float16, bfloat16, float32 or float64, any strides.
        weight: (V, D), any of those dtypes.
        labels: (...), int64, from 0 to V-1, or ``ignore_index``.
        bias: (V,).
        ignore_index: tokens with this label have no loss and no gradient.
        reduction: "mean" over the tokens that are not ignored (0 where all are), "sum", or "none".
        label_smoothing: from 0 to 1.
        softcap: a positive number, or None.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        A scalar, or with "none" the losses in labels' shape (0 where ignored), float32 (float64 for float64).
        Gradients flow to hidden, weight and bias.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, option or backend, named; on a CPU also a label that is
            out of range. On a GPU, where looking would mean waiting, such a label gives a loss of NaN.
    """
    _check(hidden, weight, labels, bias, reduction, label_smoothing, softcap)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows, row_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    obstacle = "its kernel computes in float32 and hidden is float64" if hidden.dtype == torch.float64 else None
    chosen = choose("linear_cross_entropy", backend, hidden, obstacle).backend
    if chosen == "reference":
        _check_labels(row_labels, weight.shape[0], ignore_index)
        with torch.autocast(device, enabled=False):
            losses = reference.linear_cross_entropy(
                rows, weight, row_labels, bias, ignore_index, label_smoothing, softcap
            )
        loss = losses if reduction == "none" else losses.sum()
    else:
        differentiable = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
        summed = reduction != "none"
        gradients = summed and torch.is_grad_enabled() and differentiable
        options = (ignore_index, float(label_smoothing), softcap, chosen)
        loss = _linear_cross_entropy(rows, weight, row_labels, bias, summed, gradients, *options)[0]
    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "mean":  # over no tokens at all: 0
        loss = loss / (row_labels != ignore_index).sum().clamp(min=1)
    return loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
) -> None:
    name = "linear_cross_entropy"
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{name}: hidden must be a tensor, got {type(hidden).__name__}")
    if hidden.dim() == 0 or hidden.numel() == 0:
        raise ValueError(
            f"{name}: hidden has shape {tuple(hidden.shape)}, expected (..., channels); every axis needs at least one "
            "element"
        )
    check_dtype(name, "hidden", hidden, *FLOATS)
    check_shape(name, "weight", weight, vocabulary=None, channels=hidden.shape[-1])
    check_dtype(name, "weight", weight, *FLOATS)
    check_device(name, "weight", weight, hidden, "hidden")
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != hidden.shape[:-1]:
        expected = tuple(hidden.shape[:-1])
        raise ValueError(
            f"{name}: labels has shape {tuple(labels.shape)}, expected hidden's without the last, {expected}"
        )
    check_dtype(name, "labels", labels, torch.int64)
    check_device(name, "labels", labels, hidden, "hidden")
    if bias is not None:
        check_shape(name, "bias", bias, vocabulary=weight.shape[0])
        check_dtype(name, "bias", bias, *FLOATS)
        check_device(name, "bias", bias, hidden, "hidden")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r} is unknown; expected one of {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing={label_smoothing} is out of range; expected 0 to 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{name}: softcap={softcap} must be positive; None leaves the logits as they are")


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.device.type != "cpu":
        return
    strange = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
    if strange.numel():
        raise ValueError(
            f"linear_cross_entropy: labels holds {int(strange[0])}, expected 0 to {vocabulary - 1} (weight has "
            f"{vocabulary} rows) or ignore_index={ignore_index}"
        )


def _softmax(backend: str) -> chunked.Softmax:
    if backend == "triton":
        from mambakit.kernels.loss import triton_kernels

        return chunked.Softmax(triton_kernels.softmax_rows, triton_kernels.MULTIPLE)
    return chunked.Softmax(chunked.softmax_rows, 1)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    summed: bool,
    gradients: bool,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses or their sum, and with ``gradients`` those of the sum. A mean divides afterwards: its small gradients
    would vanish in float16.
    """
    _check_labels(labels, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes here are chosen, not autocast's to change
        losses, *found = chunked.losses_and_gradients(
            hidden, weight, labels, bias, ignore_index, label_smoothing, softcap, None, gradients, _softmax(backend)
        )
        loss = losses.sum() if summed else losses
    dhidden, dweight, dbias = (losses.new_empty(0) if gradient is None else gradient for gradient in found)
    return loss, dhidden, dweight, dbias


def _fake_forward(hidden, weight, labels, bias, summed, gradients, ignore_index, label_smoothing, softcap, backend):  # type: ignore[no-untyped-def]
    exact = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(() if summed else labels.shape, dtype=exact)
    if not gradients:
        return loss, *(loss.new_empty(0) for _ in range(3))
    dbias = loss.new_empty(0) if bias is None else loss.new_empty(bias.shape)
    return loss, hidden.new_empty(hidden.shape), loss.new_empty(weight.shape), dbias


def _backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias (empty without bias) of ``sum(dlosses * losses)``, the logits computed again."""
    with torch.autocast(hidden.device.type, enabled=False):
        _, dhidden, dweight, dbias = chunked.losses_and_gradients(
            hidden, weight, labels, bias, ignore_index, label_smoothing, softcap, dlosses, True, _softmax(backend)
        )
    assert dhidden is not None and dweight is not None
    return dhidden, dweight, dweight.new_empty(0) if dbias is None else dbias


def _fake_backward(dlosses, hidden, weight, labels, bias, ignore_index, label_smoothing, softcap, backend):  # type: ignore[no-untyped-def]
    dbias = dlosses.new_empty(0 if bias is None else bias.shape)
    return hidden.new_empty(hidden.shape), dlosses.new_empty(weight.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, ctx.summed, _, *ctx.options = inputs
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
    if ctx.summed:
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(hidden, weight, labels, bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the weight's size for outputs that nobody sees


def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    if ctx.summed:
        dhidden, dweight, dbias = ctx.saved_tensors
        dhidden = (dhidden.to(dloss.dtype) * dloss).to(dhidden.dtype)
        dweight, dbias = dweight * dloss, dbias * dloss
    else:
        dhidden, dweight, dbias = call(_linear_cross_entropy_backward, dloss, *ctx.saved_tensors, *ctx.options)
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dhidden, dweight.to(ctx.weight_dtype), None, dbias, None, None, None, None, None, None


_linear_cross_entropy = register("linear_cross_entropy", _forward, _fake_forward, _setup_context, _gradients)
_linear_cross_entropy_backward = register("linear_cross_entropy_backward", _backward, _fake_backward)
