"""The definition of ``mamba_inner``: the block's operators one after another, each by its own definition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.conv import causal_conv1d
from mambakit.kernels.scan import selective_scan

# A raw step so low that softplus gives exactly 0 in float16, bfloat16 and float32: the memory stands still.
NO_STEP = -1.0e4


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """out (B, L, d_model) and the final state (B, D, N)."""
    x, z = xz.chunk(2, dim=-1)
    options: dict[str, Any] = {"seq_idx": seq_idx, "reverse": reverse, "backend": "reference"}
    u = causal_conv1d(x, conv_weight, conv_bias, "silu", initial_state=conv_state, **options)
    d_state = A.shape[1]
    dt, B, C = F.linear(u, x_proj_weight.to(u.dtype)).split([dt_proj_weight.shape[1], d_state, d_state], dim=-1)
    delta = F.linear(dt, dt_proj_weight.to(u.dtype))
    if lengths is not None:
        delta = delta.masked_fill(padding(delta, lengths), NO_STEP)
    y, final_state = selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        True,
        initial_state=ssm_state,
        return_final_state=True,
        **options,
    )
    bias = None if out_proj_bias is None else out_proj_bias.to(y.dtype)
    return F.linear(y, out_proj_weight.to(y.dtype), bias), final_state


def padding(delta: Tensor, lengths: Tensor) -> Tensor:
    """(B, L, 1) bool, True at and past ``lengths`` (B,)."""
    time = torch.arange(delta.shape[1], device=delta.device)
    return (time >= lengths.unsqueeze(1)).unsqueeze(-1)
