"""One layer of a fused decoding step, for each mixer that has kernels for it.

A layer reads the parameters where they lie, matrices in the computing dtype; moves its state on in place; and has two
forms. ``few_rows`` adds to the residual stream in place, in three or four launches. ``many_rows`` takes and gives the
pair (last output, stream before it), as :class:`mambakit.backbone.Layer` does, with cuBLAS for the matrices.

Letters: B batch, D inner channels, H heads, P channels a head, N state size, W convolution width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.backbone import RMSNorm
from mambakit.kernels import causal_conv1d_update, gated_rms_norm, rms_norm
from mambakit.kernels.decode import MAX_COLUMNS
from mambakit.mixers import Mamba1, Mamba2


class Workshop(Protocol):
    """What a layer asks of the step it belongs to."""

    def matrix(self, weight: Tensor) -> Tensor:
        """``weight`` in the computing dtype, a copy where it has another."""

    def buffer(self, use: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """(B, width) to write to, of the computing dtype if None; layers share it for one use and width."""


class Normed:
    """The norm before a mixer, and the mixer's projections in and out."""

    def __init__(self, norm: RMSNorm, mixer: Any, shop: Workshop) -> None:
        self.norm, self.eps = norm.weight, norm.eps
        self.in_proj, self.out_proj = shop.matrix(mixer.in_proj.weight), shop.matrix(mixer.out_proj.weight)
        self.in_bias = None if mixer.in_proj.bias is None else shop.matrix(mixer.in_proj.bias)
        self.out_bias = None if mixer.out_proj.bias is None else shop.matrix(mixer.out_proj.bias)
        self.conv, self.conv_bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        self.projected = shop.buffer("projected", len(self.in_proj))

    def enter(self, residual: Tensor, state: Any, conv_first: int) -> None:
        """``projected`` = in_proj(norm(residual)), of which the outputs from ``conv_first`` on are convolved."""
        from mambakit.kernels.decode.triton_launch import linear_step

        linear_step(
            residual,
            self.in_proj,
            self.in_bias,
            self.projected,
            norm_weight=self.norm,
            eps=self.eps,
            conv=(state.conv, self.conv, self.conv_bias),
            conv_first=conv_first,
        )

    def project(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(in_proj(norm(hidden + residual)), hidden + residual)."""
        hidden, residual = rms_norm(
            hidden, self.norm, residual=residual, eps=self.eps, prenorm=True, residual_in_fp32=True
        )
        return F.linear(hidden.to(self.in_proj.dtype), self.in_proj, self.in_bias), residual


class Mamba1Layer(Normed):
    """Norm, in_proj and convolution; x_proj; dt_proj and the state's step; out_proj."""

    def __init__(self, norm: RMSNorm, mixer: Mamba1, shop: Workshop) -> None:
        super().__init__(norm, mixer, shop)
        self.x_proj, self.dt_proj = shop.matrix(mixer.x_proj.weight), shop.matrix(mixer.dt_proj.weight)
        self.memory = (self.dt_proj, mixer.dt_proj.bias, mixer.A_log, mixer.D)
        self.selected, self.gated = shop.buffer("selected", len(self.x_proj)), shop.buffer("gated", mixer.d_inner)
        self.matrices = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)

    @staticmethod
    def obstacle(mixer: Mamba1) -> str | None:
        """Why these kernels cannot serve ``mixer``, or None when they can."""
        if mixer.has_norms:
            return "Mamba1 norms B, C and dt"
        return _obstacle(mixer, mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)

    def few_rows(self, residual: Tensor, state: Any) -> None:
        from mambakit.kernels.decode.triton_launch import linear_step, state_step

        self.enter(residual, state, 0)
        x, z = self.projected.chunk(2, dim=-1)
        linear_step(x, self.x_proj, None, self.selected)
        state_step(state.ssm, x, z, self.selected, *self.memory, self.gated)
        linear_step(self.gated, self.out_proj, self.out_bias, residual, add=True)

    def many_rows(self, hidden: Tensor, residual: Tensor | None, state: Any) -> tuple[Tensor, Tensor]:
        from mambakit.kernels.decode.triton_launch import state_step

        projected, residual = self.project(hidden, residual)
        x, z = projected.chunk(2, dim=-1)
        x = causal_conv1d_update(x, state.conv, self.conv, self.conv_bias, "silu")
        state_step(state.ssm, x, z, F.linear(x, self.x_proj), *self.memory, self.gated)
        return F.linear(self.gated, self.out_proj, self.out_bias), residual


