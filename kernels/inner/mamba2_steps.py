"""Step sizes and decays of the Mamba-2 block in PyTorch, and their gradients.

With r = dt + dt_bias: steps = clamp(softplus(r), *dt_limit), 0 at padding whatever the limits; decays = steps A.

Letters: B batch, L length, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.duality.reference import step_sizes


def forward(
    dt: Tensor, dt_bias: Tensor, A: Tensor, lengths: Tensor | None, least: float, most: float
) -> tuple[Tensor, Tensor]:
    """Steps and decays (B, L, H), float32 or wider, from dt (B, L, H), dt_bias and A (H,); differentiable."""
    dtype = torch.promote_types(torch.promote_types(dt.dtype, A.dtype), torch.float32)
    steps = step_sizes(dt, dt_bias, True, (least, most), dtype)
    if lengths is not None:
        steps = steps.masked_fill(_padding(dt, lengths), 0)
    return steps, steps * A.to(dtype)


def backward(
    dsteps: Tensor,
    ddecays: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    lengths: Tensor | None,
    least: float,
    most: float,
    ddt: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of dt_bias and A; that of dt is written into ``ddt``, of its shape and dtype and any strides."""
    steps, _ = forward(dt, dt_bias, A, lengths, least, most)
    raw = dt.to(steps.dtype) + dt_bias.to(steps.dtype)
    slope = torch.sigmoid(raw)
    if (least, most) != (0.0, float("inf")):
        free = F.softplus(raw)
        slope = slope.masked_fill((free < least) | (free > most), 0)
    if lengths is not None:
        slope = slope.masked_fill(_padding(dt, lengths), 0)
    draw = (dsteps + ddecays * A.to(steps.dtype)) * slope
    ddt.copy_(draw)
    return draw.sum((0, 1)).to(dt_bias.dtype), (ddecays * steps).sum((0, 1)).to(A.dtype)


def _padding(dt: Tensor, lengths: Tensor) -> Tensor:
    """(B, L, 1) bool, True at and past ``lengths`` (B,)."""
    return (torch.arange(dt.shape[1], device=dt.device) >= lengths.unsqueeze(1)).unsqueeze(-1)
