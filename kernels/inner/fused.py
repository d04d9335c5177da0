"""The inner path of the Mamba-1 block, forward and backward written by hand over the operators' implementations.

What is kept for the backward, beside the arguments: the projections of u to dt, B and C (R + 2N numbers a token where
u has D), and the scan's states at chunk boundaries. u and delta are computed again: a convolution and a product of
small rank. The scan's backward computes the state, and so y, again in any case: on a GPU it hands y over for the
gradient of out_proj. In vectorised PyTorch that would be a scan of its own, so there y is kept.

Letters: B batch, L length, D channels, N state size, R rank of dt, W convolution width, M d_model; T = B L tokens.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.kernels.inner.reference import NO_STEP, padding
from mambakit.kernels.scan.reference import direction_of


class Arguments(NamedTuple):
    """The tensors of one call, as :func:`mambakit.kernels.inner.op.mamba_inner` describes them."""

    xz: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    conv_state: Tensor | None
    ssm_state: Tensor | None
    seq_idx: Tensor | None
    lengths: Tensor | None


def implementations(backend: str) -> tuple[ModuleType, ModuleType]:
    """The modules that hold the convolution's ``forward`` and ``backward``, and the scan's. Triton loads here."""
    if backend == "triton":
        from mambakit.kernels.conv import triton_launch
        from mambakit.kernels.scan import triton_kernels

        return triton_launch, triton_kernels
    from mambakit.kernels.conv import chunked as conv
    from mambakit.kernels.scan import chunked as scan

    return conv, scan


def forward(given: Arguments, reverse: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (B, L, M), the final state (B, D, N), and for the backward x_dbl (T, R + 2N), the checkpoints, and y
    (T, D), empty where the backward computes it again.
    """
    conv, scan = implementations(backend)
    x_proj, dt_proj, out_proj = _projections(given)
    x, z = given.xz.chunk(2, dim=-1)
    u = conv.forward(x, given.conv_weight, given.conv_bias, given.conv_state, given.seq_idx, True, reverse)
    x_dbl = _tokens(u) @ x_proj.t()
    delta, B, C = _select(given, x_dbl, dt_proj)
    y, final_state, checkpoints = scan.scan_forward(
        u, delta, given.A, B, C, given.D, z, given.dt_bias, given.ssm_state, given.seq_idx, True, direction_of(reverse)
    )
    if given.out_proj_bias is None:
        out = _tokens(y) @ out_proj.t()
    else:
        out = torch.addmm(given.out_proj_bias.to(y.dtype), _tokens(y), out_proj.t())
    kept = y.new_empty(0) if backend == "triton" else _tokens(y)
    return out.view(*y.shape[:2], -1), final_state, x_dbl, checkpoints, kept


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    given: Arguments,
    saved: tuple[Tensor, Tensor, Tensor],
    reverse: bool,
    backend: str,
) -> Arguments:
    """The gradients of ``given``, each with its argument's shape and dtype; None for seq_idx, lengths, and what is
    not given.
    """
    conv, scan = implementations(backend)
    x_dbl, checkpoints, kept = saved
    x_proj, dt_proj, out_proj = _projections(given)
    x, z = given.xz.chunk(2, dim=-1)
    rank = dt_proj.shape[1]
    dout = dout.reshape(-1, dout.shape[-1])
    dy = (dout @ out_proj).view(x.shape)
    u = conv.forward(x, given.conv_weight, given.conv_bias, given.conv_state, given.seq_idx, True, reverse)
    delta, B, C = _select(given, x_dbl, dt_proj)
    arguments = (u, delta, given.A, B, C, given.D, z, given.dt_bias, given.ssm_state, given.seq_idx, checkpoints)
    # Both halves are written where they belong: putting them together would read and write them once more.
    dxz = torch.empty(given.xz.shape, dtype=given.xz.dtype, device=given.xz.device)
    dx, dz = dxz.chunk(2, dim=-1)
    du, ddelta, dA, dB, dC, dD, _, ddt_bias, dssm_state, *recomputed = scan.scan_backward(
        dy, dfinal_state, *arguments, True, direction_of(reverse), recompute_out=backend == "triton", dz=dz
    )
    del dy, delta, arguments  # of D numbers a token each, as the next ones below: gone as soon as they have served
    y = _tokens(recomputed.pop()) if recomputed else kept
    dout_proj_weight = weight_gradient(dout, y, given.out_proj_weight)
    del y
    dx_dbl = torch.empty_like(x_dbl)
    torch.mm(_tokens(ddelta), dt_proj, out=dx_dbl[:, :rank])
    torch.cat((_tokens(dB), _tokens(dC)), dim=1, out=dx_dbl[:, rank:])
    ddt_proj_weight = weight_gradient(_tokens(ddelta), x_dbl[:, :rank], given.dt_proj_weight)
    del ddelta
    dx_proj_weight = weight_gradient(dx_dbl, _tokens(u), given.x_proj_weight)
    _tokens(du).addmm_(dx_dbl, x_proj)
    del u
    _, dconv_weight, dconv_bias, dconv_state = conv.backward(
        du, x, given.conv_weight, given.conv_bias, given.conv_state, given.seq_idx, True, reverse, dx=dx
    )
    del du
    return Arguments(
        xz=dxz,
        conv_weight=dconv_weight,
        conv_bias=dconv_bias,
        x_proj_weight=dx_proj_weight,
        dt_proj_weight=ddt_proj_weight,
        A=dA,
        D=dD,
        dt_bias=ddt_bias,
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


def _projections(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of x_proj, dt_proj and out_proj in the dtype of the products."""
    x_proj, dt_proj, out_proj = given.x_proj_weight, given.dt_proj_weight, given.out_proj_weight
    return x_proj.to(given.xz.dtype), dt_proj.to(given.xz.dtype), out_proj.to(given.xz.dtype)


def _select(given: Arguments, x_dbl: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """delta (B, L, D) before bias and softplus, B and C (B, L, N), from x_dbl (T, R + 2N)."""
    batch, length, _ = given.xz.shape
    rank, d_state = dt_proj.shape[1], given.A.shape[1]
    dt, B, C = x_dbl.split([rank, d_state, d_state], dim=1)
    delta = (dt @ dt_proj.t()).view(batch, length, -1)
    if given.lengths is not None:
        # The gradient needs no mask: softplus is flat there, exactly.
        delta.masked_fill_(padding(delta, given.lengths), NO_STEP)
    return delta, B.view(batch, length, d_state), C.view(batch, length, d_state)


def weight_gradient(dout: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """dout.T @ inputs in ``weight``'s dtype: from dout (T, O) and inputs (T, I), (O, I)."""
    if dout.is_cuda and weight.dtype == torch.float32 != dout.dtype:
        return torch.mm(dout.t(), inputs, out_dtype=torch.float32)  # summed in float32: no need to round in between
    return (dout.t() @ inputs).to(weight.dtype)