class Mamba2Layer(Normed):
    """Norm, in_proj and convolution; the state's step and the gate; gated norm and out_proj."""

    def __init__(self, norm: RMSNorm, mixer: Mamba2, shop: Workshop) -> None:
        super().__init__(norm, mixer, shop)
        self.sizes = [mixer.d_ssm, mixer.conv_dim, mixer.nheads]
        self.memory = (mixer.dt_bias, mixer.A_log, mixer.D)
        self.options: dict[str, Any] = {"groups": mixer.ngroups, "dt_limit": mixer.dt_limit}
        self.gain = None if mixer.norm is None else mixer.norm.weight
        self.gain_eps = 0.0 if mixer.norm is None else mixer.norm.eps
        # A gate that a norm follows is not rounded between the two.
        self.gated = shop.buffer("gated", mixer.d_ssm, None if mixer.norm is None else torch.float32)
        self.y = shop.buffer("y", mixer.d_ssm)
        self.matrices = (self.in_proj, self.out_proj)

    @staticmethod
    def obstacle(mixer: Mamba2) -> str | None:
        """Why these kernels cannot serve ``mixer``, or None when they can."""
        if mixer.d_mlp:
            return "Mamba2 has a gated MLP beside its state space model"
        if mixer.norm is not None and (mixer.norm.norm_before_gate or mixer.ngroups > 1):
            return "Mamba2 norms before its gate, or in groups"
        return _obstacle(mixer, mixer.in_proj, mixer.out_proj)

    def few_rows(self, residual: Tensor, state: Any) -> None:
        from mambakit.kernels.decode.triton_launch import head_step, linear_step

        self.enter(residual, state, self.sizes[0])
        z, xBC, dt = self.projected.split(self.sizes, dim=1)
        head_step(state.ssm, xBC, z, dt, *self.memory, self.gated, gate=True, **self.options)
        gain, eps = self.gain, self.gain_eps
        linear_step(self.gated, self.out_proj, self.out_bias, residual, norm_weight=gain, eps=eps, add=True)

    def many_rows(self, hidden: Tensor, residual: Tensor | None, state: Any) -> tuple[Tensor, Tensor]:
        from mambakit.kernels.decode.triton_launch import head_step

        projected, residual = self.project(hidden, residual)
        z, xBC, dt = projected.split(self.sizes, dim=1)
        xBC = causal_conv1d_update(xBC, state.conv, self.conv, self.conv_bias, "silu")
        head_step(state.ssm, xBC, z, dt, *self.memory, self.y, gate=self.gain is None, **self.options)
        y = self.y if self.gain is None else gated_rms_norm(self.y, z, self.gain, eps=self.gain_eps)
        return F.linear(y, self.out_proj, self.out_bias), residual


def _obstacle(mixer: Any, *projections: nn.Module) -> str | None:
    if any(type(linear) is not nn.Linear for linear in projections):
        return "a projection is not a plain nn.Linear"
    if max(mixer.d_model, mixer.d_inner) > MAX_COLUMNS:
        return f"{type(mixer).__name__} is wider than {MAX_COLUMNS}"
    return None


LAYERS: dict[type[nn.Module], Any] = {Mamba1: Mamba1Layer, Mamba2: Mamba2Layer}
