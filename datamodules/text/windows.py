"""Documents as one run of tokens, the windows a model reads of it, and the order in which training visits them.

Letters: T tokens in the run, L tokens in a window (its context), B windows in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mambakit.datamodules.text.sources import Document
from mambakit.datamodules.text.tokenizer import Tokenizer


class TokenRun:
    """The tokens of documents laid end to end, nothing between them.

    Args:
        documents: at least one.
        tokenizer: encodes each document by itself, so no token spans two.

    Attributes:
        tokens: (T,) unsigned integers, one byte each where the vocabulary allows.
        n_bytes: (T,) unsigned integers, the UTF-8 bytes each token stands for.
        starts: (documents,) int64, where each document begins.

    Raises:
        ValueError: a document has a character the tokenizer does not know; names the document.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
        encoded = []
        for document in documents:
            try:
                encoded.append(tokenizer.encode_with_bytes(document.text))
            except ValueError as error:
                raise ValueError(f"{document.name}: {error}") from None
        encoded = [(tokens, n_bytes) for tokens, n_bytes in encoded if len(tokens)]
        empty = np.zeros(0, np.uint8)
        self.tokens = np.concatenate([tokens for tokens, _ in encoded] or [empty])
        self.n_bytes = np.concatenate([n_bytes for _, n_bytes in encoded] or [empty])
        self.starts = np.cumsum([0] + [len(tokens) for tokens, _ in encoded], dtype=np.int64)[:-1]

    def __len__(self) -> int:
        return len(self.tokens)


class Windows(Dataset):
    """Windows of L tokens with the token that follows each.

    Item ``i`` is the window that begins at token i. Where fewer than L + 1 tokens are left from there, it is the last
    full window, with the labels that lie before it at -100: so windows at 0, L, 2 L, ... ask for every token (but
    the first) exactly once, at one shape and with no padding.

    Args:
        run: T tokens, at least L + 1.
        context: L, at least 1.

    An item is a dict, a batch the same with an axis B in front:
        input_ids: (L,) int64.
        labels: (L,) int64, the token that follows each; -100 where that one belongs to another document, and at
            labels that the window before has asked for.
        seq_idx: (L,) int32, the document within the window, from 0. Absent where the run is one document.
        n_bytes: () int64, the UTF-8 bytes of all labels that are not -100.
    """

    def __init__(self, run: TokenRun, context: int) -> None:
        self.run = run
        self.context = context

    def __len__(self) -> int:
        """The number of places at which a full window begins."""
        return len(self.run) - self.context

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([item]).items()}

    def __getitems__(self, items: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch in one go, which DataLoader asks for where a dataset has this; needs no collating."""
        wanted = np.asarray(items, dtype=np.int64)
        begins = np.minimum(wanted, len(self) - 1)
        places = begins[:, None] + np.arange(self.context + 1)  # (B, L + 1)
        tokens = torch.from_numpy(self.run.tokens[places].astype(np.int64))
        asked = places[:, 1:] > wanted[:, None]
        batch = {"input_ids": tokens[:, :-1].contiguous()}
        if len(self.run.starts) > 1:
            documents = np.searchsorted(self.run.starts, places, side="right")
            asked &= documents[:, 1:] == documents[:, :-1]
            within = documents[:, :-1] - documents[:, :1]
            batch["seq_idx"] = torch.from_numpy(within.astype(np.int32))
        batch["labels"] = tokens[:, 1:].masked_fill(torch.from_numpy(~asked), -100)
        n_bytes = np.where(asked, self.run.n_bytes[places[:, 1:]], 0).sum(axis=1, dtype=np.int64)
        batch["n_bytes"] = torch.from_numpy(n_bytes)
        return batch


class EveryWindow:
    """The order of evaluation, the same in each epoch: windows at 0, L, 2 L, ..., every label once.

    Args:
        tokens: T.
        context: L.
    """

    def __init__(self, tokens: int, context: int) -> None:
        self.starts = np.arange(0, tokens - 1, context)

    def __len__(self) -> int:
        return len(self.starts)

    def __call__(self, epoch: int) -> np.ndarray:
        return self.starts


class RandomWindows:
    """nanoGPT's order of training: ``length`` windows in an epoch, each beginning anywhere, with repetition.

    Args:
        tokens: T, at least L + 1.
        context: L.
        length: windows in an epoch.
        seed: with the epoch it decides everything.
    """

    def __init__(self, tokens: int, context: int, length: int, seed: int) -> None:
        self.places = tokens - context
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).integers(self.places, size=self.length)


class ShuffledWindows:
    """Windows side by side, each once in an epoch, in a new order and from a new offset every epoch.

    The offset shifts all windows by 0 to L - 1 tokens, so over epochs a token is seen at every place of a window; an
    epoch leaves out fewer than 2 L tokens, now some, now others.

    Args:
        tokens: T, at least L + 1.
        context: L.
        seed: with the epoch it decides everything.
    """

    def __init__(self, tokens: int, context: int, seed: int) -> None:
        self.context = context
        self.length = max(1, (tokens - context) // context)
        self.offsets = min(context, tokens - self.length * context)
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __call__(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, epoch))
        offset = generator.integers(self.offsets)
        return offset + self.context * generator.permutation(self.length)
