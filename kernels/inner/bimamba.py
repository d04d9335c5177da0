"""Both directions of a bidirectional Mamba block at once, forward and backward written by hand.

The directions are laid side by side as 2D channels: one scan runs the first half forwards and the second in reverse,
and with the small projections of both in one matrix, whose other blocks are zero, each product is one for both. The
zeros double a product of small rank; two products, or a batched one, would read and write as much and cost a launch
more, and no library splits the long sums of a batched weight gradient.

Kept for the backward, beside the arguments: the small projections (2R + 4N numbers a token), the sum of the two scans
before the gate (D), the scan's states at chunk boundaries. u and delta (2D each) are computed again.

Letters: B batch, L length, D channels of a direction, N state size, R rank of dt, W width, M d_model; T = B L tokens.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.kernels.inner.fused import implementations, weight_gradient
from mambakit.kernels.inner.reference import NO_STEP, padding
from mambakit.kernels.scan.reference import HALF

WIDE = 16  # numbers a tensor core takes along a sum; also what aligns the rows of B and C


class Arguments(NamedTuple):
    """The tensors of one call, as :func:`mambakit.kernels.inner.bimamba_op.bimamba_inner` describes them."""

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
    seq_idx: Tensor | None
    lengths: Tensor | None


class Saved(NamedTuple):
    """What the forward leaves to the backward: x_dbl (T, P + 4N), where P is 2R rounded up to ``WIDE``; the scan's
    states; total (B, L, D); and the joined projections, flat, as :func:`_matrices` takes them apart.
    """

    x_dbl: Tensor
    checkpoints: Tensor
    total: Tensor
    joined: Tensor


def forward(given: Arguments, scale: float, backend: str) -> tuple[Tensor, Saved]:
    """out (B, L, M), and what the backward wants."""
    conv, scan = implementations(backend)
    gate = _gate(backend)
    joined = _join(given)
    x_proj, dt_proj = _matrices(given, joined)
    z = given.xz.chunk(2, dim=-1)[1]
    u = _convolve(conv, given)
    x_dbl = _tokens(u) @ x_proj.t()
    delta, B, C = _select(given, x_dbl, dt_proj)
    y, _, checkpoints = scan.scan_forward(
        u, delta, given.A.flatten(0, 1), B, C, given.D.flatten(), None, given.dt_bias.flatten(), None, given.seq_idx,
        True, HALF,
    )  # fmt: skip
    total, gated = gate.forward(y, z, scale)
    out_proj = given.out_proj_weight.to(y.dtype)
    if given.out_proj_bias is None:
        out = _tokens(gated) @ out_proj.t()
    else:
        out = torch.addmm(given.out_proj_bias.to(y.dtype), _tokens(gated), out_proj.t())
    return out.view(*y.shape[:2], -1), Saved(x_dbl, checkpoints, total, joined)


def backward(dout: Tensor, given: Arguments, saved: Saved, scale: float, backend: str) -> Arguments:
    """The gradients of ``given``, each with its argument's shape and dtype; None for what is not given, and seq_idx and
    lengths.
    """
    conv, scan = implementations(backend)
    x_dbl, checkpoints, total, joined = saved
    x_proj, dt_proj = _matrices(given, joined)
    x, z = given.xz.chunk(2, dim=-1)
    dout = dout.reshape(-1, dout.shape[-1])
    dgated = (dout @ given.out_proj_weight.to(dout.dtype)).view(z.shape)
    dxz = torch.empty_like(given.xz)
    dx, dz = dxz.chunk(2, dim=-1)
    gated, dy = _gate(backend).backward(dgated, total, z, scale, dz)
    dout_proj_weight = weight_gradient(dout, _tokens(gated), given.out_proj_weight)
    del dgated, gated
    u = _convolve(conv, given)
    delta, B, C = _select(given, x_dbl, dt_proj)
    du, ddelta, dA, dB, dC, dD, _, ddt_bias, _ = scan.scan_backward(
        dy, None, u, delta, given.A.flatten(0, 1), B, C, given.D.flatten(), None, given.dt_bias.flatten(), None,
        given.seq_idx, checkpoints, True, HALF,
    )  # fmt: skip
    del dy, delta
    steps = dt_proj.shape[1]
    dx_dbl = torch.empty_like(x_dbl)
    torch.mm(_tokens(ddelta), dt_proj, out=dx_dbl[:, :steps])
    torch.cat((dB.flatten(0, 1).flatten(1), dC.flatten(0, 1).flatten(1)), dim=1, out=dx_dbl[:, steps:])
    ddt_proj = weight_gradient(_tokens(ddelta), x_dbl[:, :steps], given.dt_proj_weight)
    del ddelta
    dx_proj = weight_gradient(dx_dbl, _tokens(u), given.x_proj_weight)
    _tokens(du).addmm_(dx_dbl, x_proj)
    del u
    dx_proj_weight, ddt_proj_weight = torch.empty_like(given.x_proj_weight), torch.empty_like(given.dt_proj_weight)
    for own, joined in zip(_blocks(dx_proj_weight, ddt_proj_weight), _joined(given, dx_proj, ddt_proj), strict=True):
        own.copy_(joined)
    halves = []
    for i, into in enumerate((dx, torch.empty_like(dx))):
        bias = None if given.conv_bias is None else given.conv_bias[i]
        halves.append(
            conv.backward(
                du.chunk(2, dim=-1)[i], x, given.conv_weight[i], bias, None, given.seq_idx, True, bool(i), dx=into
            )
        )
    dx += halves[1][0]
    return Arguments(
        xz=dxz,
        conv_weight=torch.stack((halves[0][1], halves[1][1])),
        conv_bias=None if given.conv_bias is None else torch.stack((halves[0][2], halves[1][2])),
        x_proj_weight=dx_proj_weight,
        dt_proj_weight=ddt_proj_weight,
        A=dA.view_as(given.A),
        D=dD.view_as(given.D),
        dt_bias=ddt_bias.view_as(given.dt_bias),
        out_proj_weight=dout_proj_weight,
        out_proj_bias=None if given.out_proj_bias is None else dout.sum(0).to(given.out_proj_bias.dtype),
        seq_idx=None,
        lengths=None,
    )


def _gate(backend: str) -> ModuleType:
    if backend == "triton":
        from mambakit.kernels.inner import triton_gate

        return triton_gate
    from mambakit.kernels.inner import gate

    return gate


def _tokens(tensor: Tensor) -> Tensor:
    """(B, L, K) as (T, K)."""
    return tensor.view(-1, tensor.shape[-1])


def _convolve(conv: ModuleType, given: Arguments) -> Tensor:
    """u (B, L, 2D): x convolved in either direction, side by side."""
    batch, length, twice = given.xz.shape
    x, u = given.xz.chunk(2, dim=-1)[0], given.xz.new_empty(batch, length, twice)
    for i, half in enumerate(u.chunk(2, dim=-1)):
        bias = None if given.conv_bias is None else given.conv_bias[i]
        conv.forward(x, given.conv_weight[i], bias, None, given.seq_idx, True, bool(i), out=half)
    return u


def _select(given: Arguments, x_dbl: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """delta (B, L, 2D) before bias and softplus, B and C (B, L, 2, N), from x_dbl (T, P + 4N)."""
    batch, length, _ = given.xz.shape
    steps, d_state = dt_proj.shape[1], given.A.shape[2]
    delta = (x_dbl[:, :steps] @ dt_proj.t()).view(batch, length, -1)
    if given.lengths is not None:
        # The gradient needs no mask: softplus is flat there, exactly.
        delta.masked_fill_(padding(delta, given.lengths), NO_STEP)
    vectors = x_dbl[:, steps:].view(batch, length, 2, 2, d_state)
    return delta, vectors[:, :, 0], vectors[:, :, 1]


def _join(given: Arguments) -> Tensor:
    """Both joined matrices in the dtype of the products."""
    _, channels, d_state = given.A.shape
    steps = dt_columns(given.dt_proj_weight.shape[2])
    joined = given.xz.new_zeros(2 * channels * (2 * steps + 4 * d_state))
    own = _blocks(given.x_proj_weight, given.dt_proj_weight)
    for block, weights in zip(_joined(given, *_matrices(given, joined)), own, strict=True):
        block.copy_(weights)
    return joined


def _matrices(given: Arguments, joined: Tensor) -> tuple[Tensor, Tensor]:
    """x_proj (P + 4N, 2D) and dt_proj (2D, P) of both directions."""
    _, channels, d_state = given.A.shape
    steps = dt_columns(given.dt_proj_weight.shape[2])
    x_proj, dt_proj = joined.split((2 * channels * (steps + 4 * d_state), 2 * channels * steps))
    return x_proj.view(-1, 2 * channels), dt_proj.view(-1, steps)


def dt_columns(rank: int) -> int:
    """P: the columns of x_dbl that hold dt of both directions, and zeros up to a multiple of ``WIDE``."""
    return -(-2 * rank // WIDE) * WIDE


def _blocks(x_proj_weight: Tensor, dt_proj_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of x_proj for dt (R, D, 2), those for B and C (2, N, D, 2), and dt_proj (D, R, 2), direction last."""
    rank = dt_proj_weight.shape[2]
    dt, vectors = x_proj_weight[:, :rank], x_proj_weight[:, rank:]
    vectors = vectors.unflatten(1, (2, -1))
    return dt.permute(1, 2, 0), vectors.permute(1, 2, 3, 0), dt_proj_weight.permute(1, 2, 0)


def _joined(given: Arguments, x_proj: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where ``_blocks`` lie in the joined matrices: rows of x_proj run over dt of both directions, P in all, then over
    B of both, then C of both.
    """
    rank = given.dt_proj_weight.shape[2]
    steps = dt_proj.shape[1]
    columns = x_proj.unflatten(1, (2, -1))
    dt = columns[: 2 * rank].unflatten(0, (2, rank)).diagonal(dim1=0, dim2=2)
    vectors = columns[steps:].unflatten(0, (2, 2, -1)).diagonal(dim1=1, dim2=3)
    steps_out = dt_proj[:, : 2 * rank].unflatten(1, (2, rank)).unflatten(0, (2, -1)).diagonal(dim1=0, dim2=2)
    return dt, vectors, steps_out
