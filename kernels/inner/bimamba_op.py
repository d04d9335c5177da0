"""The registered operator and the public function :func:`bimamba_inner`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_seq_idx, check_shape
from mambakit.kernels.conv import causal_conv1d
from mambakit.kernels.dispatch import choose
from mambakit.kernels.inner import bimamba
from mambakit.kernels.inner.bimamba import Arguments, Saved
from mambakit.kernels.inner.reference import NO_STEP, padding
from mambakit.kernels.registration import call, register
from mambakit.kernels.scan import selective_scan

NAME = "bimamba_inner"
WIDTHS = (2, 3, 4)


def bimamba_inner(
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
    scale: float = 1.0,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What a bidirectional Mamba block that shares both projections does behind its input projection.

    The block of Vision Mamba (Zhu et al. 2024, arXiv 2401.09417, algorithm 1), also BiMamba with tied projections
    (Schiff et al. 2024, arXiv 2403.03234). With x, z the halves of xz, and for each direction o, forwards and
    backwards, its own weights:

        u_o = SiLU(conv_o(x));    dt_o, B_o, C_o = the parts of x_proj_o u_o;    delta_o = dt_proj_o dt_o
        y_o = scan_o(u_o, softplus(delta_o + dt_bias_o), A_o, B_o, C_o, D_o)
        out = out_proj_weight (scale (y_forwards + y_backwards) SiLU(z)) + out_proj_bias

    Convolution and scan of the second direction run from the last element to the first; nothing is flipped.

    Letters: B batch, L length, D channels, N state size, R rank of dt, W convolution width, M d_model. An axis of two
    is the direction: forwards, then backwards.

    Args:
        xz: (B, L, 2D), float16, bfloat16, float32 or float64, as every argument below. The matrix products are taken
            in its dtype (under autocast: autocast's), convolution, scan and gate in float32 at least.
        conv_weight: (2, D, W), W from 2 to 4.
        conv_bias: (2, D) or None.
        x_proj_weight: (2, R + 2N, D).
        dt_proj_weight: (2, D, R).
        A: (2, D, N), negative in a stable system.
        D: skip weights (2, D).
        dt_bias: (2, D), added to delta before softplus.
        out_proj_weight: (M, D).
        out_proj_bias: (M,) or None.
        scale: multiplies the sum of the directions; Vim's v2 takes 1/2.
        seq_idx: (B, L) int32 or int64; where its value changes another sequence begins and nothing is carried over,
            either way.
        lengths: (B,) integers; elements of row b from ``lengths[b]`` on are padding: the backward direction begins
            before them. ``out`` is finite and means nothing there.
        backend: "auto", "triton", "torch" or "reference"; see ``mambakit.kernels.dispatch``.

    Returns:
        out (B, L, M) in xz's dtype (autocast's under autocast). Gradients flow to every argument but seq_idx and
        lengths. For gradients of gradients use ``backend="reference"``.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or backend, named.
    """
    given = Arguments(
        xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, A, D, dt_bias, out_proj_weight, out_proj_bias,
        seq_idx, lengths,
    )  # fmt: skip
    _check(given)
    if lengths is not None:
        # The second direction comes from the padding's side: an input of zero is what lies beyond a row's end.
        given = given._replace(xz=xz.masked_fill(padding(xz, lengths), 0))
    device = xz.device.type
    if torch.is_autocast_enabled(device) and xz.dtype != torch.float64:
        given = given._replace(xz=given.xz.to(torch.get_autocast_dtype(device)))
    chosen = choose(NAME, backend, xz, _not_in_triton(given)).backend
    if chosen == "reference":
        with torch.autocast(device, enabled=False):
            return reference(given, scale)
    return _inner(*given, scale, chosen)[0]


def reference(given: Arguments, scale: float) -> Tensor:
    """The definition: each direction's operators one after another, the gate inside its scan."""
    dtype, d_state = given.xz.dtype, given.A.shape[2]
    x, z = given.xz.chunk(2, dim=-1)
    total = torch.zeros_like(z)
    for i, reverse in enumerate((False, True)):
        bias = None if given.conv_bias is None else given.conv_bias[i]
        options: dict[str, Any] = {"seq_idx": given.seq_idx, "reverse": reverse, "backend": "reference"}
        u = causal_conv1d(x, given.conv_weight[i], bias, "silu", **options)
        sizes = [given.dt_proj_weight.shape[2], d_state, d_state]
        dt, B, C = F.linear(u, given.x_proj_weight[i].to(dtype)).split(sizes, dim=-1)
        delta = F.linear(dt, given.dt_proj_weight[i].to(dtype))
        if given.lengths is not None:
            delta = delta.masked_fill(padding(delta, given.lengths), NO_STEP)
        total = total + selective_scan(
            u, delta, given.A[i], B, C, given.D[i], z, given.dt_bias[i], True, **options
        )  # fmt: skip
    out_bias = None if given.out_proj_bias is None else given.out_proj_bias.to(dtype)
    return F.linear(scale * total, given.out_proj_weight.to(dtype), out_bias)


