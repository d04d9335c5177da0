"""Mamba-3: Lahoti et al., "Mamba-3: Improved Sequence Modeling using State Space Principles", arXiv 2603.15569."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.kernels import TrapezoidalState, rms_norm, trapezoidal_ssd
from mambakit.mixers.base import SequenceMixer, State
from mambakit.mixers.mamba2 import GatedRMSNorm

EPS = 1e-5


@dataclass
class Mamba3State(State):
    """``angle`` (B, H, S), ``ssm`` (B, H, P, N), and the last ``k`` (B, H, N), or (B, R, H, N), and ``v`` (B, H, P)."""

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., channels) to y of the same shape."""
        return rms_norm(x, self.weight, eps=EPS)


class Mamba3(SequenceMixer):
    """A recurrence by the trapezoidal rule whose state rotates; no convolution.

    With z, x, B, C, dt, A, lambda, theta = in_proj(input), x of D = expand * d_model channels in H = D / P heads, and
    dt <- softplus(dt + dt_bias), A <- -max(a(A), A_floor), lambda <- sigmoid(lambda), B <- norm(B) + B_bias,
    C <- norm(C) + C_bias, both turned by the angle phi_t = phi_{t-1} + pi tanh(theta_t) dt_t, for each head:

        h_t = exp(dt_t A_t) (h_{t-1} + (1 - lambda_t) dt_t x_{t-1} B_{t-1}ᵀ) + lambda_t dt_t x_t B_tᵀ
        y_t = h_t C_t + D x_t,    output = out_proj(y * SiLU(z)), or out_proj(norm(y) * SiLU(z))

    and a(s) = 1 + s for s >= 0, 1 / (1 - s) below ("heavy_tail"), or log(1 + exp(s)) ("softplus").

    With ``is_mimo`` a step has R inputs x * mimo_x_r, each with a B of its own, and R outputs, each with a C of its own
    and a gate SiLU(z * mimo_z_r); their sum, weighed by mimo_o_r, goes to out_proj.

    Parameters carry the names and layouts of mamba_ssm's ``Mamba3``, so its checkpoints load as they are. Its option
    fuse_pregate_headwise_norm chooses a kernel and not a function, and has no counterpart.

    Args:
        d_model: width of input and output.
        d_state: N, states a channel; even.
        expand: D / d_model.
        headdim: P, channels a head; it divides D.
        ngroups: G, groups of heads with a B and C of their own; it divides the number of heads.
        rope_fraction: the share of the N states that rotates, 0.5 or 1.
        dt_min: smallest step at initialisation (drawn log-uniformly up to ``dt_max``).
        dt_max: largest step at initialisation.
        dt_init_floor: lower bound of the initial step.
        A_floor: A is at most minus this.
        is_outproj_norm: norm before the gate, over each head.
        is_mimo: several inputs and outputs a step.
        mimo_rank: R, how many with ``is_mimo``.
        chunk_size: the most steps computed at once; no effect on the result.
        a_activation: a. mamba_ssm had "softplus" until June 2026 and has "heavy_tail" since; flash-linear-attention has
            "softplus". Keys and shapes are the same: a checkpoint does not tell which it was trained with.

    Raises:
        ValueError: heads or groups that do not come out even, a state size or fraction that leaves no angle, or an
            unknown ``a_activation``, named.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        a_activation: Literal["heavy_tail", "softplus"] = "heavy_tail",
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = expand * d_model
        self.headdim = headdim
        self.ngroups = ngroups
        self.A_floor = A_floor
        self.is_mimo = is_mimo
        self.mimo_rank = mimo_rank if is_mimo else 1
        self.chunk_size = chunk_size
        self.a_activation = a_activation
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        if headdim < 1 or self.d_inner % headdim:
            raise ValueError(
                f"Mamba3: headdim={headdim} does not divide the {self.d_inner} channels (expand * d_model); "
                "choose a divisor of them"
            )
        self.nheads = self.d_inner // headdim
        if ngroups < 1 or self.nheads % ngroups:
            raise ValueError(
                f"Mamba3: ngroups={ngroups} does not divide the {self.nheads} heads; choose a divisor of them"
            )
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"Mamba3: rope_fraction={rope_fraction}, expected 0.5 or 1")
        self.num_rope_angles = int(d_state * rope_fraction) // 2
        if d_state % 2 or self.num_rope_angles < 1:
            raise ValueError(
                f"Mamba3: d_state={d_state} gives {self.num_rope_angles} angles with rope_fraction={rope_fraction}; "
                "expected an even number, 4 or more for a fraction of 0.5"
            )
        if self.mimo_rank < 1:
            raise ValueError(f"Mamba3: mimo_rank={mimo_rank}, expected at least 1")
        if a_activation not in ("heavy_tail", "softplus"):
            raise ValueError(f"Mamba3: a_activation={a_activation!r} is unknown; expected 'heavy_tail' or 'softplus'")

        H, R, N, P = self.nheads, self.mimo_rank, d_state, headdim
        self.sizes = [self.d_inner, self.d_inner, R * ngroups * N, R * ngroups * N, H, H, H, self.num_rope_angles]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.B_bias = nn.Parameter(torch.empty(H, R, N))
        self.C_bias = nn.Parameter(torch.empty(H, R, N))
        self.B_norm = RMSNorm(N)
        self.C_norm = RMSNorm(N)
        if is_mimo:
            self.mimo_x = nn.Parameter(torch.empty(H, R, P))
            self.mimo_z = nn.Parameter(torch.empty(H, R, P))
            self.mimo_o = nn.Parameter(torch.empty(H, R, P))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = GatedRMSNorm(self.d_inner, headdim, norm_before_gate=True, eps=EPS) if is_outproj_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.D, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Steps between dt_min and dt_max; biases, D and the sums over ranks begin as 1."""
        dt_min, dt_max, floor = self.dt_range
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
        dt = dt.exp().clamp(min=floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        for parameter in (self.B_bias, self.C_bias, self.D):
            parameter.fill_(1.0)
        if self.is_mimo:
            self.mimo_z.fill_(1.0)
            for parameter in (self.mimo_x, self.mimo_o):
                parameter.fill_(1.0 / self.mimo_rank)

    def mix(
        self,
        x: Tensor,
        *,
        state: Mamba3State | None = None,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Mamba3State | None]:
        z, u, B, C, dt, A, trap, angles = self.in_proj(x).split(self.sizes, dim=-1)
        u, z = (tensor.unflatten(-1, (self.nheads, self.headdim)) for tensor in (u, z))
        groups = (self.mimo_rank, self.ngroups, self.d_state) if self.is_mimo else (self.ngroups, self.d_state)
        B, C = self.B_norm(B.unflatten(-1, groups)), self.C_norm(C.unflatten(-1, groups))
        wide = torch.float64 if self.dt_bias.dtype == torch.float64 else torch.float32
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if self.is_mimo:
            z = z.unsqueeze(-3) * self.mimo_z.transpose(0, 1)
        y = trapezoidal_ssd(
            u,
            dt,
            dt * self._A(A.to(wide)),
            trap,
            B,
            C,
            angles,
            self.B_bias if self.is_mimo else self.B_bias.squeeze(1),
            self.C_bias if self.is_mimo else self.C_bias.squeeze(1),
            self.mimo_x if self.is_mimo else None,
            self.D,
            z if self.norm is None else None,
            chunk_size=self.chunk_size,
            initial_state=None if state is None else TrapezoidalState(state.angle, state.ssm, state.k, state.v),
            seq_idx=seq_idx,
            lengths=lengths,
            return_final_state=return_state,
        )
        y, carried = y if return_state else (y, ())
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z.flatten(-2))
        if self.is_mimo:
            y = (y * self.mimo_o.transpose(0, 1).flatten(-2)).sum(-2).to(u.dtype)
        return self.out_proj(y), Mamba3State(*carried) if return_state else None

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Mamba3State:
        device = self.dt_bias.device if device is None else device
        wide = torch.float64 if self.dt_bias.dtype == torch.float64 else torch.float32
        heads, ranks = (self.nheads,), (self.mimo_rank,) if self.is_mimo else ()
        shapes = (
            (*heads, self.num_rope_angles),
            (*heads, self.headdim, self.d_state),
            (*ranks, *heads, self.d_state),
            (*heads, self.headdim),
        )
        return Mamba3State(*(torch.zeros(batch_size, *shape, device=device, dtype=wide) for shape in shapes))

    def _A(self, projected: Tensor) -> Tensor:
        """A (..., H), at most -A_floor, from its projection."""
        if self.a_activation == "softplus":
            positive = F.softplus(projected)
        else:
            positive = torch.where(projected < 0, 1 / (1 - projected.clamp(max=0)), 1 + projected)
        return -positive.clamp(min=self.A_floor)
