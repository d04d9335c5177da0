"""In which classes' training sequences a word of DNA stands."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOST_LETTERS = 31  # 4^31 = 2^62 words, and one number more for no word
NONE = 2**62
EXACT = 20  # bits of which a float32 holds every sum


class KnownWords(nn.Module):
    """A vector for each word of ``letters`` letters that says which class's training sequences have it.

    C[c] where sequences of class c alone have the word, C[classes] where those of several have it, zeros where none
    does; so a whole training part is told by classes + 1 vectors, (classes + 1, d_model), drawn from N(0, 0.02).

    In training a sequence would find itself. So a word that one sequence alone has says nothing then; it speaks in
    evaluation, where another sequence shows it. What is learnt of a word that two have is thus what holds of a new
    sequence that shares it with one: its neighbours' class, itself left out.

    A word is its number in base 4, the first letter counting most. Which words there are is learnt once, by
    :meth:`learn`, and kept in the state dictionary.

    Args:
        d_model: width of the vectors.
        letters: k, 2 to 31.
        classes: number of classes.
        rows: words at most.
    """

    bits: Tensor
    owners: Tensor
    alone: Tensor

    def __init__(self, d_model: int, letters: int, classes: int, rows: int) -> None:
        super().__init__()
        self.letters, self.classes = letters, classes
        self.weight = nn.Parameter(0.02 * torch.randn(classes + 1, d_model))
        # Not as integers: averages of weights include buffers (EMAWeightAveraging), and round whole numbers off.
        self.register_buffer("bits", torch.zeros(rows, 1 + 2 * letters, dtype=torch.bool))
        self.register_buffer("owners", torch.zeros(rows, classes, dtype=torch.bool))
        self.register_buffer("alone", torch.zeros(rows, dtype=torch.bool))

    @property
    def words(self) -> Tensor:
        """(rows,) int64: the words in ascending order, then 2^62 in each row that has none."""
        words = torch.where(self.bits[:, 0], 0, NONE)
        for place, some in enumerate(self.bits[:, 1:].split(EXACT, dim=1)):
            powers = 2.0 ** torch.arange(some.shape[1], device=some.device, dtype=torch.float32)
            words = words + ((some * powers).sum(1).long() << place * EXACT)  # much faster than sums of integers
        return words

    @torch.no_grad()
    def learn(self, sequences: Iterable[tuple[Tensor, int]]) -> int:
        """Take every word; if there are too many, those that most sequences have (of equal ones the first in the
        alphabet's order). Their number.

        Args:
            sequences: of each the numbers (any length,) int64 of its words, and its class.
        """
        kept = [(numbers.unique(), label) for numbers, label in sequences]
        numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(one for one, _ in kept)])
        labels = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.full_like(one, label) for one, label in kept)])
        every, inverse = numbers.unique(return_inverse=True)
        shared = torch.bincount(labels + inverse * self.classes, minlength=len(every) * self.classes)
        counts = shared.view(-1, self.classes)
        first = counts.sum(1).argsort(descending=True, stable=True)[: len(self.bits)].sort().values
        places, device = torch.arange(2 * self.letters), self.bits.device
        for buffer in (self.bits, self.owners, self.alone):
            buffer.zero_()
        self.bits[: len(first), 0] = True
        self.bits[: len(first), 1:] = ((every[first].unsqueeze(1) >> places) & 1).bool().to(device)
        self.owners[: len(first)] = (counts[first] > 0).to(device)
        self.alone[: len(first)] = (counts[first].sum(1) == 1).to(device)
        return len(first)

    def forward(self, numbers: Tensor) -> Tensor:
        """Vectors (B, L, d_model) of words (B, L) int64."""
        words = self.words
        rows = torch.searchsorted(words, numbers).clamp(max=len(words) - 1)
        found = words[rows] == numbers
        if self.training:
            found = found & ~self.alone[rows]
        owners = self.owners[rows]
        owner = torch.where(owners.sum(-1) > 1, self.classes, owners.int().argmax(-1))
        return nn.functional.embedding(owner, self.weight) * found.unsqueeze(-1).to(self.weight.dtype)
