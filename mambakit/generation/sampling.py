"""From logits to the next id: temperature, top-k, top-p and min-p, each row of the batch by itself.

Letters: B batch, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SamplingOptions(NamedTuple):
    """How to draw from logits; see :func:`filter_logits`, and :func:`sample` for temperature 0."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def check(self) -> None:
        """Raise ValueError, naming the option, unless each lies in its range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}, expected 0 (the most probable id) or a finite number above it"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected at least 1; leave it out to keep every id")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a probability above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(
                f"min_p is {self.min_p}, expected a share from 0 to 1 of the most probable id's probability"
            )


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Logits of the distribution to draw from, ``-inf`` at what the filters leave out.

    The filters apply in this order, each to what the one before it left:

    - ``temperature`` T: p_i proportional to exp(logit_i / T).
    - ``top_k``: the k most probable ids (Fan et al. 2018, arXiv 1805.04833); ties go to the lower id.
    - ``top_p``: the smallest set of most probable ids whose probability reaches p (Holtzman et al. 2020, arXiv
      1904.09751).
    - ``min_p``: every id at least ``min_p`` times as probable as the row's most probable (Nguyen et al. 2024, arXiv
      2407.01082).

    At least one id of each row survives.

    Args:
        logits: (B, V), any floating dtype.
        temperature: above 0; below 1 sharpens, above 1 flattens.
        top_k: at least 1; more than V keeps all.
        top_p: above 0, at most 1.
        min_p: from 0 to 1.

    Returns:
        (B, V) float32.

    Raises:
        ValueError: logits of another shape, or an option outside its range.
    """
    SamplingOptions(temperature, top_k, top_p, min_p).check()
    _check_logits(logits)
    if temperature == 0:
        raise ValueError("filter_logits: temperature is 0, which is argmax and no distribution; call sample() for it")
    # The largest logit is moved to 0 first, so that a tiny temperature overflows nothing.
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.double().softmax(dim=-1)
        reached_before = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(reached_before).scatter(-1, order, reached_before), -torch.inf)
    if min_p is not None and min_p > 0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id for each row, drawn from :func:`filter_logits`' distribution; temperature 0 takes the most probable.

    Args:
        logits: (B, V), any floating dtype.
        temperature, top_k, top_p, min_p: as in :func:`filter_logits`; temperature may be 0.
        generator: on logits' device; without one torch's global generator of that device draws.

    Returns:
        ids (B,) int64.

    Raises:
        ValueError: logits of another shape, or an option outside its range.
    """
    options = SamplingOptions(temperature, top_k, top_p, min_p)
    options.check()
    _check_logits(logits)
    if temperature == 0:
        return logits.argmax(dim=-1)
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return scores(logits, noise, options).argmax(dim=-1)


def scores(logits: Tensor, noise: Tensor | None, options: SamplingOptions) -> Tensor:
    """(B, V) of which the largest of each row is the draw: p_i / noise_i, an exponential race.

    The winner has p's distribution, and the device is never asked for an answer, as ``torch.multinomial`` asks to
    check its input.

    Args:
        logits: (B, V).
        noise: (B, V) drawn from Exp(1); None at temperature 0, where the logits are the scores.
        options: of the draw.
    """
    if noise is None:
        return logits
    return filter_logits(logits, **options._asdict()).softmax(dim=-1) / noise


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (batch, vocabulary), neither of them empty")
