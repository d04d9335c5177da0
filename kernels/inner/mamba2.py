"""The inner path of the Mamba-2 block, forward and backward written by hand over the operators' implementations.

What is kept for the backward, beside the arguments: y, the recurrence's output, of D numbers a token, and one number a
token and group for its norm. On a GPU the convolution's output, the step sizes and the normed y are computed again,
each in one pass over memory; y is not, because its gradient needs it ahead of the recurrence's own backward, which
would be a second forward of it. In vectorised PyTorch those passes cost more, so there their results are kept.

Letters: B batch, L length, D channels of the recurrence, E of the MLP beside it, K of the convolution, H heads, P
channels a head, G groups, N state size, M d_model; T = B L tokens.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.inner import mamba2_steps
from mambakit.kernels.inner.fused import weight_gradient
from mambakit.kernels.inner.mamba2_reference import (
    Arguments,
    Options,
    Sizes,
    by_head,
    heads,
    per_head,
    sizes,
    split,
)


class Kept(NamedTuple):
    """Results of the forward for the backward: y (T, D); the norm's rstd (T, G); the states that ssd keeps; the
    convolution's output (B, L, K) and out_proj's input (T, E + D). Empty where there is none, or where it is computed
    again.
    """

    y: Tensor
    rstd: Tensor
    starts: Tensor
    xBC: Tensor
    inputs: Tensor


@cache
def implementations(backend: str) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules that hold the convolution, the recurrence and the norm. Triton loads here."""
    if backend == "triton":
        from mambakit.kernels.conv import triton_launch as conv
        from mambakit.kernels.duality import triton_kernels as ssd
        from mambakit.kernels.norm import triton_launch as norm
    else:
        from mambakit.kernels.conv import chunked as conv  # type: ignore[no-redef]
        from mambakit.kernels.duality import chunked as ssd  # type: ignore[no-redef]
        from mambakit.kernels.norm import chunked as norm  # type: ignore[no-redef]
    return conv, ssd, norm


