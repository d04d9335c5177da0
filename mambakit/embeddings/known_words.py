"""The words that sequences of a training part have in common, and a vector for each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOST_LETTERS = 31  # 4^31 = 2^62 words, and one number more for no word
NONE = 2**62
EXACT = 20  # bits of which a float32 holds every sum


class KnownWords(nn.Module):
    """Vectors (rows, d_model) for words of ``letters`` letters that several sequences share; zeros for any other word.

    A word is its number in base 4, the first letter counting most. Which words have a vector is learnt once, by
    :meth:`learn`, and kept in the state dictionary.

    A word that one training sequence alone has would only tell that sequence again, and teach a model to remember
    instead of to read; one that two have in common says in training just what it says afterwards: that somewhere this
    stretch has been seen.

    Args:
        d_model: width of the vectors, which begin at zero.
        letters: k, 2 to 31.
        rows: words at most.
    """

    bits: Tensor

    def __init__(self, d_model: int, letters: int, rows: int) -> None:
        super().__init__()
        self.letters = letters
        self.weight = nn.Parameter(torch.zeros(rows, d_model))
        # Not as integers: averages of weights include buffers (EMAWeightAveraging), and round whole numbers off.
        self.register_buffer("bits", torch.zeros(rows, 1 + 2 * letters, dtype=torch.bool))

    @property
    def words(self) -> Tensor:
        """(rows,) int64: the words in ascending order, then 2^62 in each row that has none."""
        words = torch.where(self.bits[:, 0], 0, NONE)
        for place, some in enumerate(self.bits[:, 1:].split(EXACT, dim=1)):
            powers = 2.0 ** torch.arange(some.shape[1], device=some.device, dtype=torch.float32)
            words = words + ((some * powers).sum(1).long() << place * EXACT)  # much faster than sums of integers
        return words

    @torch.no_grad()
    def learn(self, sequences: Iterable[Tensor]) -> int:
        """Take the words that two sequences have or more, and if there are too many, those that most have (of equal
        ones the first in the alphabet's order). Their number.

        Args:
            sequences: of each the numbers (any length,) int64 of its words.
        """
        numbers = [torch.empty(0, dtype=torch.int64), *(one.unique() for one in sequences)]
        every, shared = torch.cat(numbers).unique(return_counts=True)
        every, shared = every[shared > 1], shared[shared > 1]
        first = shared.argsort(descending=True, stable=True)[: len(self.weight)]
        words = every[first].sort().values
        places = torch.arange(2 * self.letters)
        self.bits.zero_()
        self.bits[: len(words), 0] = True
        self.bits[: len(words), 1:] = ((words.cpu().unsqueeze(1) >> places) & 1).bool().to(self.bits.device)
        self.weight.zero_()
        return len(words)

    def forward(self, numbers: Tensor) -> Tensor:
        """Vectors (B, L, d_model) of words (B, L) int64."""
        words = self.words
        rows = torch.searchsorted(words, numbers).clamp(max=len(words) - 1)
        found = (words[rows] == numbers).unsqueeze(-1)
        return nn.functional.embedding(rows, self.weight) * found.to(self.weight.dtype)
