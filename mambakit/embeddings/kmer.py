"""Nucleotides and the words they end, for models that are to know a stretch of DNA again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mambakit.embeddings.checks import check_ids, check_places
from mambakit.embeddings.known_words import MOST_LETTERS, KnownWords

LONGEST = 10  # 4^10 rows, a million


class KmerEmbedding(nn.Module):
    """Ids (B, L) to vectors (B, L, d_model): of each nucleotide, of the words it ends, and of where a word stands.

        y_t = E[x_t] + sum_k W_k[x_(t-k+1) ... x_t] + P[x_(t-m+1) ... x_t, floor(t / span)]
                     + sum_k C_k[classes of training sequences with the word x_(t-k+1) ... x_t]

    k runs over ``words`` for W and over ``known`` for C; P, of words of ``placed`` = m letters, is there where
    ``length`` is given. Words of DNA are the tokens of Genomic-ULMFiT and DNABERT (Ji et al. 2021); here they come
    beside the letters, several lengths at once, and each place keeps a vector, so that L stays. Placed words tell what
    stands where, in windows that are all cut at the same place. Words of ``known`` lengths tell a stretch that other
    sequences have too, and of which class those are (:class:`.known_words.KnownWords`): near-copies know one another
    again, wherever they begin. :meth:`learn` reads the training part for them; in a fit the callback
    :class:`mambakit.callbacks.LearnWords` calls it.

    E and C are drawn from N(0, 0.02), W and P begin at zero: a word that training never showed says nothing. So does
    one with another letter than A, C, G, T in it, or that began before the sequence. A vector depends on x_t and what
    was before it, so that causal models may use it, but on whole inputs only, for there is no state.

    Args:
        d_model: width of the vectors.
        words: the lengths k, each once, 2 to 10; 4^k rows each.
        length: places of a sequence, for P; L is at most that. None leaves P out.
        placed: m, 1 to 10.
        span: places that share a row of P.
        known: lengths, each once, 2 to 31, of words that tell the classes of training sequences with them.
        classes: number of classes, for these.
        rows: of each of these lengths, words at most.
        forget: probability that a training sequence is told nothing of its ``known`` words, so that a model also learns
            to do without, as it must where no near-copies are asked.
        dropout: probability that an element of the vectors is 0 in training.
        vocab_size: number of ids.
        first: the id of A; C, G and T follow it (mambakit.datamodules.genomics.alphabet).

    Raises:
        ValueError: options out of their range; (in a call) longer sequences than ``length``; (in training) ``known``
            lengths whose words were never learnt.
        TypeError: (in a call) no ids.
    """

    def __init__(
        self,
        d_model: int,
        words: Sequence[int] = (4, 6, 8),
        length: int | None = None,
        placed: int = 4,
        span: int = 4,
        known: Sequence[int] = (),
        classes: int = 2,
        rows: int = 2**18,
        forget: float = 0.0,
        dropout: float = 0.0,
        vocab_size: int = 12,
        first: int = 7,
    ) -> None:
        super().__init__()
        words, known = tuple(words), tuple(known)
        if not words or len(set(words)) < len(words) or not all(2 <= k <= LONGEST for k in words):
            raise ValueError(f"KmerEmbedding: words={list(words)}, expected lengths from 2 to {LONGEST}, each once")
        if len(set(known)) < len(known) or not all(2 <= k <= MOST_LETTERS for k in known) or rows < 1 or classes < 2:
            raise ValueError(
                f"KmerEmbedding: known={list(known)}, classes={classes}, rows={rows}, expected lengths from 2 to "
                f"{MOST_LETTERS}, each once, two classes or more, and at least one row"
            )
        if not 0 <= forget <= 1:
            raise ValueError(f"KmerEmbedding: forget={forget}, expected a probability, 0 to 1")
        if not 1 <= placed <= LONGEST:
            raise ValueError(f"KmerEmbedding: placed={placed}, expected 1 to {LONGEST}, the letters of a placed word")
        if span < 1 or (length is not None and length < 1):
            raise ValueError(f"KmerEmbedding: length={length}, span={span}, expected at least 1")
        if not 0 <= first <= vocab_size - 4:
            raise ValueError(
                f"KmerEmbedding: first={first}, expected 0 to {vocab_size - 4}, so that T is an id as well"
            )
        self.words, self.length, self.placed, self.span, self.first = words, length, placed, span, first
        self.classes = classes
        self.num_embeddings = vocab_size
        self.weight = nn.Parameter(0.02 * torch.randn(vocab_size, d_model))
        self.known = nn.ModuleDict({str(k): KnownWords(d_model, k, classes, rows) for k in known})
        self._ready = not known
        self.forget = forget
        self.tables = nn.ParameterDict({str(k): nn.Parameter(torch.zeros(4**k, d_model)) for k in words})
        if length is not None:
            self.places = nn.Parameter(torch.zeros(-(-length // span), 4**placed, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, "KmerEmbedding")
        if self.length is not None:
            check_places(ids, self.length, "KmerEmbedding", "give it a larger length, or none")
        if self.training and not self._ready:
            if not self.has_learnt:
                raise ValueError(
                    f"KmerEmbedding: known={[int(k) for k in self.known]}, but the words of these lengths have not "
                    "been learnt; give the trainer the callback mambakit.callbacks.LearnWords, or call learn(sequences)"
                )
            self._ready = True
        told: Tensor | int = 1
        if self.training and self.forget:
            told = torch.rand(len(ids), 1, 1, device=ids.device) >= self.forget
        vectors = functional.embedding(ids, self.weight)
        for k, number, whole in self._numbers(ids):
            if k in self.words:
                vectors = vectors + functional.embedding(number, self.tables[str(k)]) * whole
            if str(k) in self.known:
                vectors = vectors + self.known[str(k)](number) * (whole * told)
            if self.length is not None and k == self.placed:
                rows = torch.arange(ids.shape[1], device=ids.device) // self.span * 4**k + number
                vectors = vectors + functional.embedding(rows, self.places.flatten(0, 1)) * whole
        return self.dropout(vectors)

    @property
    def has_learnt(self) -> bool:
        """Whether words of the ``known`` lengths were learnt, here or in the checkpoint that was loaded."""
        return any(bool(self._table(int(k)).bits[:, 0].any()) for k in self.known)

    def learn(self, sequences: Iterable[tuple[Any, int]]) -> dict[int, int]:
        """Remember the words of ``known`` lengths and their classes: how many words, of each length.

        Args:
            sequences: ids (any length,), tensor or array, and class of each training sequence, and of no other.

        Raises:
            ValueError: no sequence has a word; a class out of range.
        """
        shown: dict[int, list[tuple[Tensor, int]]] = {int(k): [] for k in self.known}
        for ids, label in sequences:
            if not 0 <= label < self.classes:
                raise ValueError(f"KmerEmbedding: a sequence of class {label}, expected 0 to {self.classes - 1}")
            for k, number, whole in self._numbers(torch.as_tensor(ids).unsqueeze(0)):
                if k in shown:
                    shown[k].append((number[whole.squeeze(-1) > 0], int(label)))
        found = {k: self._table(k).learn(numbers) for k, numbers in shown.items()}
        if not any(found.values()):
            raise ValueError(
                f"KmerEmbedding: of {len(next(iter(shown.values()), ()))} sequences none has a word of {list(shown)} "
                "letters; give shorter known lengths, or none"
            )
        return found

    def _table(self, k: int) -> KnownWords:
        return cast(KnownWords, self.known[str(k)])

    def _numbers(self, ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each length that has a table, the number (B, L) int64 of the word of that length that ends at each place,
        its first letter counting most, and whether there is one (B, L, 1), in the parameters' dtype.
        """
        lengths = {*self.words, *(int(k) for k in self.known)} | (set() if self.length is None else {self.placed})
        digits = ids.long() - self.first
        known = (digits >= 0) & (digits < 4)
        digits = digits.where(known, 0)
        number, whole = torch.zeros_like(digits), torch.ones_like(known)
        for back in range(max(lengths)):
            number = number + 4**back * functional.pad(digits, (back, 0))[:, : ids.shape[1]]
            whole = whole & functional.pad(known, (back, 0))[:, : ids.shape[1]]
            if back + 1 in lengths:
                yield back + 1, number, whole.unsqueeze(-1).to(self.weight.dtype)
