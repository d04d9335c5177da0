"""Where text comes from: a file, a folder, a glob, Python's own documentation, a Hugging Face dataset."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import NamedTuple

from mambakit.datamodules.paths import path_in

PYTHON_DOCS = "python-docs"
HUB_PREFIX = "hf:"

# What to do about a file that people are often sent here to use.
_KNOWN_FILES = {
    "tinyshakespeare.txt": "Tiny Shakespeare is data/tinyshakespeare/input.txt of karpathy/char-rnn on GitHub: "
    "curl --create-dirs -Lo {path} https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
}


class Document(NamedTuple):
    """One text and where it came from."""

    name: str
    text: str


def read_documents(data: str, root: str | Path = ".", text_column: str = "text") -> list[Document]:
    """Read every document of a source, in an order that is the same on every machine.

    Args:
        data: one of

            - a file: one document;
            - a folder: each ``*.txt`` in it and in the folders below it is a document, sorted by path;
            - a glob (``books/*.md``, ``**`` for any depth): likewise;
            - ``python-docs``: the English text of the standard library's ``pydoc_data.topics``, each topic a
              document, sorted by name. It differs a little between versions of Python;
            - ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME:CONFIG:SPLIT``: a dataset of the Hugging Face hub (split
              ``train`` unless named), each row a document.
        root: the folder against which a relative path in ``data`` is resolved.
        text_column: the column of a Hugging Face dataset that holds the text.

    Returns:
        The documents that are not empty, at least one.

    Raises:
        FileNotFoundError: nothing is there; says where it looked.
        ImportError: a Hugging Face dataset without the ``datasets`` package.
        ValueError: a file is not UTF-8 (with the byte's offset), nothing but empty text, or no such column.
    """
    if data == PYTHON_DOCS:
        documents = _python_docs()
    elif data.startswith(HUB_PREFIX):
        documents = _hub(data, text_column)
    else:
        documents = [Document(str(path), read_text(path)) for path in _paths(data, root)]
    kept = [document for document in documents if document.text]
    if not kept:
        raise ValueError(f"data: {documents[0].name if len(documents) == 1 else data} is empty; give a text to learn")
    return kept


def read_text(path: Path) -> str:
    """The text of a UTF-8 file with its line ends as they are: every byte of the file counts.

    Raises:
        ValueError: the file is not UTF-8; names the first bad byte and its offset.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; convert it, for "
            f"example with iconv -f latin1 -t utf-8"
        ) from None


def _paths(data: str, root: str | Path) -> list[Path]:
    path = path_in(root, data)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*.txt") if file.is_file()]
        if not found:
            raise FileNotFoundError(f"data: the folder {path} holds no *.txt file; name other files with a glob")
    else:
        names = glob.glob(str(Path(data).expanduser()), root_dir=Path(root).expanduser(), recursive=True)
        found = [file for name in names if (file := path_in(root, name)).is_file()]
        if not found and glob.has_magic(data):
            raise FileNotFoundError(f"data: no file matches {path}; check the pattern and data.root")
    if not found:
        help_ = _KNOWN_FILES.get(path.name, "give a file, a folder or a glob, or the folder it lies in as data.root")
        raise FileNotFoundError(f"data: there is no {path}; {help_.format(path=path)}")
    return sorted(found, key=lambda file: file.parts)


def _python_docs() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(f"{PYTHON_DOCS}:{name}", text) for name, text in sorted(topics.items())]


def _hub(data: str, text_column: str) -> list[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"data: {data} needs the datasets package, which is not installed; pip install 'mambakit[hub]'"
        ) from None
    name, config, split, *rest = [*data.removeprefix(HUB_PREFIX).split(":"), "", ""]
    if not name or any(rest):
        raise ValueError(f"data: {data} should read hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    rows = load_dataset(name, config or None, split=split or "train")
    if text_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise ValueError(f"text_column: {data} has no column {text_column!r}, it has {columns}; name one of these")
    return [Document(f"{data}[{row}]", text) for row, text in enumerate(rows[text_column])]
