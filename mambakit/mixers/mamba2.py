"""Mamba-2: Dao and Gu, "Transformers are SSMs" (2024), arXiv 2405.21060."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.kernels import causal_conv1d_update, gated_rms_norm, mamba2_inner, selective_state_update
from mambakit.kernels.duality import step_sizes
from mambakit.mixers.base import SequenceMixer, State, last_inputs


@dataclass
class Mamba2State(State):
    """``conv`` (B, D + 2 G N, W-1): the last inputs of the convolution, oldest first; ``ssm`` (B, H, P, N)."""

    conv: Tensor
    ssm: Tensor


class GatedRMSNorm(nn.Module):
    """norm(x SiLU(z)) * weight, or norm(x) * weight * SiLU(z), over groups of ``group_size`` channels."""

    def __init__(self, channels: int, group_size: int, norm_before_gate: bool, eps: float) -> None:
        super().__init__()
        self.group_size, self.norm_before_gate, self.eps = group_size, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z (..., channels) to y of the same shape."""
        return gated_rms_norm(
            x, z, self.weight, eps=self.eps, norm_before_gate=self.norm_before_gate, group_size=self.group_size
        )


class Mamba2(SequenceMixer):
    """Convolution, structured state space duality and a gated norm.

    With z, x, B, C, dt = in_proj(input), x of D = expand * d_model channels in H = D / P heads, and
    (x, B, C) <- SiLU(conv(x, B, C)), dt <- clamp(softplus(dt + dt_bias), *dt_limit), for each head:

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ,    y_t = h_t C_t + D x_t,    output = out_proj(norm(y * SiLU(z)))

    Parameters carry the names and layouts of mamba_ssm's ``Mamba2``, so its checkpoints load as they are.

    Args:
        d_model: width of input and output.
        d_state: N, states a channel.
        d_conv: W, width of the causal convolution, 2 to 4.
        conv_init: bound of the convolution's uniform initial weights; None is PyTorch's own.
        expand: D / d_model.
        headdim: P, channels a head; it divides ``d_ssm``.
        d_ssm: channels that pass through the state space model; the others, D - d_ssm, are a gated MLP beside it.
            None is all.
        ngroups: G, groups of heads with a B and C of their own; it divides the number of heads.
        A_init_range: A is initialised to minus a uniform number of this range.
        D_has_hdim: D has an entry a channel, not one a head.
        rmsnorm: norm before out_proj; without it y * SiLU(z) goes there directly.
        norm_before_gate: norm(y) * SiLU(z) instead of norm(y * SiLU(z)).
        dt_min: smallest step at initialisation (drawn log-uniformly up to ``dt_max``).
        dt_max: largest step at initialisation.
        dt_init_floor: lower bound of the initial step.
        dt_limit: the smallest and largest step there can be.
        bias: in_proj and out_proj have biases.
        conv_bias: the convolution has a bias.
        chunk_size: the most steps that ``ssd`` computes at once; no effect on the result.

    Raises:
        ValueError: heads or groups that do not come out even, named.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.d_mlp = self.d_inner - self.d_ssm
        self.headdim = headdim
        self.ngroups = ngroups
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.chunk_size = chunk_size
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"Mamba2: d_ssm={d_ssm}, expected 1 to expand * d_model = {self.d_inner}")
        if headdim < 1 or self.d_ssm % headdim:
            raise ValueError(
                f"Mamba2: headdim={headdim} does not divide the {self.d_ssm} channels (expand * d_model, or d_ssm); "
                "choose a divisor of them"
            )
        self.nheads = self.d_ssm // headdim
        if ngroups < 1 or self.nheads % ngroups:
            raise ValueError(
                f"Mamba2: ngroups={ngroups} does not divide the {self.nheads} heads; choose a divisor of them"
            )
        self.conv_init, self.A_init_range, self.dt_range = conv_init, A_init_range, (dt_min, dt_max, dt_init_floor)

        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_mlp + self.d_ssm + self.conv_dim + self.nheads, bias=bias)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads))
        self.norm = GatedRMSNorm(self.d_ssm, self.d_ssm // ngroups, norm_before_gate, eps=1e-5) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters that decide the memory: steps between dt_min and dt_max, A in its range, D = 1."""
        dt_min, dt_max, floor = self.dt_range
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
        dt = dt.exp().clamp(min=floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*self.A_init_range).log())
        self.D.fill_(1.0)
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)

    def mix(
        self,
        x: Tensor,
        *,
        state: Mamba2State | None = None,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Mamba2State | None]:
        projected = self.in_proj(x)
        before = None if state is None else state.conv
        y, ssm_state = mamba2_inner(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self._A(),
            self.D,
            None if self.norm is None else self.norm.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            ngroups=self.ngroups,
            dt_limit=self.dt_limit,
            eps=0.0 if self.norm is None else self.norm.eps,
            norm_before_gate=self.norm is not None and self.norm.norm_before_gate,
            chunk_size=self.chunk_size,
            conv_state=before,
            ssm_state=None if state is None else state.ssm,
            seq_idx=seq_idx,
            lengths=lengths,
        )
        if not return_state:
            return y, None
        xBC = self._split(projected)[2]
        return y, Mamba2State(last_inputs(xBC, lengths, self.d_conv - 1, before, seq_idx), ssm_state)

    def step(self, x_t: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One element in constant time. Without gradients ``state`` is updated in place and returned."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x_t, state.ssm, state.conv, self.A_log)):
            return super().step(x_t, state)
        mlp, z, xBC, dt = self._split(self.in_proj(x_t))
        xBC = causal_conv1d_update(xBC, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        u, B, C = self._heads(xBC)
        # One step, A and D serve a whole head: axes of stride 0, which the kernel reads as they are.
        dt = self._steps(dt).unsqueeze(-1).expand(u.shape)
        A = self._A()[:, None, None].expand(-1, self.headdim, self.d_state)
        D = self._D()
        D = D if D.dim() == 2 else D.unsqueeze(-1).expand(-1, self.headdim)
        y = selective_state_update(state.ssm, u, dt, A, B, C, D, z if self.norm is None else None)
        return self._project(y, z, mlp), state

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Mamba2State:
        device = self.A_log.device if device is None else device
        wide = torch.float64 if self.A_log.dtype == torch.float64 else torch.float32
        conv = torch.zeros(batch_size, self.conv_dim, self.d_conv - 1, device=device, dtype=dtype or wide)
        ssm = torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, device=device, dtype=wide)
        return Mamba2State(conv, ssm)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """in_proj's output as the MLP's gate and input side by side, z (..., H, P), (x, B, C), and dt (..., H)."""
        sizes = [2 * self.d_mlp, self.d_ssm, self.conv_dim, self.nheads]
        mlp, z, xBC, dt = projected.split(sizes, dim=-1)
        return mlp, z.unflatten(-1, (self.nheads, self.headdim)), xBC, dt

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, P), B and C (..., G, N) from the convolution's output."""
        sizes = [self.d_ssm, self.ngroups * self.d_state, self.ngroups * self.d_state]
        x, B, C = xBC.split(sizes, dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _project(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        """y, z (..., H, P), and the MLP's part, to the output (..., d_model)."""
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z.flatten(-2))
        if self.d_mlp:
            gate, value = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        return self.out_proj(y)

    def _steps(self, dt: Tensor) -> Tensor:
        """The step sizes (..., H), of A's dtype."""
        return step_sizes(dt, self.dt_bias, True, self.dt_limit, self._A().dtype)

    def _A(self) -> Tensor:
        """A (H,), negative; float32 at least, since exp(dt A) magnifies rounding."""
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())

    def _D(self) -> Tensor:
        """D (H,), or (H, P) where it has an entry a channel."""
        return self.D if self.D.numel() == self.nheads else self.D.view(self.nheads, self.headdim)
