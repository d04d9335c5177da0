"""The sum of both directions and its gate, elementwise, in PyTorch: what ``triton_gate.py`` does in one pass each.

Letters: B batch, L length, D channels of one direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(y: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``total`` = y_forwards + y_backwards and ``gated`` = scale total SiLU(z), (B, L, D) each, in y's dtype.

    y: (B, L, 2D), the directions side by side. z: (B, L, D).
    """
    exact = torch.promote_types(y.dtype, torch.float32)
    first, second = y.to(exact).chunk(2, dim=-1)
    total = first + second
    return total.to(y.dtype), (total * F.silu(z.to(exact)) * scale).to(y.dtype)


def backward(dgated: Tensor, total: Tensor, z: Tensor, scale: float, dz: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradient of z into ``dz``; gives ``gated`` again, (B, L, D), and the gradient of y, (B, L, 2D)."""
    exact = torch.promote_types(z.dtype, torch.float32)
    wide, scaled, total = z.to(exact), dgated.to(exact) * scale, total.to(exact)
    dz.copy_(torch.ops.aten.silu_backward(scaled * total, wide))
    gate = F.silu(wide)
    dy = (scaled * gate).to(z.dtype)
    return (total * gate * scale).to(z.dtype), torch.cat((dy, dy), dim=-1)
