"""Token embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Embedding):
    """Rows of a table: ids (B, L) integers to vectors (B, L, d_model), drawn from N(0, 0.02) at the start.

    Args:
        vocab_size: number of ids.
        d_model: width of the vectors.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(vocab_size, d_model)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"TokenEmbedding: input_ids have dtype {input.dtype}, expected int64 token ids")
        return super().forward(input)
