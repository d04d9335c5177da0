"""The registered operator and the public function :func:`bimamba_inner`."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_seq_idx, check_shape
from mambakit.kernels.conv import causal_conv1d
from mambakit.kernels.dispatch import choose
from mambakit.kernels.inner import bimamba
from mambakit.kernels.inner.bimamba import Arguments, Gradients, Saved, spread
from mambakit.kernels.inner.packing import Direction, exact
from mambakit.kernels.inner.reference import NO_STEP, padding
from mambakit.kernels.registration import call, register
from mambakit.kernels.scan import selective_scan

NAME = "bimamba_inner"
WIDTHS = (2, 3, 4)


def bimamba_inner(
    xz: Tensor,
    forwards: Direction,
    backwards: Direction,
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

    Letters: B batch, L length, D channels, N state size, R rank of dt, W convolution width, M d_model.

    Args:
        xz: (B, L, 2D), float16, bfloat16, float32 or float64, as every argument below. The matrix products are taken
            in its dtype (under autocast: autocast's), convolution, scan and gate in float32 at least.
        forwards: ``Direction(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A_log, D)``:
            conv_weight (D, 1, W), W from 2 to 4; conv_bias (D,) or None in both directions; x_proj_weight (R + 2N, D);
            dt_proj_weight (D, R); dt_bias (D,), added to delta before softplus; A_log (D, N), A = -exp(A_log); the
            skip weights D (D,).
        backwards: the same of the other direction.
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
    given = Arguments(xz, forwards, backwards, out_proj_weight, out_proj_bias, seq_idx, lengths)
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
    return _inner(*given.flat(), scale, chosen)[0]


def reference(given: Arguments, scale: float) -> Tensor:
    """The definition: each direction's operators one after another, the gate inside its scan."""
    dtype = given.xz.dtype
    x, z = given.xz.chunk(2, dim=-1)
    total = torch.zeros_like(z)
    for reverse, one in ((False, given.forwards), (True, given.backwards)):
        options: dict[str, Any] = {"seq_idx": given.seq_idx, "reverse": reverse, "backend": "reference"}
        u = causal_conv1d(x, one.conv_weight.squeeze(1), one.conv_bias, "silu", **options)
        sizes = [one.dt_proj_weight.shape[1], one.A_log.shape[1], one.A_log.shape[1]]
        dt, B, C = F.linear(u, one.x_proj_weight.to(dtype)).split(sizes, dim=-1)
        delta = F.linear(dt, one.dt_proj_weight.to(dtype))
        if given.lengths is not None:
            delta = delta.masked_fill(padding(delta, given.lengths), NO_STEP)
        A = -torch.exp(one.A_log.to(exact(dtype, one)))
        total = total + selective_scan(u, delta, A, B, C, one.D, z, one.dt_bias, True, **options)
    out_bias = None if given.out_proj_bias is None else given.out_proj_bias.to(dtype)
    return F.linear(scale * total, given.out_proj_weight.to(dtype), out_bias)


def _check(given: Arguments) -> None:
    xz = given.xz
    check_shape(NAME, "forwards.A_log", given.forwards.A_log, channels=None, d_state=None)
    channels, d_state = given.forwards.A_log.shape
    check_shape(NAME, "xz", xz, batch=None, length=None, twice_channels=2 * channels)
    check_shape(NAME, "forwards.conv_weight", given.forwards.conv_weight, channels=channels, one=1, width=None)
    check_shape(NAME, "forwards.dt_proj_weight", given.forwards.dt_proj_weight, channels=channels, dt_rank=None)
    check_shape(NAME, "out_proj_weight", given.out_proj_weight, d_model=None, channels=channels)
    width, rank = given.forwards.conv_weight.shape[2], given.forwards.dt_proj_weight.shape[1]
    if width not in WIDTHS:
        raise ValueError(f"{NAME}: forwards.conv_weight has width {width} (its axis 2), expected one of 2, 3, 4")
    if (given.forwards.conv_bias is None) is not (given.backwards.conv_bias is None):
        raise ValueError(f"{NAME}: one direction has a conv_bias, the other None, expected both or neither")
    # The shapes of a direction, by the names that an error gives their axes.
    shapes: dict[str, dict[str, int | None]] = {
        "conv_weight": {"channels": channels, "one": 1, "width": width},
        "conv_bias": {"channels": channels},
        "x_proj_weight": {"dt_rank_and_twice_d_state": rank + 2 * d_state, "channels": channels},
        "dt_proj_weight": {"channels": channels, "dt_rank": rank},
        "dt_bias": {"channels": channels},
        "A_log": {"channels": channels, "d_state": d_state},
        "D": {"channels": channels},
    }
    expected = [tuple(shape.values()) for shape in shapes.values()]
    device = xz.device
    for side, one in (("forwards", given.forwards), ("backwards", given.backwards)):
        for i, tensor in enumerate(one):
            if tensor is None and i == 1:
                continue
            if (
                not isinstance(tensor, Tensor)
                or tensor.shape != expected[i]
                or tensor.dtype not in FLOATS
                or tensor.device != device
            ):  # which of these it is, said by name
                name, wrong = f"{side}.{one._fields[i]}", cast(Tensor, tensor)
                check_shape(NAME, name, wrong, **list(shapes.values())[i])
                check_dtype(NAME, name, wrong, *FLOATS)
                check_device(NAME, name, wrong, xz, "xz")
    if given.out_proj_bias is not None:
        check_shape(NAME, "out_proj_bias", given.out_proj_bias, d_model=given.out_proj_weight.shape[0])
    if given.lengths is not None:
        check_shape(NAME, "lengths", given.lengths, batch=xz.shape[0])
        check_dtype(NAME, "lengths", given.lengths, torch.int32, torch.int64)
        check_device(NAME, "lengths", given.lengths, xz, "xz")
    check_seq_idx(NAME, given.seq_idx, xz, "xz")
    named = (("xz", xz), ("out_proj_weight", given.out_proj_weight), ("out_proj_bias", given.out_proj_bias))
    for name, maybe in named:
        if maybe is not None:
            check_dtype(NAME, name, maybe, *FLOATS)
            check_device(NAME, name, maybe, xz, "xz")


