"""Cutting labelled images into train, validation and test, and the proof that no two parts share an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from mambakit.datamodules.vision.sources import ImageSource


def stratified(labels: np.ndarray, fractions: Sequence[float], seed: int, classes: Sequence[str]) -> list[np.ndarray]:
    """Cut images into a first part and one for each fraction, each class by itself, at random.

    Of n images of a class, a part gets ``round(fraction * n)``, at least one; the first part gets the rest. What is
    cut depends on the labels, the fractions and the seed alone.

    Args:
        labels: (images,) integers.
        fractions: of the images, for the parts after the first; each in (0, 1), together under 1.
        seed: decides which images.
        classes: the name of each label.

    Returns:
        ``1 + len(fractions)`` sorted int64 arrays of indices, which share none and together hold every image.

    Raises:
        ValueError: a class has too few images for one in each part; names it.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(1 + len(fractions))]
    for label in range(len(classes)):
        rest = generator.permutation(np.flatnonzero(labels == label))
        sizes = [max(1, round(fraction * len(rest))) for fraction in fractions]
        if sum(sizes) >= len(rest):
            raise ValueError(
                f"data: class {classes[label]} has {len(rest)} image(s), too few for {len(parts)} parts; give more, or "
                f"validation_data and test_data of their own"
            )
        for part, size in zip(parts[1:], sizes, strict=True):
            part.append(rest[:size])
            rest = rest[size:]
        parts[0].append(rest)
    return [np.sort(np.concatenate(part)) for part in parts]


def check_classes(parts: Mapping[str, ImageSource]) -> None:
    """Raise ValueError where a part's classes are not those of train, naming one: labels would mean other things."""
    train = parts["train"].classes
    for part, source in parts.items():
        extra, missing = sorted(set(source.classes) - set(train)), sorted(set(train) - set(source.classes))
        if extra or missing:
            name, has = (extra[0], part) if extra else (missing[0], "train")
            raise ValueError(
                f"data: the class {name} is in the {has} part and not in the {'train' if extra else part} part "
                f"({len(train)} classes in train, {len(source.classes)} in {part}); give both the same class folders"
            )


def check_disjoint(parts: Mapping[str, ImageSource]) -> None:
    """Raise ValueError where two parts hold the same file, naming it. Copies under other names are not looked for."""
    for (one, first), (other, second) in combinations(parts.items(), 2):
        names = {first.name(index) for index in range(len(first))}
        common = next((name for name in map(second.name, range(len(second))) if name in names), None)
        if common is not None:
            raise ValueError(f"data: {common} is in both the {one} and the {other} part; give each its own images")
