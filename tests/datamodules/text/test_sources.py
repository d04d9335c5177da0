"""Sources of text: files, folders, globs, Python's documentation, a stand-in for the hub; and their faults."""

import sys
import types
from pathlib import Path

import pytest

from mambakit.datamodules.text.sources import read_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files written in an order that is not theirs by name."""
    for name in ("b.txt", "a/z.txt", "c.md", "a/b/y.txt", "a.txt", "B.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def test_a_file_keeps_every_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes("a\r\nb\rc\n é".encode())
    assert [document.text for document in read_documents("x.txt", tmp_path)] == ["a\r\nb\rc\n é"]
    assert read_documents(str(tmp_path / "x.txt"), "/elsewhere")[0].text.startswith("a\r\n")


def test_a_folder_is_read_in_the_order_of_its_paths(folder, monkeypatch):
    expected = ["B.txt", "a/b/y.txt", "a/z.txt", "a.txt", "b.txt"]
    assert [document.text for document in read_documents(".", folder)] == expected
    listing = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listing(self, pattern))))
    assert [document.text for document in read_documents(".", folder)] == expected, "the file system's order shows"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.md", ["c.md"]), ("[ab].txt", ["a.txt", "b.txt"]), ("**/[yz].txt", ["a/b/y.txt", "a/z.txt"])],
)
def test_a_glob(folder, pattern, expected):
    assert [document.text for document in read_documents(pattern, folder)] == expected
    assert [document.text for document in read_documents(str(folder / pattern), "/elsewhere")] == expected


def test_python_docs_are_english_and_sorted():
    documents = read_documents("python-docs")
    names = [document.name for document in documents]
    assert len(names) > 50 and names == sorted(names)
    assert sum(" the " in document.text for document in documents) > len(documents) * 0.9


def test_python_docs_do_not_follow_the_order_they_are_written_in(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"while": "W", "assert": "A"})
    assert [document.text for document in read_documents("python-docs")] == ["A", "W"]


class Rows:
    column_names = ("id", "body")

    def __getitem__(self, column: str) -> list[str]:
        return {"id": ["0", "1", "2"], "body": ["one", "", "three"]}[column]


def test_a_dataset_of_the_hub(monkeypatch):
    calls = []
    stub = types.ModuleType("datasets")
    stub.load_dataset = lambda name, config, split: calls.append((name, config, split)) or Rows()
    monkeypatch.setitem(sys.modules, "datasets", stub)
    documents = read_documents("hf:some/set", text_column="body")
    assert documents == [("hf:some/set[0]", "one"), ("hf:some/set[2]", "three")]
    read_documents("hf:some/set:raw:test", text_column="body")
    assert calls == [("some/set", None, "train"), ("some/set", "raw", "test")]
    with pytest.raises(ValueError, match="no column 'text', it has id, body"):
        read_documents("hf:some/set")
    with pytest.raises(ValueError, match="should read hf:NAME"):
        read_documents("hf:")
    with pytest.raises(ValueError, match="should read hf:NAME"):
        read_documents("hf:a:b:c:d")


def test_a_dataset_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the datasets package.*mambakit\[hub\]"):
        read_documents("hf:some/set")


def test_what_is_missing_is_told(folder):
    with pytest.raises(FileNotFoundError, match=f"there is no {folder}/nowhere.txt; give a file"):
        read_documents("nowhere.txt", folder)
    with pytest.raises(FileNotFoundError, match=f"no file matches {folder}/\\*.rst"):
        read_documents("*.rst", folder)
    (folder / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*.txt file; name other files with a glob"):
        read_documents("bare", folder)
    command = f"curl --create-dirs -Lo {folder}/tinyshakespeare.txt http"
    with pytest.raises(FileNotFoundError, match=f"karpathy/char-rnn .*{command}"):
        read_documents("tinyshakespeare.txt", folder)


def test_empty_text_is_told(folder):
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        read_documents("empty.txt", folder)


def test_a_byte_that_is_no_utf8_is_told(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin1") + b" au lait")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3; convert it"):
        read_documents("latin.txt", tmp_path)
