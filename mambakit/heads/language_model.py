"""Language-model head: vectors to logits, or straight to the loss."""

from __future__ import annotations

from torch import Tensor, nn

from mambakit.kernels import linear_cross_entropy


class LanguageModelHead(nn.Linear):
    """logits = W hidden, W (vocab_size, d_model), no bias; ``weight`` may be tied to a token embedding's.

    Args:
        d_model: width of the hidden vectors.
        vocab_size: number of ids.
    """

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats, never holding the logits of all tokens at once.

        Args:
            hidden: (..., d_model).
            labels: (...,) int64; -100 counts nothing.
            reduction: "mean" over the counted labels, "sum", or "none" (...,).
        """
        return linear_cross_entropy(hidden, self.weight, labels, reduction=reduction)
