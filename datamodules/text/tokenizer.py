"""Tokenizers: bytes, characters, or a Hugging Face ``tokenizers`` file; each can be kept in a checkpoint."""

from __future__ import annotations

import codecs
import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mambakit.datamodules.paths import path_in


class StreamDecoder(ABC):
    """Turns token ids, one at a time, into text that can be shown at once: never half a character."""

    @abstractmethod
    def push(self, token: int) -> str:
        """The text that ``token`` completes, possibly none."""

    @abstractmethod
    def finish(self) -> str:
        """What was held back, unfinished characters as U+FFFD."""


class Tokenizer(ABC):
    """From text to token ids and back. Ids lie in 0 .. vocab_size - 1."""

    vocab_size: int

    @abstractmethod
    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,), and the UTF-8 bytes (L,) that each stands for; both unsigned, as narrow as they can be.

        The bytes sum to those of the text, whatever the tokenizer, so that bits per byte can be compared between
        tokenizers.

        Raises:
            ValueError: the text has a character the tokenizer does not know; names it and its position.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one at a time."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All there is to this tokenizer, in types JSON has; :func:`tokenizer_from_state` builds it again."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids (L,); raises as :meth:`encode_with_bytes` does."""
        return self.encode_with_bytes(text)[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.state() == other.state()

    __hash__ = None  # type: ignore[assignment]


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8: knows every text."""

    vocab_size = 256

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        return ids, np.ones_like(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_checked(ids, 256)).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        return _ByteStream()

    def state(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class _ByteStream(StreamDecoder):
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes(_checked([token], 256)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class CharacterTokenizer(Tokenizer):
    """One token a character (Unicode code point); ids follow the sorted alphabet, as in nanoGPT.

    Args:
        text: the alphabet is the set of its characters.

    Raises:
        ValueError: ``text`` is empty.
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("text: a characters tokenizer needs at least one character for its alphabet, got none")
        self.alphabet = "".join(sorted(set(text)))
        self.vocab_size = len(self.alphabet)
        self._codes = _code_points(self.alphabet)
        self._sizes = _utf8_sizes(self.alphabet)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if len(unknown):
            position = int(unknown[0])
            character = text[position]
            raise ValueError(
                f"text: character {character!r} (U+{ord(character):04X}) at position {position} is not among the "
                f"{self.vocab_size} characters the tokenizer knows; remove or replace it"
            )
        return _narrow(ids, self.vocab_size - 1), self._sizes[ids]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[token] for token in _checked(ids, self.vocab_size))

    def stream(self) -> StreamDecoder:
        return _CharacterStream(self)

    def state(self) -> dict[str, Any]:
        return {"kind": "characters", "alphabet": self.alphabet}


class _CharacterStream(StreamDecoder):
    def __init__(self, tokenizer: CharacterTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""


class FileTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face ``tokenizers`` library; no special token is added to a text.

    Args:
        json: the content of its JSON file.

    Raises:
        ValueError: ``json`` is not such a file.
    """

    def __init__(self, json: str) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer: not a file of the Hugging Face tokenizers library: {error}") from None
        # A file may ask for both, and either would drop or invent text without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int64)
        # Offsets are in characters; a token stands for the text from where the last one ended to its own end. So
        # spaces that a tokenizer skips count with the next token, a character in two pieces with the first.
        ends = np.asarray([end for _, end in encoding.offsets], dtype=np.int64)
        if len(ends):
            ends[-1] = len(text)
        positions = np.concatenate([[0], np.cumsum(_utf8_sizes(text), dtype=np.int64)])
        n_bytes = np.diff(positions[ends], prepend=0)
        return _narrow(ids, self.vocab_size - 1), _narrow(n_bytes, int(n_bytes.max(initial=0)))

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)

    def stream(self) -> StreamDecoder:
        return _FileStream(self)

    def state(self) -> dict[str, Any]:
        return {"kind": "file", "json": self._tokenizer.to_str()}


class _FileStream(StreamDecoder):
    def __init__(self, tokenizer: FileTokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        self._ids += _checked([token], self._tokenizer.vocab_size)
        text = self._stream.step(self._tokenizer._tokenizer, self._ids[-1]) or ""
        self._shown += len(text)
        return text

    def finish(self) -> str:
        return self._tokenizer.decode(self._ids)[self._shown :]


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose :meth:`Tokenizer.state` this is, for example out of a checkpoint.

    Raises:
        ValueError: the state is of no kind known here.
    """
    kind = state.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "characters":
        return CharacterTokenizer(state["alphabet"])
    if kind == "file":
        return FileTokenizer(state["json"])
    raise ValueError(f"state: tokenizer of kind {kind!r}, expected bytes, characters or file")


def tokenizer_from_file(name: str, root: str | Path) -> FileTokenizer:
    """Load a Hugging Face ``tokenizers`` JSON file, a relative path against ``root``.

    Raises:
        ValueError: there is no such file (and ``name`` is no other tokenizer), or it is of another kind.
    """
    path = path_in(root, name)
    if not path.is_file():
        near = difflib.get_close_matches(name.lower(), ["bytes", "characters"], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"tokenizer: {name!r} is neither bytes nor characters, and there is no file {path}{hint}")
    return FileTokenizer(path.read_text(encoding="utf-8"))


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    tokens = [int(token) for token in ids]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"ids: token {token} is outside the vocabulary of {vocab_size}; ids are 0 to {vocab_size - 1}"
            )
    return tokens


def _narrow(values: np.ndarray, largest: int) -> np.ndarray:
    return values.astype(np.min_scalar_type(largest))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)


def _utf8_sizes(text: str) -> np.ndarray:
    """UTF-8 bytes (L,) of each character."""
    limits = np.array([0x80, 0x800, 0x10000], dtype=np.uint32)
    return (np.searchsorted(limits, _code_points(text), side="right") + 1).astype(np.uint8)
