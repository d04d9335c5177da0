"""The registered operator and the public function :func:`mamba2_inner`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_seq_idx, check_shape
from mambakit.kernels.dispatch import as_they_are, choose
from mambakit.kernels.duality.weighted import too_large
from mambakit.kernels.inner import mamba2, mamba2_reference
from mambakit.kernels.inner.mamba2_reference import Arguments, Options
from mambakit.kernels.norm.op import MAX_TRITON_CHANNELS
from mambakit.kernels.registration import call, register

NAME = "mamba2_inner"
WIDTHS = (2, 3, 4)


def mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None = None,
    *,
    ngroups: int = 1,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    chunk_size: int = 256,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What the Mamba-2 block (Dao and Gu 2024, arXiv 2405.21060, section 7) does behind its input projection.

    With gate, value, z, (x, B, C), dt the parts of ``projected``, side by side in this order:

        x, B, C <- SiLU(causal_conv1d(x, B, C));    dt <- clamp(softplus(dt + dt_bias), *dt_limit)
        y = ssd(x, dt, A, B, C, D)
        out = out_proj_weight (SiLU(gate) value, gated_rms_norm(y, z, norm_weight)) + out_proj_bias

    It equals those operators one after another and keeps less for its backward: ``projected`` and y, where they would
    keep the convolution's output and out_proj's input as well, which cost little to compute again.

    Letters: B batch, L length, D channels of the recurrence, H heads, G groups, N state size, E channels of the gated
    MLP beside the recurrence (often 0), K = D + 2 G N channels of the convolution, W its width, M d_model. Floats may
    be float16, bfloat16, float32 or float64.

    Args:
        projected: (B, L, 2E + D + K + H). The matrix product is taken in its dtype (under autocast: autocast's),
            convolution, recurrence and norm in float32 at least.
        conv_weight: (K, W), W from 2 to 4.
        conv_bias: (K,) or None.
        dt_bias: (H,).
        A: (H,), negative in a stable system.
        D: skip weight, (H,) or (D,).
        norm_weight: (D,), or None: then no norm, y SiLU(z) alone.
        out_proj_weight: (M, E + D).
        out_proj_bias: (M,) or None.
        ngroups: G; the norm too is taken over each of G groups of channels.
        dt_limit: the smallest and largest step.
        eps: of the norm.
        norm_before_gate: norm(y) SiLU(z) instead of norm(y SiLU(z)).
        chunk_size: the most steps that PyTorch computes at once.
        conv_state: (B, K, W-1), the convolution's inputs before the first, oldest first; zeros if None.
        ssm_state: (B, H, D / H, N), the state before the first element; zeros if None.
        seq_idx: (B, L) int32 or int64; where its value changes another sequence begins and nothing is carried over.
        lengths: (B,) integers; elements of row b from ``lengths[b]`` on are padding, which changes no state. ``out``
            is finite and means nothing there.
        backend: "auto", "triton", "torch" or "reference"; see ``mambakit.kernels.dispatch``.

    Returns:
        out (B, L, M) in projected's dtype (autocast's under autocast), and the final state (B, H, D / H, N), float32
        (float64 for float64). Gradients flow to every argument but seq_idx and lengths, also back through the final
        state. For gradients of gradients use ``backend="reference"``.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or backend, named.
    """
    given = Arguments(
        projected,
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        norm_weight,
        out_proj_weight,
        out_proj_bias,
        conv_state,
        ssm_state,
        seq_idx,
        lengths,
    )
    options = Options(ngroups, float(dt_limit[0]), float(dt_limit[1]), float(eps), norm_before_gate, chunk_size)
    _check(given, options)
    device = projected.device.type
    if torch.is_autocast_enabled(device) and projected.dtype != torch.float64:
        projected = projected.to(torch.get_autocast_dtype(device))
    given = given._replace(projected=projected.contiguous())
    chosen = choose(NAME, backend, projected, _not_in_triton(given, options)).backend
    if chosen == "reference":
        with torch.autocast(device, enabled=False):
            return mamba2_reference.mamba2_inner(given, options)
    out, final_state, *_ = _inner(*given, *options, chosen)
    return out, final_state


