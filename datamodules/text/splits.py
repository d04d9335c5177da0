"""Cutting documents into train, validation and test by contiguous text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mambakit.datamodules.text.sources import Document


def cut(documents: Sequence[Document], fractions: Sequence[float], at: str = "character") -> list[list[Document]]:
    """Cut the documents, in their order, into a first part and one part for each fraction.

    With n characters in all, the parts end at ``int((1 - sum of the fractions still to come) * n)``: fraction 0.1
    gives the first ``int(0.9 * n)`` characters and the rest, as nanoGPT does. Parts never share a character.

    Args:
        documents: at least one.
        fractions: of the characters, for the parts after the first; each in (0, 1), together under 1.
        at: ``character`` cuts there, if need be through a document, whose pieces are then documents of their
            parts; ``document`` moves each cut to the nearest end of a document.

    Returns:
        ``1 + len(fractions)`` lists of documents. A part of a very short text may be empty.

    Raises:
        ValueError: ``document`` with fewer documents than parts.
    """
    ends = list(accumulate(len(document.text) for document in documents))
    cuts = [int((1 - sum(fractions[index:])) * ends[-1]) for index in range(len(fractions))]
    if at == "document":
        cuts = _to_ends(cuts, ends)
    edges = [0, *cuts, ends[-1]]
    parts: list[list[Document]] = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = []
        for document, end in zip(documents, ends, strict=True):
            begin = end - len(document.text)
            text = document.text[max(first - begin, 0) : max(last - begin, 0)]
            if text:
                part.append(Document(document.name, text))
        parts.append(part)
    return parts


def _to_ends(cuts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Each cut moved to the nearest end, leaving at least one document to every part."""
    if len(ends) <= len(cuts):
        raise ValueError(
            f"split_at: 'document' with {len(ends)} document(s) cannot make {len(cuts) + 1} parts; "
            f"use split_at 'character' or give validation_data"
        )
    moved: list[int] = []
    low = 0
    for index, place in enumerate(cuts):
        high = len(ends) - (len(cuts) - index)
        best = min(range(low, high), key=lambda end: abs(ends[end] - place))
        moved.append(ends[best])
        low = best + 1
    return moved


def shared(one: Sequence[Document], other: Sequence[Document]) -> str | None:
    """The name of a document that both have, if any."""
    names = {document.name for document in one}
    return next((document.name for document in other if document.name in names), None)
