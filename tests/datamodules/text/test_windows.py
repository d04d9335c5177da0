"""Cuts and windows: nothing shared between parts, every label once, documents kept apart, orders that follow a seed."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mambakit.datamodules.text.sources import Document
from mambakit.datamodules.text.splits import cut
from mambakit.datamodules.text.tokenizer import ByteTokenizer, CharacterTokenizer
from mambakit.datamodules.text.windows import EveryWindow, RandomWindows, ShuffledWindows, TokenRun, Windows

QUICK = settings(max_examples=60, deadline=None)


def different(sizes: list[int]) -> list[Document]:
    """Documents whose characters all differ, in order: a character is its position."""
    ends = np.cumsum([0, *sizes])
    return [
        Document(str(index), "".join(chr(0x4E00 + place) for place in range(ends[index], ends[index + 1])))
        for index in range(len(sizes))
    ]


def places(part: list[Document]) -> list[int]:
    return [ord(letter) - 0x4E00 for document in part for letter in document.text]


sizes_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@given(sizes=sizes_of_documents, fractions=st.lists(st.floats(0.01, 0.45), min_size=1, max_size=2))
@QUICK
def test_parts_share_nothing_and_lose_nothing(sizes, fractions):
    parts = cut(different(sizes), fractions)
    assert [place for part in parts for place in places(part)] == list(range(sum(sizes)))
    assert len(places(parts[0])) == int((1 - sum(fractions)) * sum(sizes))
    assert all(document.text for part in parts for document in part)


@given(sizes=sizes_of_documents, fractions=st.lists(st.floats(0.01, 0.45), min_size=1, max_size=2))
@QUICK
def test_cuts_at_documents_keep_them_whole(sizes, fractions):
    documents = different(sizes)
    if len(sizes) <= len(fractions):
        with pytest.raises(ValueError, match=r"split_at: 'document' with .* cannot make"):
            cut(documents, fractions, "document")
        return
    parts = cut(documents, fractions, "document")
    assert [document for part in parts for document in part] == documents
    assert all(parts)


def test_a_cut_at_a_document_is_the_nearest():
    assert [len(part) for part in cut(different([30, 30, 25, 15]), [0.2], "document")] == [3, 1]
    assert [len(part) for part in cut(different([30, 30, 25, 15]), [0.35], "document")] == [2, 2]
    assert [len(part) for part in cut(different([5, 45, 45, 5]), [0.2, 0.3], "document")] == [2, 1, 1], "none is empty"


def run_of(sizes: list[int]) -> TokenRun:
    documents = different(sizes)
    alphabet = "".join(document.text for document in documents)
    return TokenRun(documents, CharacterTokenizer(alphabet))


@given(sizes=sizes_of_documents, context=st.integers(1, 40), rows=st.integers(1, 4))
@QUICK
def test_evaluation_asks_for_every_label_once(sizes, context, rows):
    run = run_of(sizes)
    assume(len(run) > context)
    windows = Windows(run, context)
    order = EveryWindow(len(run), context)(0)
    labels, n_bytes = [], 0
    for first in range(0, len(order), rows):
        batch = windows.__getitems__(order[first : first + rows])
        assert batch["input_ids"].shape[1] == batch["labels"].shape[1] == context, "one shape"
        asked = batch["labels"] != -100
        assert torch.equal(batch["labels"][asked], batch["input_ids"][asked] + 1), "the next token"
        assert torch.equal(batch["n_bytes"], 3 * asked.sum(dim=1)), "each of these characters has three bytes"
        labels += batch["labels"][asked].tolist()
        n_bytes += int(batch["n_bytes"].sum())
    first_of_documents = set(np.cumsum([0, *sizes])[:-1].tolist())
    assert sorted(labels) == [place for place in range(len(run)) if place not in first_of_documents]


def test_a_window_over_three_documents():
    windows = Windows(run_of([3, 2, 9]), 6)
    item = windows[1]
    assert item["input_ids"].tolist() == [1, 2, 3, 4, 5, 6]
    assert item["labels"].tolist() == [2, -100, 4, -100, 6, 7]
    assert item["seq_idx"].tolist() == [0, 0, 1, 1, 2, 2]
    assert item["n_bytes"].item() == 12
    assert [item[name].dtype for name in ("input_ids", "labels", "seq_idx", "n_bytes")] == [
        torch.int64,
        torch.int64,
        torch.int32,
        torch.int64,
    ]
    assert "seq_idx" not in Windows(run_of([14]), 6)[0]


def test_bytes_are_those_of_the_labels():
    run = TokenRun([Document("a", "aé日b")], CharacterTokenizer("aé日b"))
    assert Windows(run, 2)[0]["n_bytes"].item() == 5
    assert Windows(run, 1).__getitems__([0, 1, 2])["n_bytes"].tolist() == [2, 3, 1]


def test_a_document_that_gives_no_token_is_no_document():
    run = TokenRun([Document("a", "xy"), Document("b", ""), Document("c", "z")], ByteTokenizer())
    assert run.tokens.tolist() == [120, 121, 122] and run.starts.tolist() == [0, 2]


orders = st.sampled_from(["random", "shuffled"])


def order_of(kind: str, tokens: int, context: int, seed: int = 0) -> RandomWindows | ShuffledWindows:
    return RandomWindows(tokens, context, 50, seed) if kind == "random" else ShuffledWindows(tokens, context, seed)


@given(kind=orders, context=st.integers(1, 30), extra=st.integers(1, 200), epoch=st.integers(0, 5))
@QUICK
def test_training_windows_lie_inside(kind, context, extra, epoch):
    order = order_of(kind, context + extra, context)
    starts = order(epoch)
    assert len(starts) == len(order) >= 1
    assert starts.min() >= 0 and starts.max() + context + 1 <= context + extra
    assert kind == "random" or len(set(starts // context)) == len(starts) == len(set(starts))


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_orders_follow_seed_and_epoch(kind):
    order = order_of(kind, 1000, 10)
    assert np.array_equal(order(4), order_of(kind, 1000, 10)(4))
    assert not np.array_equal(order(4), order(5))
    assert not np.array_equal(order(4), order_of(kind, 1000, 10, seed=1)(4))


def test_every_place_is_reached():
    assert {int(start) for epoch in range(60) for start in ShuffledWindows(100, 10, 0)(epoch)} == set(range(90))
    assert {int(start) for epoch in range(60) for start in RandomWindows(100, 10, 50, 0)(epoch)} == set(range(90))
