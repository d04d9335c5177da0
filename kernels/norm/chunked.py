"""The norms as a few vectorised passes over blocks of rows that stay in the cache, and their gradients.

Letters: R rows (every axis but the last, flattened), G groups, K channels of a group; an ordinary norm has G = 1.
With n = s * rstd the normalised row and g = dy * w, the gradient of the RMS norm is
``ds = rstd * (g - n * mean(g * n))``; both reductions of dy * s (over channels for ds, over rows for dw) are products
of a matrix with a vector, which BLAS does in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_BLOCK = 2**18  # elements: 1 MB of float32


def _blocks(x: Tensor) -> Iterator[slice]:
    rows, channels = x.shape
    step = rows if x.device.type != "cpu" else max(1, CPU_BLOCK // channels)
    for row in range(0, rows, step):
        yield slice(row, row + step)


def _rms(s: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s (R, G, K), weight (G, K) to the normalised and weighted rows, and rstd (R, G)."""
    rstd = (torch.linalg.vector_norm(s, dim=-1).square_() / s.shape[-1] + eps).rsqrt_()
    return (s * rstd.unsqueeze(-1)).mul_(weight), rstd


def _rms_backward(dy: Tensor, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """ds (R, G, K) and dweight (G, K)."""
    product = dy * s
    correction = torch.einsum("rgk,gk->rg", product, weight) * rstd.pow(3) / s.shape[-1]
    dweight = torch.einsum("rgk,rg->gk", product, rstd)
    ds = torch.mul(dy, weight, out=product).mul_(rstd.unsqueeze(-1))
    return ds.addcmul_(s, correction.unsqueeze(-1), value=-1), dweight


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """x, residual (R, D) to y in x's dtype, ``s = x + residual`` in ``dtype`` (None without residual), and the rows'
    mean (None unless ``centered``) and reciprocal deviation, (R,).
    """
    exact = torch.promote_types(dtype, torch.float32)
    rows, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty(rows, dtype=exact, device=x.device) if centered else None
    rstd = torch.empty(rows, dtype=exact, device=x.device)
    weight = weight.to(exact)
    bias = None if bias is None else bias.to(exact)
    for block in _blocks(x):
        s = x[block].to(exact)
        if residual is not None and summed is not None:
            summed[block] = s + residual[block]
            s = summed[block].to(exact)
        if mean is not None:
            y[block], block_mean, block_rstd = torch.native_layer_norm(s, (channels,), weight, bias, eps)
            mean[block], rstd[block] = block_mean[:, 0], block_rstd[:, 0]
        else:
            normed, block_rstd = _rms(s[:, None], weight, eps)
            y[block] = normed[:, 0] if bias is None else normed[:, 0].add_(bias)
            rstd[block] = block_rstd[:, 0]
    return y, summed, mean, rstd


def add_norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """ds (R, D), the gradient of x and of residual, in s's dtype and again in ``dtype``; dweight, dbias."""
    exact, channels = rstd.dtype, s.shape[1]
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    wide = weight.to(exact)
    dweight = torch.zeros_like(wide)
    dbias = None if bias is None else torch.zeros_like(wide)
    for block in _blocks(s):
        block_dy, block_s, block_rstd = dy[block].to(exact), s[block].to(exact), rstd[block, None]
        if mean is not None:
            block_ds, block_dweight, _ = torch.ops.aten.native_layer_norm_backward(
                block_dy, block_s, [channels], mean[block, None], block_rstd, wide, None, [True, True, False]
            )
            dweight += block_dweight
        else:
            grouped, block_dweight = _rms_backward(block_dy[:, None], block_s[:, None], wide[None], block_rstd)
            block_ds = grouped[:, 0]
            dweight += block_dweight[0]
        if dbias is not None:
            dbias += block_dy.sum(0)
        ds[block] = block_ds if dsummed is None else block_ds.add_(dsummed[block])
    dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
    return ds, ds.to(dtype), dweight.to(weight.dtype), dbias


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, norm_before_gate: bool, group_size: int
) -> tuple[Tensor, Tensor]:
    """x, z (R, D) to y in x's dtype and the reciprocal deviations (R, G)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    rows, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, channels // group_size, dtype=exact, device=x.device)
    weight = weight.to(exact).view(-1, group_size)
    for block in _blocks(x):
        s, gate = x[block].to(exact), F.silu(z[block].to(exact))
        if not norm_before_gate:
            s = s * gate
        normed, rstd[block] = _rms(s.unflatten(1, weight.shape), weight, eps)
        normed = normed.flatten(1)
        y[block] = normed.mul_(gate) if norm_before_gate else normed
    return y, rstd


def gated_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    norm_before_gate: bool,
    group_size: int,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz (R, D) and dweight (D,).

    dz is written into ``dz`` where given, channels side by side and rows anywhere; into ``y`` (R, D), contiguous, goes
    what the forward gave, which costs less here than another forward.
    """
    exact = rstd.dtype
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dz is None:
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    grouped = weight.to(exact).view(-1, group_size)
    dweight = torch.zeros_like(grouped)
    for block in _blocks(x):
        block_dy, wide, block_z = dy[block].to(exact), x[block].to(exact), z[block].to(exact)
        gate = F.silu(block_z)
        s = (wide if norm_before_gate else wide * gate).unflatten(1, grouped.shape)
        dnormed = block_dy * gate if norm_before_gate else block_dy
        ds, block_dweight = _rms_backward(dnormed.unflatten(1, grouped.shape), s, grouped, rstd[block])
        dweight += block_dweight
        if norm_before_gate or y is not None:
            normed = (s * rstd[block].unsqueeze(-1)).mul_(grouped).flatten(1)
        if y is not None:
            y[block] = normed * gate if norm_before_gate else normed
        if norm_before_gate:
            dx[block] = ds.flatten(1)
            dz[block] = torch.ops.aten.silu_backward(block_dy * normed, block_z)
        else:
            dx[block] = ds.flatten(1) * gate
            dz[block] = torch.ops.aten.silu_backward(ds.flatten(1) * wide, block_z)
    return dx, dz, dweight.flatten().to(weight.dtype)
