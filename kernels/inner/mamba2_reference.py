"""The definition of ``mamba2_inner``: the block's operators one after another, each by its own definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.conv import causal_conv1d
from mambakit.kernels.duality.reference import ssd_reference
from mambakit.kernels.inner import mamba2_steps
from mambakit.kernels.norm import gated_rms_norm


class Arguments(NamedTuple):
    """The tensors of one call, as :func:`mambakit.kernels.inner.mamba2_op.mamba2_inner` describes them."""

    projected: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    conv_state: Tensor | None
    ssm_state: Tensor | None
    seq_idx: Tensor | None
    lengths: Tensor | None


class Options(NamedTuple):
    """The numbers of one call, likewise."""

    ngroups: int
    least_step: float
    most_step: float
    eps: float
    norm_before_gate: bool
    chunk_size: int


class Sizes(NamedTuple):
    """E channels of the MLP, D of the recurrence, K of the convolution; H heads of P channels, G groups, N states."""

    mlp: int
    inner: int
    conv: int
    heads: int
    channels: int
    groups: int
    states: int


def sizes(given: Arguments, ngroups: int) -> Sizes:
    """Read off the shapes: ``projected`` is 2E + D + K + H wide and out_proj_weight E + D, where K = D + 2 G N."""
    conv, heads = given.conv_weight.shape[0], given.A.shape[0]
    mlp = given.projected.shape[-1] - conv - heads - given.out_proj_weight.shape[1]
    inner = given.out_proj_weight.shape[1] - mlp
    return Sizes(mlp, inner, conv, heads, inner // heads, ngroups, (conv - inner) // (2 * ngroups))


def split(projected: Tensor, size: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(..., 2E + D + K + H) as the MLP's gate and value, z, the convolution's input, and dt."""
    widths = [size.mlp, size.mlp, size.inner, size.conv, size.heads]
    gate, value, z, xBC, dt = projected.split_with_sizes(widths, -1)
    return gate, value, z, xBC, dt


def heads(xBC: Tensor, size: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., H, P), B and C (..., G, N) from the convolution's output."""
    states = size.groups * size.states
    x, B, C = xBC.split_with_sizes([size.inner, states, states], -1)
    shape = (*xBC.shape[:-1], size.groups, size.states)
    return by_head(x, size), B.view(shape), C.view(shape)


def by_head(channels: Tensor, size: Sizes) -> Tensor:
    """(..., D), of adjacent numbers, as (..., H, P)."""
    return channels.view(*channels.shape[:-1], size.heads, size.channels)


def mamba2_inner(given: Arguments, options: Options) -> tuple[Tensor, Tensor]:
    """out (B, L, d_model) and the final state (B, H, P, N)."""
    size = sizes(given, options.ngroups)
    gate, value, z, xBC, dt = split(given.projected, size)
    xBC = causal_conv1d(
        xBC,
        given.conv_weight,
        given.conv_bias,
        "silu",
        initial_state=given.conv_state,
        seq_idx=given.seq_idx,
        backend="reference",
    )
    x, B, C = heads(xBC, size)
    limit = (options.least_step, options.most_step)
    steps, decays = mamba2_steps.forward(dt, given.dt_bias, given.A, given.lengths, *limit, "reference")
    inner_gate = by_head(z, size) if given.norm_weight is None else None
    y, final_state = ssd_reference(
        x, steps, decays, B, C, per_head(given.D, size), inner_gate, given.ssm_state, given.seq_idx
    )
    y = y.flatten(-2)
    if given.norm_weight is not None:
        y = gated_rms_norm(
            y,
            z,
            given.norm_weight,
            eps=options.eps,
            norm_before_gate=options.norm_before_gate,
            group_size=size.inner // size.groups,
            backend="reference",
        )
    if size.mlp:
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    bias = None if given.out_proj_bias is None else given.out_proj_bias.to(y.dtype)
    return F.linear(y, given.out_proj_weight.to(y.dtype), bias), final_state


def per_head(D: Tensor, size: Sizes) -> Tensor:
    return D if len(D) == size.heads else D.view(size.heads, size.channels)