def _check(given: Arguments, options: Options) -> None:
    projected, groups = given.projected, options.ngroups
    check_shape(NAME, "A", given.A, heads=None)
    check_shape(NAME, "conv_weight", given.conv_weight, conv_channels=None, width=None)
    (conv, taps), heads = given.conv_weight.shape, len(given.A)
    if taps not in WIDTHS:
        raise ValueError(f"{NAME}: conv_weight has width {taps} (its axis 1), expected one of 2, 3, 4")
    check_shape(NAME, "out_proj_weight", given.out_proj_weight, d_model=None, channels=None)
    check_shape(NAME, "projected", projected, batch=None, length=None, channels=None)
    if groups < 1 or heads % groups:
        raise ValueError(f"{NAME}: ngroups={groups} does not divide the {heads} heads; choose a divisor of them")
    size = mamba2_reference.sizes(given, groups)
    if size.mlp < 0 or size.inner < 1 or size.inner % heads or conv != size.inner + 2 * groups * max(1, size.states):
        raise ValueError(
            f"{NAME}: projected has {projected.shape[2]} channels, conv_weight {conv}, A {heads} heads and "
            f"out_proj_weight {given.out_proj_weight.shape[1]} columns; expected 2E + D + K + H, K = D + 2 G N, H and "
            f"E + D, where the {heads} heads divide D and G is {groups}"
        )
    batch = projected.shape[0]
    for name, vector, count in (
        ("conv_bias", given.conv_bias, conv),
        ("dt_bias", given.dt_bias, heads),
        ("D", given.D, heads if len(given.D) == heads else size.inner),
        ("norm_weight", given.norm_weight, size.inner),
        ("out_proj_bias", given.out_proj_bias, given.out_proj_weight.shape[0]),
    ):
        if vector is not None:
            check_shape(NAME, name, vector, channels=count)
    if given.conv_state is not None:
        check_shape(NAME, "conv_state", given.conv_state, batch=batch, conv_channels=conv, width_less_1=taps - 1)
    if given.ssm_state is not None:
        check_shape(
            NAME, "ssm_state", given.ssm_state, batch=batch, heads=heads, channels=size.channels, d_state=size.states
        )
    if given.lengths is not None:
        check_shape(NAME, "lengths", given.lengths, batch=batch)
        check_dtype(NAME, "lengths", given.lengths, torch.int32, torch.int64)
        check_device(NAME, "lengths", given.lengths, projected, "projected")
    check_seq_idx(NAME, given.seq_idx, projected, "projected")
    device = projected.device
    for name, tensor in zip(given._fields[:-2], given[:-2], strict=True):
        if tensor is not None and (tensor.dtype not in FLOATS or tensor.device != device):
            check_dtype(NAME, name, tensor, *FLOATS)
            check_device(NAME, name, tensor, projected, "projected")
    if options.chunk_size < 1:
        raise ValueError(f"{NAME}: chunk_size is {options.chunk_size}, expected at least 1")
    if not 0.0 <= options.least_step <= options.most_step:
        limit = (options.least_step, options.most_step)
        raise ValueError(f"{NAME}: dt_limit is {limit}, expected 0 <= smallest <= largest")


def _not_in_triton(given: Arguments, options: Options) -> str | None:
    size = mamba2_reference.sizes(given, options.ngroups)
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in given):
        return "an argument is float64, and its kernels compute in float32"
    if (reason := too_large(size.channels, size.states, given.projected.dtype == torch.bfloat16)) is not None:
        return reason
    if given.norm_weight is not None and size.inner // size.groups > MAX_TRITON_CHANNELS:
        channels = size.inner // size.groups
        return f"a group of the norm has {channels} channels, and its kernel holds at most {MAX_TRITON_CHANNELS}"
    return None


