"""The selective scan by its definition: a short loop over time that the faster implementations are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the recurrence: float32, widened to float64 or to complex where an argument is."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def at_time(coefficients: Tensor, t: int, channels: int) -> Tensor:
    """B or C at time t for every channel, (B or 1, D, N), from any of its three forms."""
    if coefficients.dim() == 2:
        return coefficients.unsqueeze(0)
    if coefficients.dim() == 3:
        return coefficients[:, t].unsqueeze(1)
    return coefficients[:, t].repeat_interleave(channels // coefficients.shape[2], dim=1)


def scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and final state of ``selective_scan``, whose docstring says what each argument is.

    Everything is ordinary differentiable PyTorch: autograd gives the gradients, of any order. float64 stays float64,
    other inputs are computed in float32. Time and memory grow with L steps of several small operations each: this is
    for tests and for reading.
    """
    batch, length, channels = u.shape
    dtype = state_dtype(u, delta, A, B, C)
    real = torch.empty((), dtype=dtype).real.dtype
    wide_u, wide_delta = u.to(real), delta.to(real)
    A, B, C = A.to(dtype), B.to(dtype), C.to(dtype)
    if delta_bias is not None:
        wide_delta = wide_delta + delta_bias.to(real)
    if delta_softplus:
        wide_delta = F.softplus(wide_delta)

    if initial_state is None:
        state = torch.zeros(batch, channels, A.shape[1], dtype=dtype, device=u.device)
    else:
        state = initial_state.to(dtype)
    outputs: list[Tensor] = []
    times = range(length - 1, -1, -1) if reverse else range(length)
    for t in times:
        if seq_idx is not None and outputs:
            same_sequence = seq_idx[:, t] == seq_idx[:, t + 1 if reverse else t - 1]
            state = torch.where(same_sequence[:, None, None], state, 0)
        step = wide_delta[:, t, :, None]
        state = torch.exp(step * A) * state + step * wide_u[:, t, :, None] * at_time(B, t, channels)
        y = (state * at_time(C, t, channels)).sum(-1)
        outputs.append(2 * y.real if dtype.is_complex else y)
    out = torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    if D is not None:
        out = out + D.to(real) * wide_u
    if z is not None:
        out = out * F.silu(z.to(real))
    return out.to(u.dtype), state
