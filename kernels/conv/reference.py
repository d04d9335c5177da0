"""The definition of the causal convolution: a window that slides along time, one step at a time.

Letters: B batch, L length, D channels, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y_t = act(bias + sum_k weight[:, k] x_{t-W+1+k})`` as a loop over t; autograd differentiates it.

    Arguments as in :func:`mambakit.kernels.causal_conv1d`. Returns y (B, L, D) in x's dtype and the final state
    (B, D, W-1) in float32, or float64 for float64 inputs.
    """
    batch, length, channels = x.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    inputs, weight = x.to(exact), weight.to(exact)
    if initial_state is None:
        window = inputs.new_zeros(batch, channels, weight.shape[1] - 1)
    else:
        window = initial_state.to(exact)
    outputs: list[Tensor] = []
    times = range(length - 1, -1, -1) if reverse else range(length)
    before = times[0]
    for t in times:
        if seq_idx is not None:
            window = window.masked_fill((seq_idx[:, t] != seq_idx[:, before])[:, None, None], 0)
        window = torch.cat([window, inputs[:, t, :, None]], dim=-1)
        pre = (window * weight).sum(-1)
        if bias is not None:
            pre = pre + bias.to(exact)
        outputs.append(pre if activation is None else F.silu(pre))
        window, before = window[..., 1:], t
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, dim=1).to(x.dtype), window


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """A few steps of the same window, row by row; ``conv_state`` is updated in place.

    Arguments as in :func:`mambakit.kernels.causal_conv1d_update`, x as (B, D, T). Returns y (B, D, T) in x's dtype.
    """
    state_len, width = conv_state.shape[-1], weight.shape[1]
    exact = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        line = row if conv_state_indices is None else int(conv_state_indices[row])
        if line < 0:
            continue
        state = conv_state[line]
        seen = state_len if cache_seqlens is None else int(cache_seqlens[row])
        past = [(seen - back) % state_len for back in range(width - 1, 0, -1)]
        window = state[:, past].to(exact)
        for t in range(x.shape[2]):
            newest = x[row, :, t, None]
            window = torch.cat([window, newest.to(exact)], dim=-1)
            if cache_seqlens is None:  # the newest input stands last
                state.copy_(torch.cat([state[:, 1:], newest.to(state.dtype)], dim=-1))
            else:  # a ring: input number n stands in column n modulo state_len
                state[:, (seen + t) % state_len] = newest[:, 0].to(state.dtype)
            pre = (window * weight.to(exact)).sum(-1)
            if bias is not None:
                pre = pre + bias.to(exact)
            out[row, :, t] = (pre if activation is None else F.silu(pre)).to(x.dtype)
            window = window[:, 1:]
    return out