def _forward(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    ngroups: int,
    least_step: float,
    most_step: float,
    eps: float,
    norm_before_gate: bool,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, the final state, and what the backward wants kept, as ``mamba2.Kept`` says."""
    given = Arguments(
        projected,
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        norm_weight,
        out_proj_weight,
        out_proj_bias,
        conv_state,
        ssm_state,
        seq_idx,
        lengths,
    )
    options = Options(ngroups, least_step, most_step, eps, norm_before_gate, chunk_size)
    with as_they_are(backend, projected):
        out, final_state, kept = mamba2.forward(given, options, backend)
    return out, final_state, *kept  # type: ignore[return-value]


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    given, options, backend = Arguments(*arguments[:13]), Options(*arguments[13:-1]), arguments[-1]
    size, projected = mamba2_reference.sizes(given, options.ngroups), given.projected
    batch, length, _ = projected.shape
    exact = torch.promote_types(torch.promote_types(projected.dtype, given.A.dtype), torch.float32)
    wide = torch.promote_types(projected.dtype, torch.float32)
    state = (batch, size.heads, size.channels, size.states)
    spans = mamba2.implementations(backend)[1].span_count(
        projected.new_empty(batch, length, size.heads, size.channels), options.chunk_size
    )
    again, normed = backend == "triton", given.norm_weight is not None
    return (
        projected.new_empty(batch, length, given.out_proj_weight.shape[0]),
        projected.new_empty(state, dtype=exact),
        projected.new_empty(batch * length, size.inner),
        projected.new_empty((batch * length, size.groups) if normed else 0, dtype=wide),
        projected.new_empty((spans, *state), dtype=exact),
        projected.new_empty(0 if again else (batch, length, size.conv)),
        projected.new_empty(0 if again or not (normed or size.mlp) else (batch * length, size.mlp + size.inner)),
    )


def _backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    y: Tensor,
    rstd: Tensor,
    starts: Tensor,
    xBC: Tensor,
    inputs: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    ngroups: int,
    least_step: float,
    most_step: float,
    eps: float,
    norm_before_gate: bool,
    chunk_size: int,
    backend: str,
) -> list[Tensor]:
    """The gradients of projected .. ssm_state; an operator returns tensors alone, so an absent one is empty."""
    given = Arguments(
        projected,
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        norm_weight,
        out_proj_weight,
        out_proj_bias,
        conv_state,
        ssm_state,
        seq_idx,
        lengths,
    )
    options = Options(ngroups, least_step, most_step, eps, norm_before_gate, chunk_size)
    kept = mamba2.Kept(y, rstd, starts, xBC, inputs)
    with as_they_are(backend, projected):
        gradients = mamba2.backward(dout, dfinal_state, given, kept, options, backend)
    return [projected.new_empty(0) if gradient is None else gradient for gradient in gradients[:-2]]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    given = Arguments(*arguments[7:20])
    return [given.projected.new_empty(0) if t is None else t.new_empty(t.shape) for t in given[:-2]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:13], inputs[13:]
    ctx.set_materialize_grads(False)  # no zeros as large as what is kept for gradients it never gets
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    kept, tensors = saved[:5], saved[5:]
    given = Arguments(*tensors)
    if dout is None:
        dout = given.projected.new_zeros(*given.projected.shape[:2], given.out_proj_weight.shape[0])
    gradients = call(_inner_backward, dout, dfinal_state, *kept, *tensors, *ctx.options)
    found = (None if tensor is None else gradient for tensor, gradient in zip(given, gradients, strict=False))
    return *found, None, None, *(None for _ in ctx.options)


_inner = register(NAME, _forward, _fake_forward, _setup_context, _gradients)
_inner_backward = register(NAME + "_backward", _backward, _fake_backward)