def _check(given: Arguments) -> None:
    xz = given.xz
    check_shape(NAME, "A", given.A, directions=2, channels=None, d_state=None)
    _, channels, d_state = given.A.shape
    check_shape(NAME, "xz", xz, batch=None, length=None, twice_channels=2 * channels)
    check_shape(NAME, "conv_weight", given.conv_weight, directions=2, channels=channels, width=None)
    if given.conv_weight.shape[2] not in WIDTHS:
        raise ValueError(f"{NAME}: conv_weight has width {given.conv_weight.shape[2]} (its axis 2), expected 2, 3 or 4")
    check_shape(NAME, "dt_proj_weight", given.dt_proj_weight, directions=2, channels=channels, dt_rank=None)
    rows = given.dt_proj_weight.shape[2] + 2 * d_state
    check_shape(
        NAME, "x_proj_weight", given.x_proj_weight, directions=2, dt_rank_and_twice_d_state=rows, channels=channels
    )
    check_shape(NAME, "out_proj_weight", given.out_proj_weight, d_model=None, channels=channels)
    for name, vector in (("conv_bias", given.conv_bias), ("D", given.D), ("dt_bias", given.dt_bias)):
        if vector is not None:
            check_shape(NAME, name, vector, directions=2, channels=channels)
    if given.out_proj_bias is not None:
        check_shape(NAME, "out_proj_bias", given.out_proj_bias, d_model=given.out_proj_weight.shape[0])
    if given.lengths is not None:
        check_shape(NAME, "lengths", given.lengths, batch=xz.shape[0])
        check_dtype(NAME, "lengths", given.lengths, torch.int32, torch.int64)
        check_device(NAME, "lengths", given.lengths, xz, "xz")
    check_seq_idx(NAME, given.seq_idx, xz, "xz")
    for name, tensor in zip(given._fields[:-2], given[:-2], strict=True):
        if tensor is not None:
            check_dtype(NAME, name, tensor, *FLOATS)
            check_device(NAME, name, tensor, xz, "xz")


def _not_in_triton(given: Arguments) -> str | None:
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in given):
        return "an argument is float64, and its kernels compute in float32"
    if given.A.shape[2] > 256:
        return f"d_state is {given.A.shape[2]}, and the scan's kernel holds at most 256 states a channel"
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
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, and what the backward wants kept: the fields of ``Saved``."""
    given = Arguments(
        xz.contiguous(), conv_weight, conv_bias, x_proj_weight, dt_proj_weight, A, D, dt_bias, out_proj_weight,
        out_proj_bias, seq_idx, lengths,
    )  # fmt: skip
    with torch.autocast(xz.device.type, enabled=False):  # the dtypes here are chosen, not autocast's to change
        out, saved = bimamba.forward(given, scale, backend)
    return out, *saved


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    given, backend = Arguments(*arguments[:-2]), arguments[-1]
    (batch, length, twice), (_, channels, d_state), rank = given.xz.shape, given.A.shape, given.dt_proj_weight.shape[2]
    exact = torch.promote_types(torch.promote_types(given.xz.dtype, given.A.dtype), torch.float32)
    checkpoints = bimamba.implementations(backend)[1].checkpoint_shape(batch, length, 2 * channels, d_state)
    steps = bimamba.dt_columns(rank)
    new = given.xz.new_empty
    return (
        new(batch, length, given.out_proj_weight.shape[0]),
        new(batch * length, steps + 4 * d_state),
        new(checkpoints, dtype=exact),
        new(batch, length, channels),
        new(twice * (2 * steps + 4 * d_state)),
    )


def _backward(
    dout: Tensor,
    x_dbl: Tensor,
    checkpoints: Tensor,
    total: Tensor,
    joined: Tensor,
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
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    backend: str,
) -> list[Tensor]:
    """The gradients of xz .. out_proj_bias; an operator returns tensors alone, so an absent one is empty."""
    given = Arguments(
        xz.contiguous(), conv_weight, conv_bias, x_proj_weight, dt_proj_weight, A, D, dt_bias, out_proj_weight,
        out_proj_bias, seq_idx, lengths,
    )  # fmt: skip
    with torch.autocast(xz.device.type, enabled=False):
        gradients = bimamba.backward(dout, given, Saved(x_dbl, checkpoints, total, joined), scale, backend)
    return [xz.new_empty(0) if gradient is None else gradient for gradient in gradients[:-2]]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    given = Arguments(*arguments[5:-2])
    return [given.xz.new_empty(0) if t is None else t.new_empty(t.shape) for t in given[:-2]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # no zeros as large as the checkpoints for gradients they never get
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved, tensors = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    if dout is None:
        return (None,) * (len(tensors) + 2)
    gradients = call(_inner_backward, dout, *saved, *tensors, ctx.scale, ctx.backend)
    given = (None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=False))
    return *given, None, None, None, None


_inner = register(NAME, _forward, _fake_forward, _setup_context, _gradients)
_inner_backward = register(NAME + "_backward", _backward, _fake_backward)
