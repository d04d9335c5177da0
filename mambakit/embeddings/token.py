"""Token embedding."""

from __future__ import annotations

from torch import Tensor, nn

from mambakit.embeddings.checks import check_ids


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
        check_ids(input, "TokenEmbedding", "input_ids")
        return super().forward(input)
