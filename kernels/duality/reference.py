"""Mamba-2's recurrence by its definition: a short loop over time that the faster implementations are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """The steps (..., H) in ``dtype``: dt + dt_bias, through softplus where asked for, clamped to ``dt_limit``."""
    steps = dt.to(dtype)
    if dt_bias is not None:
        steps = steps + dt_bias.to(dtype)
    if dt_softplus:
        steps = F.softplus(steps)
    return steps if dt_limit == (0.0, float("inf")) and dt_softplus else steps.clamp(*dt_limit)


def ssd_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the recurrence: float32, or float64 where an argument is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def ssd_reference(
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, P) and final state (B, H, P, N) of ``weighted_ssd``, whose docstring says what each argument is.

    Ordinary differentiable PyTorch: autograd gives the gradients, of any order. For tests and for reading: time and
    memory grow with L steps of several small operations each.
    """
    batch, length, heads, channels = x.shape
    dtype = ssd_dtype(x, weights, log_decays, B, C)
    wide_x, weights, decays = x.to(dtype), weights.to(dtype), log_decays.to(dtype).exp()
    # Group g of B and C serves H / G heads in a row.
    B, C = (b.to(dtype).repeat_interleave(heads // b.shape[2], dim=2).unsqueeze(3) for b in (B, C))
    if initial_state is None:
        state = torch.zeros(batch, heads, channels, B.shape[-1], dtype=dtype, device=x.device)
    else:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same_sequence = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(same_sequence[:, None, None, None], state, 0)
        inputs = (weights[:, t].unsqueeze(-1) * wide_x[:, t]).unsqueeze(-1)
        state = decays[:, t, :, None, None] * state + inputs * B[:, t]
        outputs.append((state * C[:, t]).sum(-1))
    out = torch.stack(outputs, dim=1)
    if D is not None:
        out = out + D.to(dtype).view(heads, -1) * wide_x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype), state
