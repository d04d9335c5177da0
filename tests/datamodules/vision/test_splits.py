"""Parts share no image, follow the seed, and keep each class's share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambakit.datamodules.vision.sources import ArraySource
from mambakit.datamodules.vision.splits import check_classes, check_disjoint, stratified


@given(
    counts=st.lists(st.integers(3, 40), min_size=1, max_size=5),
    fractions=st.lists(st.floats(0.05, 0.4), min_size=1, max_size=2),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_each_image_is_in_one_part(counts, fractions, seed):
    labels = np.random.default_rng(9).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = stratified(labels, fractions, seed, "abcde"[: len(counts)])
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    for label, count in enumerate(counts):
        for part, fraction in zip(parts[1:], fractions, strict=True):
            assert (labels[part] == label).sum() == max(1, round(fraction * count))
    again = stratified(labels, fractions, seed, "abcde"[: len(counts)])
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_the_seed_decides():
    labels = np.zeros(100, np.int64)
    assert not np.array_equal(stratified(labels, [0.5], 0, "a")[1], stratified(labels, [0.5], 1, "a")[1])


def test_nothing_to_cut():
    assert stratified(np.array([1, 0, 1]), [], 0, "ab")[0].tolist() == [0, 1, 2]


def test_too_few_images():
    with pytest.raises(ValueError, match=r"class b has 2 image\(s\), too few for 3 parts; give more"):
        stratified(np.array([0, 0, 0, 1, 1]), [0.1, 0.1], 0, "ab")
    with pytest.raises(ValueError, match=r"class b has 0 image"):
        stratified(np.array([0, 0, 0]), [], 0, "ab")


def source(classes: str, title: str = "x") -> ArraySource:
    return ArraySource(np.zeros((len(classes), 1, 1), np.uint8), np.arange(len(classes)), list(classes), title)


def test_classes_must_agree():
    check_classes({"train": source("ab"), "test": source("ab")})
    with pytest.raises(ValueError, match="the class c is in the test part and not in the train part"):
        check_classes({"train": source("ab"), "test": source("abc")})
    with pytest.raises(ValueError, match="the class b is in the train part and not in the validation part"):
        check_classes({"train": source("ab"), "validation": source("a")})


def test_parts_must_differ():
    check_disjoint({"train": source("ab"), "validation": source("ab", "y"), "test": source("ab", "z")})
    with pytest.raises(ValueError, match=r"y\[0\] is in both the validation and the test part"):
        check_disjoint({"train": source("ab"), "validation": source("ab", "y"), "test": source("ab", "y")})
