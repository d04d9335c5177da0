"""Both directions of a bidirectional Mamba block at once, forward and backward written by hand.

The directions are laid side by side as 2D channels: one scan runs the first half forwards and the second in reverse,
and with the small projections of both in one matrix, whose other blocks are zero, each product is one for both. The
zeros double a product of small rank; two products, or a batched one, would read and write as much and cost a launch
more, and no library splits the long sums of a batched weight gradient. ``packing.py`` lays the weights out.

Kept for the backward, beside the arguments and their packed weights: the small projections (2K numbers a token), the
sum of the two scans before the gate (D), the scan's states at chunk boundaries. u and delta (2D each) are computed
again.

Letters: B batch, L length, D channels of a direction, N state size, R rank of dt, W width, M d_model; T = B L tokens;
K = R + 2N, R rounded up to ``packing.ALIGNED``.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mambakit.kernels.inner.fused import implementations, weight_gradient
from mambakit.kernels.inner.packing import Direction, Layout, Weights
from mambakit.kernels.inner.reference import NO_STEP, padding
from mambakit.kernels.scan.reference import HALF


class Arguments(NamedTuple):
    """The tensors of one call, as :func:`mambakit.kernels.inner.bimamba_op.bimamba_inner` describes them."""

    xz: Tensor
    forwards: Direction
    backwards: Direction
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    seq_idx: Tensor | None
    lengths: Tensor | None

    @classmethod
    def of(cls, tensors: tuple[Tensor | None, ...]) -> Arguments:
        """From one tensor after another; the inverse of ``flat``."""
        xz, rest, count = tensors[0], tensors[1:], len(Direction._fields)
        return cls(xz, Direction(*rest[:count]), Direction(*rest[count : 2 * count]), *rest[2 * count :])  # type: ignore

    def flat(self) -> tuple[Tensor | None, ...]:
        return (self.xz, *self.forwards, *self.backwards, *self[3:])  # type: ignore[return-value]


class Saved(NamedTuple):
    """What the forward leaves to the backward: x_dbl (T, 2K); the scan's states; total (B, L, D); packed weights."""

    x_dbl: Tensor
    checkpoints: Tensor
    total: Tensor
    matrices: Tensor
    vectors: Tensor


def layout(given: Arguments) -> Layout:
    one = given.forwards
    channels, d_state = one.A_log.shape
    return Layout(
        channels, d_state, one.conv_weight.shape[2], one.dt_proj_weight.shape[1], given.out_proj_weight.shape[0]
    )


def forward(given: Arguments, scale: float, backend: str) -> tuple[Tensor, Saved]:
    """out (B, L, M), and what the backward wants."""
    conv, scan = implementations(backend)
    gate, packing = _own(backend)
    cut = layout(given)
    matrices, vectors = packing.pack(cut, given.xz.dtype, given.forwards, given.backwards, given.out_proj_weight)
    weights = cut.split(matrices, vectors, given.forwards.conv_bias is not None)
    x, z = given.xz.chunk(2, dim=-1)
    u = conv.forward_both(x, weights.conv_weight, weights.conv_bias, given.seq_idx, True)
    x_dbl = _tokens(u) @ weights.x_proj.t()
    delta, B, C = _select(given, cut, x_dbl, weights)
    y, _, checkpoints = scan.scan_forward(
        u, delta, weights.A, B, C, weights.D, None, weights.dt_bias, None, given.seq_idx, True, HALF
    )
    total, gated = gate.forward(y, z, scale)
    if given.out_proj_bias is None:
        out = _tokens(gated) @ weights.out_proj.t()
    else:
        out = torch.addmm(given.out_proj_bias.to(y.dtype), _tokens(gated), weights.out_proj.t())
    return out.view(*y.shape[:2], -1), Saved(x_dbl, checkpoints, total, matrices, vectors)


class Gradients(NamedTuple):
    """Those of both directions in one tensor each; ``apart`` has x_proj, dt_proj and A_log, as ``packing.unpack`` says.

    Each direction's is contiguous there, so that autograd keeps it as it is, where a part of a matrix would be copied.
    """

    xz: Tensor
    conv_weight: Tensor  # (2, D, W)
    conv_bias: Tensor | None  # (2, D)
    apart: Tensor
    dt_bias: Tensor  # (2D,)
    D: Tensor  # (2D,)
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None


