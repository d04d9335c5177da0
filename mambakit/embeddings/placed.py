"""Tokens and where they stand, for windows that are all cut at the same place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambakit.embeddings.checks import check_ids, check_places


class PlacedEmbedding(nn.Module):
    """y_t = E[x_t] + P[t]: ids (B, L) to vectors (B, L, d_model), a learnt vector for each place added (BERT's).

    For sequences in which a place means something, such as windows around the start of a gene. Both tables are drawn
    from N(0, 0.02) at the start.

    Args:
        d_model: width of the vectors.
        length: places; L is at most that.
        vocab_size: number of ids.

    Raises:
        ValueError: (in a call) longer sequences.
        TypeError: (in a call) no ids.
    """

    def __init__(self, d_model: int, length: int, vocab_size: int = 12) -> None:
        super().__init__()
        self.num_embeddings = vocab_size
        self.weight = nn.Parameter(0.02 * torch.randn(vocab_size, d_model))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(length, d_model))

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, "PlacedEmbedding")
        check_places(ids, len(self.pos_embed), "PlacedEmbedding")
        return nn.functional.embedding(ids, self.weight) + self.pos_embed[: ids.shape[1]]
