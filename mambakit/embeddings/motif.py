"""Motifs of nucleotides and where they lie, for windows that are all cut at the same place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mambakit.embeddings.checks import check_ids, check_places


class MotifEmbedding(nn.Module):
    """Ids (B, L) to vectors (B, ceil(L / p), d_model): how well each motif fits best within a window, and the window.

        y_j = max over 0 <= i < p of gelu(b + sum_m W[m, x_(jp + i + m - floor(K / 2))]) + P_j,    0 <= m < K

    A filter W that is as wide as a motif scores every place as a position-weight matrix does, and of p places the best
    counts: the first layer of convolutional models of DNA (DeepBind, Alipanahi et al. 2015). P_j tells which window it
    is. Sequences of p windows are short: a backbone behind it reads L / p vectors.

    Places outside the sequence and padding speak for no letter and are never the best. Filters begin as torch's
    convolutions do, P as N(0, 0.02).

    Args:
        d_model: width of the vectors, the number of motifs.
        length: places of a sequence; L is at most that.
        kernel: K, letters of a motif, odd.
        pool: p.
        dropout: probability that an element of the vectors is 0 in training.
        vocab_size: number of ids.

    Raises:
        ValueError: options out of their range; (in a call) longer sequences than ``length``.
        TypeError: (in a call) no ids.
    """

    def __init__(
        self, d_model: int, length: int, kernel: int = 9, pool: int = 4, dropout: float = 0.0, vocab_size: int = 12
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0 or not 1 <= pool <= length:
            raise ValueError(
                f"MotifEmbedding: kernel={kernel}, pool={pool}, length={length}; expected an odd kernel, so that a "
                "motif has a middle, and 1 to length places a window"
            )
        self.length, self.pool, self.vocab_size = length, pool, vocab_size
        self.windows = -(-length // pool)
        self.motifs = nn.Conv1d(vocab_size, d_model, kernel, padding=kernel // 2)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(self.windows, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` (B, L) bool is True at real letters."""
        check_ids(ids, "MotifEmbedding")
        check_places(ids, self.length, "MotifEmbedding")
        letters = functional.one_hot(ids.long(), self.vocab_size).to(self.pos_embed.dtype)
        if mask is not None:
            letters = letters * mask.unsqueeze(-1)
        fits = functional.gelu(self.motifs(letters.transpose(1, 2)))
        if mask is not None:
            fits = fits.masked_fill(~mask.unsqueeze(1), float("-inf"))
        best = functional.max_pool1d(fits, self.pool, ceil_mode=True).transpose(1, 2)
        if mask is not None:
            best = best.masked_fill(~self.shorten(mask).unsqueeze(-1), 0)
        return self.dropout(best) + self.pos_embed[: best.shape[1]]

    def shorten(self, mask: Tensor) -> Tensor:
        """Which windows (B, ceil(L / p)) bool hold a real letter, of a mask (B, L)."""
        return functional.max_pool1d(mask.float().unsqueeze(1), self.pool, ceil_mode=True).squeeze(1) > 0