def backward(dout: Tensor, given: Arguments, saved: Saved, scale: float, backend: str) -> Gradients:
    conv, scan = implementations(backend)
    cut, x_dbl = layout(given), saved.x_dbl
    weights = cut.split(saved.matrices, saved.vectors, given.forwards.conv_bias is not None)
    x, z = given.xz.chunk(2, dim=-1)
    dout = dout.reshape(-1, dout.shape[-1])
    dgated = (dout @ weights.out_proj).view(z.shape)
    dxz = torch.empty_like(given.xz)
    dx, dz = dxz.chunk(2, dim=-1)
    gate, packing = _own(backend)
    gated, dy = gate.backward(dgated, saved.total, z, scale, dz)
    dout_proj_weight = weight_gradient(dout, _tokens(gated), given.out_proj_weight)
    del dgated, gated
    u = conv.forward_both(x, weights.conv_weight, weights.conv_bias, given.seq_idx, True)
    delta, B, C = _select(given, cut, x_dbl, weights)
    du, ddelta, dA, dB, dC, dD, _, ddt_bias, _ = scan.scan_backward(
        dy, None, u, delta, weights.A, B, C, weights.D, None, weights.dt_bias, None, given.seq_idx, saved.checkpoints,
        True, HALF,
    )  # fmt: skip
    del dy, delta
    ddelta = _tokens(ddelta)
    dx_dbl = ddelta @ weights.dt_proj
    pairs = (dB.view(-1, 2, cut.d_state), dC.view(-1, 2, cut.d_state))
    torch.cat(pairs, dim=2, out=dx_dbl.view(-1, 2, cut.rows)[:, :, cut.dt_rows :])
    ddt_proj = weight_gradient(ddelta, x_dbl, given.forwards.dt_proj_weight)
    del ddelta
    dx_proj = weight_gradient(dx_dbl, _tokens(u), given.forwards.x_proj_weight)
    _tokens(du).addmm_(dx_dbl, weights.x_proj)
    del u
    dconv_weight, dconv_bias = conv.backward_both(
        du, x, weights.conv_weight, weights.conv_bias, given.seq_idx, True, dx
    )
    return Gradients(
        xz=dxz,
        conv_weight=dconv_weight,
        conv_bias=dconv_bias,
        apart=packing.unpack(cut, dx_proj, ddt_proj, dA, weights.A),
        dt_bias=ddt_bias,
        D=dD,
        out_proj_weight=dout_proj_weight,
        out_proj_bias=None if given.out_proj_bias is None else dout.sum(0).to(given.out_proj_bias.dtype),
    )


def spread(given: Arguments, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """The gradients of ``given.flat()`` up to out_proj_bias, as views where the dtypes agree."""
    cut = layout(given)
    pieces = gradients.apart.split_with_sizes(cut.apart)
    biases = (None, None) if gradients.conv_bias is None else gradients.conv_bias.unbind()
    found = zip(
        gradients.conv_weight.unsqueeze(2).unbind(),
        biases,
        [piece.view(-1, cut.channels) for piece in pieces[:2]],
        [piece.view(-1, cut.rank) for piece in pieces[2:4]],
        gradients.dt_bias.chunk(2),
        [piece.view(-1, cut.d_state) for piece in pieces[4:]],
        gradients.D.chunk(2),
        strict=True,
    )
    sides: list[Tensor | None] = []
    for one, side in zip((given.forwards, given.backwards), found, strict=True):
        for own, gradient in zip(one, side, strict=True):
            if own is not None and gradient is not None and gradient.dtype != own.dtype:
                gradient = gradient.to(own.dtype)
            sides.append(gradient)
    return (gradients.xz, *sides, gradients.out_proj_weight, gradients.out_proj_bias)


def _own(backend: str) -> tuple[ModuleType, ModuleType]:
    """The modules of the gate and of the packing."""
    if backend == "triton":
        from mambakit.kernels.inner import triton_gate, triton_packing

        return triton_gate, triton_packing
    from mambakit.kernels.inner import gate, packing

    return gate, packing


def _tokens(tensor: Tensor) -> Tensor:
    """(B, L, K) as (T, K)."""
    return tensor.view(-1, tensor.shape[-1])


def _select(given: Arguments, cut: Layout, x_dbl: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """delta (B, L, 2D) before bias and softplus, B and C (B, L, 2, N), from x_dbl (T, 2K)."""
    batch, length, _ = given.xz.shape
    delta = (x_dbl @ weights.dt_proj.t()).view(batch, length, -1)
    if given.lengths is not None:
        # The gradient needs no mask: softplus is flat there, exactly.
        delta.masked_fill_(padding(delta, given.lengths), NO_STEP)
    _, B, C = x_dbl.view(batch, length, 2, -1).split_with_sizes((cut.dt_rows, cut.d_state, cut.d_state), dim=3)
    return delta, B, C