def _not_in_triton(given: Arguments) -> str | None:
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in given.flat()):
        return "an argument is float64, and its kernels compute in float32"
    if given.forwards.A_log.shape[1] > 256:
        return f"d_state is {given.forwards.A_log.shape[1]}, and the scan's kernel holds at most 256 states a channel"
    return None


def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor,
    dt_proj_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_log_b: Tensor,
    D_b: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, and what the backward wants kept: the fields of ``Saved``."""
    given = Arguments(
        xz.contiguous(),
        Direction(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A_log, D),
        Direction(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_proj_weight_b, dt_bias_b, A_log_b, D_b),
        out_proj_weight,
        out_proj_bias,
        seq_idx,
        lengths,
    )
    with torch.autocast(xz.device.type, enabled=False):  # the dtypes here are chosen, not autocast's to change
        out, saved = bimamba.forward(given, scale, backend)
    return out, *saved


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    given, backend = Arguments.of(arguments[:-2]), arguments[-1]
    cut, (batch, length, _), new = bimamba.layout(given), given.xz.shape, given.xz.new_empty
    wide = exact(given.xz.dtype, given.forwards)
    checkpoints = bimamba.implementations(backend)[1].checkpoint_shape(batch, length, 2 * cut.channels, cut.d_state)
    return (
        new(batch, length, cut.d_model),
        new(batch * length, 2 * cut.rows),
        new(checkpoints, dtype=wide),
        new(batch, length, cut.channels),
        new(sum(cut.sizes[0])),
        new(sum(cut.sizes[1]), dtype=wide),
    )


def _backward(
    dout: Tensor,
    x_dbl: Tensor,
    checkpoints: Tensor,
    total: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor,
    dt_proj_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_log_b: Tensor,
    D_b: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    backend: str,
) -> list[Tensor]:
    """The fields of ``Gradients``; an operator returns tensors alone, so an absent one is empty."""
    given = Arguments(
        xz.contiguous(),
        Direction(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A_log, D),
        Direction(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_proj_weight_b, dt_bias_b, A_log_b, D_b),
        out_proj_weight,
        out_proj_bias,
        seq_idx,
        lengths,
    )
    with torch.autocast(xz.device.type, enabled=False):
        found = bimamba.backward(dout, given, Saved(x_dbl, checkpoints, total, matrices, vectors), scale, backend)
    return [xz.new_empty(0) if gradient is None else gradient for gradient in found]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    given, one = Arguments.of(arguments[6:-2]), arguments[7:14]
    cut, new, wide = bimamba.layout(given), given.xz.new_empty, exact(given.xz.dtype, given.forwards)
    twice, bias = 2 * cut.channels, given.out_proj_bias
    return [
        new(given.xz.shape),
        new(2, cut.channels, cut.width, dtype=wide),
        new(0) if one[1] is None else new(2, cut.channels, dtype=wide),
        new(sum(cut.apart), dtype=wide),
        new(twice, dtype=wide),
        new(twice, dtype=wide),
        new(given.out_proj_weight.shape, dtype=given.out_proj_weight.dtype),
        new(0) if bias is None else new(bias.shape, dtype=bias.dtype),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # no zeros as large as the checkpoints for gradients they never get
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    saved, tensors = kept[:5], kept[5:]
    if dout is None:
        return (None,) * (len(tensors) + 2)
    found = Gradients(*call(_inner_backward, dout, *saved, *tensors, ctx.scale, ctx.backend))
    given = Arguments.of(tensors)
    if given.forwards.conv_bias is None:
        found = found._replace(conv_bias=None)
    if given.out_proj_bias is None:
        found = found._replace(out_proj_bias=None)
    return *spread(given, found), None, None, None, None


_inner = register(NAME, _forward, _fake_forward, _setup_context, _gradients)
_inner_backward = register(NAME + "_backward", _backward, _fake_backward)
