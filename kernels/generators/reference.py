"""The definitions of the generators, every term held at once, in complex128; autograd differentiates them."""

from __future__ import annotations

import torch
from torch import Tensor


def log_vandermonde(v: Tensor, x: Tensor, length: int) -> Tensor:
    """2 Re sum_n v_n exp(x_n l) for l from 0 to L-1: v, x (..., N) to (..., L)."""
    return 2 * (v.unsqueeze(-1) * _vandermonde(x, length)).sum(-2).real.to(v.real.dtype)


def log_vandermonde_transpose(u: Tensor, x: Tensor) -> Tensor:
    """sum_l u_l exp(x_n l): u (..., L), x (..., N) to (..., N)."""
    return (u.unsqueeze(-2) * _vandermonde(x, u.shape[-1])).sum(-1).to(x.dtype)


def _vandermonde(x: Tensor, length: int) -> Tensor:
    """exp(x_n l), (..., N, L)."""
    return torch.exp(x.to(torch.complex128).unsqueeze(-1) * torch.arange(length, device=x.device))


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """sum_n v_n / (z_m - w_n) + v_n* / (z_m - w_n*): v (..., N), z (M,), w (..., N) to (..., M)."""
    z, w, wide = z.to(torch.complex128), w.to(torch.complex128).unsqueeze(-1), v.unsqueeze(-1)
    return (wide / (z - w) + wide.conj() / (z - w.conj())).sum(-2).to(v.dtype)
