"""The definitions of the norms, as the papers write them; autograd differentiates them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``s = x + residual`` rounded to ``dtype``, and its RMS norm, or layer norm when ``centered``. Returns (y, s)."""
    exact = torch.promote_types(dtype, torch.float32)
    summed = (x.to(exact) if residual is None else x.to(exact) + residual.to(exact)).to(dtype)
    s = summed.to(exact)
    if centered:
        s = s - s.mean(-1, keepdim=True)
    y = s / torch.sqrt(s.square().mean(-1, keepdim=True) + eps) * weight.to(exact)
    if bias is not None:
        y = y + bias.to(exact)
    return y.to(x.dtype), summed


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool, group_size: int) -> Tensor:
    """``norm(x) * w * silu(z)``, or ``norm(x * silu(z)) * w``; the norm goes over each group of channels."""
    exact = torch.promote_types(x.dtype, torch.float32)
    s, gate = x.to(exact), F.silu(z.to(exact))
    if not norm_before_gate:
        s = s * gate
    groups = s.unflatten(-1, (-1, group_size))
    y = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(exact)
    return (y * gate if norm_before_gate else y).to(x.dtype)