def forward(given: Arguments, options: Options, backend: str) -> tuple[Tensor, Tensor, Kept]:
    """out (B, L, M), the final state (B, H, P, N), and what the backward wants."""
    conv, ssd, norm = implementations(backend)
    size = sizes(given, options.ngroups)
    gate, value, z, xBC, dt = split(given.projected, size)
    xBC = _convolve(given, xBC, conv)
    recurrence = _recurrence(given, options, size, xBC, z, dt, backend)
    y, final_state, starts = ssd.ssd_forward(*recurrence, options.chunk_size)
    y = normed = _tokens(y.flatten(2))
    rstd = y.new_empty(0, dtype=torch.promote_types(y.dtype, torch.float32))
    if given.norm_weight is not None:
        grouping = (options.norm_before_gate, size.inner // size.groups)
        normed, rstd = norm.gated_rms_norm(y, _tokens(z), given.norm_weight, options.eps, *grouping)
    inputs = _beside_mlp(gate, value, normed)
    weight = given.out_proj_weight.to(y.dtype)
    if given.out_proj_bias is None:
        out = inputs @ weight.t()
    else:
        out = torch.addmm(given.out_proj_bias.to(y.dtype), inputs, weight.t())
    again = backend == "triton"
    # Without norm and MLP out_proj's input is y, and an operator may not return one tensor twice.
    kept = Kept(y, rstd, starts, y.new_empty(0) if again else xBC, y.new_empty(0) if again or inputs is y else inputs)
    return out.view(*given.projected.shape[:2], -1), final_state, kept


def backward(
    dout: Tensor, dfinal_state: Tensor | None, given: Arguments, kept: Kept, options: Options, backend: str
) -> Arguments:
    """The gradients of ``given``, each with its argument's shape and dtype; None for seq_idx, lengths, and what is
    not given.
    """
    conv, ssd, norm = implementations(backend)
    size = sizes(given, options.ngroups)
    dout = dout.reshape(-1, dout.shape[-1])
    dinputs = dout @ given.out_proj_weight.to(dout.dtype)
    # Each part is written where it belongs: putting them together would read and write them once more.
    dprojected = torch.empty(given.projected.shape, dtype=given.projected.dtype, device=dout.device)
    dgate, dvalue, dz, dxBC, ddt = split(dprojected, size)
    gate, value, z, x_in, dt = split(given.projected, size)

    dy: Tensor = dinputs[:, size.mlp :]
    y: Tensor | None = kept.y
    if size.mlp:
        slope = dinputs[:, : size.mlp].view(gate.shape)
        dvalue.copy_(slope * F.silu(gate))
        dgate.copy_(torch.ops.aten.silu_backward(slope * value, gate))
    dnorm_weight = None
    if given.norm_weight is not None:
        y = None if kept.inputs.numel() else torch.empty_like(kept.y)
        grouping = (options.norm_before_gate, size.inner // size.groups)
        dy, _, dnorm_weight = norm.gated_rms_norm_backward(
            dy, kept.y, _tokens(z), given.norm_weight, kept.rstd, *grouping, dz=_tokens(dz), y=y
        )
    inputs = _beside_mlp(gate, value, y) if y is not None else kept.inputs
    dout_proj_weight = weight_gradient(dout, inputs, given.out_proj_weight)
    del inputs, y
    xBC = kept.xBC if kept.xBC.numel() else _convolve(given, x_in, conv)
    arguments = _recurrence(given, options, size, xBC, z, dt, backend)
    dy = dy.reshape(*xBC.shape[:2], size.heads, size.channels)
    dconvolved = torch.empty_like(xBC)
    out = (*heads(dconvolved, size), by_head(dz, size) if given.norm_weight is None else None)
    _, dsteps, ddecays, _, _, dD, _, dssm_state = ssd.ssd_backward(
        dy, dfinal_state, *arguments, kept.starts, options.chunk_size, out
    )
    del dy, dinputs, xBC, arguments, out  # of D numbers a token: gone as soon as they have served
    _, dconv_weight, dconv_bias, dconv_state = conv.backward(
        dconvolved, x_in, given.conv_weight, given.conv_bias, given.conv_state, given.seq_idx, True, False, dx=dxBC
    )
    limit = (options.least_step, options.most_step)
    step_inputs = (dt, given.dt_bias, given.A, given.lengths)
    ddt_bias, dA = mamba2_steps.backward(dsteps, ddecays, *step_inputs, *limit, backend, ddt)
    return Arguments(
        projected=dprojected,
        conv_weight=dconv_weight,
        conv_bias=dconv_bias,
        dt_bias=ddt_bias,
        A=dA,
        D=dD.view(given.D.shape),
        norm_weight=dnorm_weight,
        out_proj_weight=dout_proj_weight,
        out_proj_bias=None if given.out_proj_bias is None else dout.sum(0).to(given.out_proj_bias.dtype),
        conv_state=dconv_state,
        ssm_state=dssm_state,
        seq_idx=None,
        lengths=None,
    )


def _tokens(tensor: Tensor) -> Tensor:
    """(B, L, K) as (T, K)."""
    return tensor.view(-1, tensor.shape[-1])


def _convolve(given: Arguments, xBC: Tensor, conv: ModuleType) -> Tensor:
    """SiLU(conv(x, B, C)), (B, L, K)."""
    return conv.forward(xBC, given.conv_weight, given.conv_bias, given.conv_state, given.seq_idx, True, False)


def _recurrence(
    given: Arguments, options: Options, size: Sizes, xBC: Tensor, z: Tensor, dt: Tensor, backend: str
) -> tuple[Any, ...]:
    """The arguments of the recurrence, from x to seq_idx; xBC is the convolution's output."""
    x, B, C = heads(xBC, size)
    gate = by_head(z, size) if given.norm_weight is None else None
    limit = (options.least_step, options.most_step)
    steps, decays = mamba2_steps.forward(dt, given.dt_bias, given.A, given.lengths, *limit, backend)
    return x, steps, decays, B, C, per_head(given.D, size), gate, given.ssm_state, given.seq_idx


def _beside_mlp(gate: Tensor, value: Tensor, y: Tensor) -> Tensor:
    """y (T, D) behind the MLP's part SiLU(gate) value: (T, E + D), y itself where there is none."""
    if not gate.shape[-1]:
        return y
    return torch.cat([_tokens(F.silu(gate) * value), y], dim=1)
