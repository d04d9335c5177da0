"""The definition of the loss, with the full logits; autograd differentiates it."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N,) to the losses (N,), zero where the label is ignored."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(exact) @ weight.to(exact).t()
    if bias is not None:
        logits = logits + bias.to(exact)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    ignored = labels == ignore_index
    chosen = log_p.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    losses = -(1 - label_smoothing) * chosen - label_smoothing * log_p.mean(-1)
    return losses.masked_fill(ignored, 0)
