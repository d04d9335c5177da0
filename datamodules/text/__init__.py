"""Text for language models: ``TextDataModule`` and the tokenizers it and a checkpoint share.

The names load on first use, so importing this package does not import Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.datamodules.text.datamodule import TextDataModule as TextDataModule
    from mambakit.datamodules.text.tokenizer import ByteTokenizer as ByteTokenizer
    from mambakit.datamodules.text.tokenizer import CharacterTokenizer as CharacterTokenizer
    from mambakit.datamodules.text.tokenizer import FileTokenizer as FileTokenizer
    from mambakit.datamodules.text.tokenizer import Tokenizer as Tokenizer
    from mambakit.datamodules.text.tokenizer import tokenizer_from_state as tokenizer_from_state

_HOMES = {
    "ByteTokenizer": "tokenizer",
    "CharacterTokenizer": "tokenizer",
    "FileTokenizer": "tokenizer",
    "TextDataModule": "datamodule",
    "Tokenizer": "tokenizer",
    "tokenizer_from_state": "tokenizer",
}

__all__ = [
    "ByteTokenizer",
    "CharacterTokenizer",
    "FileTokenizer",
    "TextDataModule",
    "Tokenizer",
    "tokenizer_from_state",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
