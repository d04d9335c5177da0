"""Mamba-1: the selective state space mixer of Gu and Dao, "Mamba" (2023), arXiv 2312.00752."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.kernels import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from mambakit.kernels.inner import mamba_inner
from mambakit.kernels.inner.reference import NO_STEP, padding
from mambakit.mixers.base import SequenceMixer, State, last_inputs


@dataclass
class Mamba1State(State):
    """``conv`` (B, D, W-1): the last inputs of the convolution, oldest first; ``ssm`` (B, D, N): the scan's state."""

    conv: Tensor
    ssm: Tensor


class InnerRMSNorm(nn.Module):
    """v / sqrt(mean(v²) + eps) over the last axis, times ``weight`` where it has one; in v's dtype."""

    def __init__(self, width: int, weighted: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None

    def forward(self, v: Tensor) -> Tensor:
        # The weight comes after: torch has no fused norm where input and weight differ in dtype, as under autocast.
        normed = F.rms_norm(v, v.shape[-1:], None, self.eps)
        return normed if self.weight is None else normed * self.weight.to(v.dtype)


class Mamba1(SequenceMixer):
    """Gated convolution and selective scan.

    With x, z = in_proj(input) of width D = expand * d_model, x <- SiLU(conv(x)) and delta, B, C projected from x:

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,    y_t = C_t h_t + D x_t,    output = out_proj(y * SiLU(z))

    Parameters carry the names and layouts of mamba_ssm's ``Mamba``, so its checkpoints load as they are.

    ``b_c_dt_rms`` divides B, C and dt (before dt_proj), each by its root mean square, as v / sqrt(mean(v²) + eps):
    "weighted" then multiplies by ``b_layernorm.weight``, ``c_layernorm.weight`` and ``dt_layernorm.weight`` (Jamba,
    Lieber et al. 2024, arXiv 2403.19887), "unweighted" by nothing (Falcon-Mamba, Zuo et al. 2024, arXiv 2410.05355).
    The block then runs operator by operator, which keeps more for its backward than the one operator without norms.

    Args:
        d_model: width of input and output.
        d_state: N, states a channel.
        d_conv: W, width of the causal convolution, 2 to 4.
        expand: D / d_model.
        dt_rank: rank of the projection to delta; "auto" is ceil(d_model / 16).
        dt_min: smallest step delta at initialisation (drawn log-uniformly up to ``dt_max``).
        dt_max: largest step delta at initialisation.
        dt_init: "random" (uniform) or "constant" weights of dt_proj.
        dt_scale: scale of dt_proj's weights, in units of dt_rank ** -0.5.
        dt_init_floor: lower bound of the initial step.
        conv_bias: the convolution has a bias.
        bias: in_proj and out_proj have biases.
        b_c_dt_rms: "weighted" or "unweighted" norms of B, C and dt; None for none.
        b_c_dt_rms_eps: epsilon of those norms.
    """

    reverses = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        b_c_dt_rms: Literal["weighted", "unweighted"] | None = None,
        b_c_dt_rms_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if b_c_dt_rms not in (None, "weighted", "unweighted"):
            raise ValueError(f"Mamba1: b_c_dt_rms={b_c_dt_rms!r}, expected 'weighted', 'unweighted' or None")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.dt_init, self.dt_scale = dt_init, dt_scale

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.has_norms = b_c_dt_rms is not None
        if self.has_norms:
            weighted = b_c_dt_rms == "weighted"
            self.dt_layernorm = InnerRMSNorm(self.dt_rank, weighted, b_c_dt_rms_eps)
            self.b_layernorm = InnerRMSNorm(d_state, weighted, b_c_dt_rms_eps)
            self.c_layernorm = InnerRMSNorm(d_state, weighted, b_c_dt_rms_eps)
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters that decide the memory: steps between dt_min and dt_max, A = -(1..N), D = 1."""
        dt_min, dt_max, floor = self.dt_range
        spread = self.dt_rank**-0.5 * self.dt_scale
        if self.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        else:
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        dt = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
        dt = dt.exp().clamp(min=floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def mix(
        self,
        x: Tensor,
        *,
        state: Mamba1State | None = None,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
        return_state: bool = False,
        reverse: bool = False,
    ) -> tuple[Tensor, Mamba1State | None]:
        """As of every mixer. ``reverse``: from each row's last element to its first, and then without a state."""
        if reverse and (state is not None or return_state):
            raise ValueError("Mamba1: a state is asked for with reverse=True, expected neither state nor return_state")
        xz = self.in_proj(x)
        before = None if state is None else state.conv
        if self.has_norms:
            y, ssm_state = self._inner(xz, state, seq_idx, lengths, reverse)
        else:
            y, ssm_state = mamba_inner(
                xz,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self._A(),
                self.D,
                self.dt_proj.bias,
                self.out_proj.weight,
                self.out_proj.bias,
                conv_state=before,
                ssm_state=None if state is None else state.ssm,
                seq_idx=seq_idx,
                lengths=lengths,
                reverse=reverse,
            )
        if not return_state:
            return y, None
        return y, Mamba1State(
            last_inputs(xz[..., : self.d_inner], lengths, self.d_conv - 1, before, seq_idx), ssm_state
        )

    def step(self, x_t: Tensor, state: Mamba1State) -> tuple[Tensor, Mamba1State]:
        """One element in constant time. Without gradients ``state`` is updated in place and returned."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x_t, state.ssm, state.conv, self.A_log)):
            return super().step(x_t, state)
        x, z = self.in_proj(x_t).chunk(2, dim=-1)
        x = causal_conv1d_update(x, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        delta, B, C = self._select(x)
        y = selective_state_update(state.ssm, x, delta, self._A(), B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y), state

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Mamba1State:
        device = self.A_log.device if device is None else device
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        conv = torch.zeros(batch_size, self.d_inner, self.d_conv - 1, device=device, dtype=dtype or wide)
        return Mamba1State(conv, torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=wide))

    def _inner(
        self,
        xz: Tensor,
        state: Mamba1State | None,
        seq_idx: Tensor | None,
        lengths: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """What ``mamba_inner`` does, operator by operator, with the norms: the output and the scan's final state."""
        if reverse and lengths is not None:
            xz = xz.masked_fill(padding(xz, lengths), 0)  # what the convolution finds beyond a row's end
        x, z = xz.chunk(2, dim=-1)
        before, ssm_state = (None, None) if state is None else (state.conv, state.ssm)
        weight = self.conv1d.weight.squeeze(1)
        options: dict[str, Any] = {"seq_idx": seq_idx, "reverse": reverse}
        x = causal_conv1d(x, weight, self.conv1d.bias, "silu", initial_state=before, **options)
        delta, B, C = self._select(x)
        if lengths is not None:
            delta = delta.masked_fill(padding(delta, lengths), NO_STEP)
        y, ssm_state = selective_scan(
            x,
            delta,
            self._A(),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            True,
            initial_state=ssm_state,
            return_final_state=True,
            **options,
        )
        return self.out_proj(y), ssm_state

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta before bias and softplus (..., D), B and C (..., N), each read off x (..., D)."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.has_norms:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return F.linear(dt, self.dt_proj.weight), B, C

    def _A(self) -> Tensor:
        """A (D, N), negative; float32 at least, since exp(delta A) magnifies rounding."""
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())
