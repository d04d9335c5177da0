"""Tokenizers: there and back, bytes that add up, text that arrives in pieces, and a state that rebuilds them."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders as token_decoders
from tokenizers import models, pre_tokenizers, trainers

from mambakit.datamodules.text import (
    ByteTokenizer,
    CharacterTokenizer,
    FileTokenizer,
    Tokenizer,
    tokenizer_from_state,
)

SAMPLE = "To be, or not to be — that is the question:\r\n\tœuvre 😀 naïve  日本\n"


def byte_level_bpe() -> FileTokenizer:
    """Tokens may end inside a character: the emoji has four bytes and no merge."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["to be or not to be that is the question"] * 3, trainer)
    return FileTokenizer(tokenizer.to_str())


def words(**options: bool) -> FileTokenizer:
    """Drops the spaces between words."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "be": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if options.get("clipping"):
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=9, pad_id=0)
    return FileTokenizer(tokenizer.to_str())


LOSSLESS = [ByteTokenizer(), CharacterTokenizer(SAMPLE), byte_level_bpe()]
ALL = [*LOSSLESS, words()]


@pytest.mark.parametrize("tokenizer", LOSSLESS, ids=lambda tokenizer: type(tokenizer).__name__)
def test_there_and_back(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE


@pytest.mark.parametrize("tokenizer", LOSSLESS, ids=lambda tokenizer: type(tokenizer).__name__)
def test_the_stream_is_the_text_and_never_half_a_character(tokenizer: Tokenizer):
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(SAMPLE)]
    assert "".join(pieces) + stream.finish() == SAMPLE
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > len(SAMPLE) // 4, "text should show as it comes"


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), byte_level_bpe()], ids=lambda tokenizer: type(tokenizer).__name__
)
def test_the_end_of_a_stream_gives_up_what_was_held_back(tokenizer: Tokenizer):
    ids = tokenizer.encode("a😀")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in ids) == "a"
    assert set(stream.finish()) == {"\ufffd"}


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda tokenizer: type(tokenizer).__name__)
@pytest.mark.parametrize("text", [SAMPLE, "a", "to  be ", " to", ""])
def test_bytes_add_up(tokenizer: Tokenizer, text: str):
    if isinstance(tokenizer, CharacterTokenizer):
        tokenizer = CharacterTokenizer(text or "a")
    ids, n_bytes = tokenizer.encode_with_bytes(text)
    assert ids.shape == n_bytes.shape and n_bytes.sum() == len(text.encode())
    assert ids.dtype.kind == n_bytes.dtype.kind == "u"
    assert len(ids) == 0 or ids.max() < tokenizer.vocab_size


def test_bytes_of_each_token():
    assert CharacterTokenizer("aé日😀").encode_with_bytes("a😀é日")[1].tolist() == [1, 4, 2, 3]
    ids, n_bytes = words().encode_with_bytes("to  be x ")
    assert ids.tolist() == [1, 2, 0] and n_bytes.tolist() == [2, 4, 3]
    ids, n_bytes = byte_level_bpe().encode_with_bytes("a😀b")
    assert len(ids) == 6 and n_bytes.tolist() == [1, 4, 0, 0, 0, 1]


@given(st.text(min_size=1))
@settings(max_examples=50, deadline=None)
def test_characters_know_their_own_text(text: str):
    text = text.encode(errors="ignore").decode() or "a"
    tokenizer = CharacterTokenizer(text)
    ids, n_bytes = tokenizer.encode_with_bytes(text)
    assert tokenizer.decode(ids) == text and n_bytes.sum() == len(text.encode())
    assert tokenizer.alphabet == "".join(sorted(set(text)))


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda tokenizer: type(tokenizer).__name__)
def test_state_rebuilds_it(tokenizer: Tokenizer):
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
    assert again == tokenizer and again.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(again.encode(SAMPLE), tokenizer.encode(SAMPLE))
    assert again != CharacterTokenizer("other")


def test_ids_are_as_narrow_as_can_be():
    assert ByteTokenizer().encode(SAMPLE).dtype == np.uint8
    assert CharacterTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 300)))).encode("\u4e00").dtype == np.uint16


def test_a_file_that_clips_does_not():
    assert len(words(clipping=True).encode("to be to be")) == 4
    assert len(words(clipping=True).encode("to")) == 1


def test_a_character_outside_the_alphabet_is_named():
    tokenizer = CharacterTokenizer("abc")
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 2 is not among the 3 .* remove or replace it"):
        tokenizer.encode("abébé")
    with pytest.raises(ValueError, match=r"U\+DCFF"):
        tokenizer.encode("\udcff")


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda tokenizer: type(tokenizer).__name__)
@pytest.mark.parametrize("token", [-1, 70000])
def test_an_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer, token: int):
    with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([0, token])
    with pytest.raises(ValueError, match=f"token {token} is outside"):
        tokenizer.stream().push(token)


def test_other_states_and_files_are_refused():
    with pytest.raises(ValueError, match="kind 'words', expected bytes, characters or file"):
        tokenizer_from_state({"kind": "words"})
    with pytest.raises(ValueError, match="not a file of the Hugging Face tokenizers library"):
        FileTokenizer("{}")
    with pytest.raises(ValueError, match="at least one character"):
        CharacterTokenizer("")
