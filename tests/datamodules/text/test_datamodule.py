"""TextDataModule as a whole: splits, determinism, several processes, what it says and what it refuses."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambakit.datamodules.text import TextDataModule, tokenizer_from_state

SHARED = Path(os.environ.get("MAMBAKIT_DATA", Path(__file__).resolve().parents[3].parent / "shared/data"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    (folder / "line.txt").write_text("".join(f"line {number}: naïve\n" for number in range(80)), encoding="utf-8")
    (folder / "other.txt").write_text("another text altogether, " * 20)
    (folder / "digits.txt").write_text("abc" * 120 + "0123" * 10)
    (folder / "short.txt").write_text("short")
    (folder / "empty.txt").write_text("")
    (folder / "bad.txt").write_bytes(b"fine until \xff here")
    return folder


def module(root: Path, data: str = "line.txt", **options) -> TextDataModule:
    return TextDataModule(data, str(root), **{"context": 16, "batch_size": 4, **options})


def batches(loader, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("sampling", ["contiguous", "random"])
def test_seed_and_epoch_decide_the_batches(root, sampling):
    loader = module(root, sampling=sampling).train_dataloader()
    first = batches(loader)
    assert first and same(first, batches(module(root, sampling=sampling).train_dataloader()))
    assert same(first, batches(module(root, sampling=sampling, num_workers=2).train_dataloader()))
    assert not same(first, batches(loader, epoch=1))
    assert not same(first, batches(module(root, sampling=sampling, seed=1).train_dataloader()))


def test_shapes_and_sizes(root):
    data = module(root, validation_context=10, validation_batch_size=3)
    batch = batches(data.train_dataloader())[0]
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "input_ids": ((4, 16), torch.int64),
        "labels": ((4, 16), torch.int64),
        "n_bytes": ((4,), torch.int64),
    }
    assert batches(data.val_dataloader())[0]["input_ids"].shape == (3, 10)
    assert len(module(root, sampling="random", samples_per_epoch=13).train_dataloader()) == 3


@given(length=st.integers(30, 400), fraction=st.floats(0.05, 0.9), context=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_train_and_validation_never_overlap(tmp_path_factory, length, fraction, context):
    path = tmp_path_factory.mktemp("sizes") / "x.txt"
    path.write_text("".join(chr(0x4E00 + place) for place in range(length)), encoding="utf-8")
    options = {"tokenizer": "characters", "alphabet": "whole", "validation_fraction": fraction}
    data = module(path.parent, "x.txt", context=context, batch_size=1, **options)
    train_size = int((1 - fraction) * length)
    if min(train_size, length - train_size) <= context:
        with pytest.raises(ValueError, match="part of x.txt has"):
            data.setup("fit")
        return
    seen = {}
    for part, loader in (("train", data.train_dataloader()), ("validation", data.val_dataloader())):
        found = [batch for epoch in range(3) for batch in batches(loader, epoch)]
        ids = torch.cat([torch.cat([batch["input_ids"], batch["labels"]], 1).flatten() for batch in found])
        seen[part] = set(ids.tolist()) - {-100}
    assert max(seen["train"]) < train_size <= min(seen["validation"])
    assert seen["validation"] == set(range(train_size, length))


def test_the_split_of_shakespeare_is_nanogpts():
    if not (SHARED / "text/tinyshakespeare.txt").is_file():
        pytest.skip(f"no text/tinyshakespeare.txt under {SHARED} (set MAMBAKIT_DATA)")
    data = TextDataModule("tinyshakespeare.txt", str(SHARED / "text"), tokenizer="characters", alphabet="whole")
    assert data.vocab_size == 65
    data.setup("fit")
    assert "train 1 document(s), 1,003,854 characters" in data.describe()
    assert "validation 1 document(s), 111,540 characters" in data.describe()
    assert sum(int((batch["labels"] != -100).sum()) for batch in data.val_dataloader()) == 111_539


def test_python_docs_need_nothing():
    data = TextDataModule(context=64, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["seq_idx"].shape == (4, 64) and data.vocab_size == 256


class World:
    """Stands for a trainer of ``size`` processes."""

    def __init__(self, rank: int, size: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": size, "rank": rank}
        self.fit_loop = SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(processed=1)))
        )


def test_processes_share_the_windows(root):
    def share(part: str, rank: int, size: int) -> list[torch.Tensor]:
        data = module(root, tokenizer="characters", batch_size=1)
        data.trainer = World(rank, size)
        loader = data.train_dataloader() if part == "train" else data.val_dataloader()
        return [
            row for batch in batches(loader, epoch=2) for row in torch.cat([batch["input_ids"], batch["labels"]], 1)
        ]

    for part in ("train", "validation"):
        alone = share(part, 0, 1)
        parts = [share(part, rank, 3) for rank in range(3)]
        together = [row for step in range(len(parts[0])) for rank in parts if step < len(rank) for row in [rank[step]]]
        wanted = len(alone) // 3 * 3 if part == "train" else len(alone)
        assert len(together) == wanted
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=False))
        assert part == "validation" or len({len(rank) for rank in parts}) == 1, "processes wait for each other"


def test_a_state_from_other_processes_is_refused(root):
    data = module(root)
    data.trainer = World(0, 2)
    loader = data.train_dataloader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    assert state["batches"] == 1, "the second batch was handed out, and training has finished one"
    with pytest.raises(ValueError, match="processes 2, and now it is 1"):
        module(root).train_dataloader().load_state_dict(state)


def test_separate_files_are_not_cut(root):
    data = module(root, validation_data="other.txt", test_data="digits.txt", validation_fraction=0.0)
    data.setup()
    assert "train 1 document(s), 1,190 characters, 1,270 tokens" in data.describe()
    assert "validation 1 document(s), 500 characters" in data.describe()
    assert "test 1 document(s), 400 characters" in data.describe()
    assert sum(int(batch["n_bytes"].sum()) for batch in data.test_dataloader()) == 399


def test_a_test_part_is_cut_from_the_end(root):
    data = module(root, test_fraction=0.2, validation_fraction=0.1)
    text = (root / "line.txt").read_text(encoding="utf-8")
    data.setup("test")
    assert "test 1 document(s), 238 characters" in data.describe()
    last = batches(data.test_dataloader())[-1]["labels"][-1]
    assert bytes(last[last != -100].tolist()).decode()[-10:] == text[-10:]


def test_documents_of_a_folder(root, tmp_path):
    for name, size in (("c", 30), ("a", 30), ("b", 25), ("d", 15)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    data = module(tmp_path, ".", context=8, split_at="document", validation_fraction=0.2)
    assert "train 3 document(s), 85 characters" in data.describe()
    batch = batches(data.val_dataloader())[0]
    assert "seq_idx" not in batch and set(batch["input_ids"].flatten().tolist()) == {ord("d")}
    assert "seq_idx" in batches(data.train_dataloader())[0]


def test_the_alphabet_is_that_of_the_training_part(root):
    data = module(root, "digits.txt", tokenizer="characters")
    assert data.vocab_size == 3
    with pytest.raises(ValueError, match=r"the validation part: .*digits.txt: .*'0' \(U\+0030\).*alphabet 'whole'"):
        data.setup("fit")
    whole = module(root, "digits.txt", tokenizer="characters", alphabet="whole")
    whole.setup("fit")
    assert whole.vocab_size == 7


def test_a_tokenizer_file(root):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "line": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "words.json"))
    data = module(root, tokenizer="words.json")
    assert data.vocab_size == 2
    batch = batches(data.val_dataloader())[0]
    assert batch["n_bytes"].sum() > (batch["labels"] != -100).sum() * 4


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_the_checkpoint_holds_the_tokenizer(root, tokenizer):
    data = module(root, tokenizer=tokenizer)
    state = data.state_dict()
    assert tokenizer_from_state(state["tokenizer"]) == data.tokenizer
    data.load_state_dict(state)
    with pytest.raises(ValueError, match="the checkpoint was trained with another one"):
        module(root, "other.txt", tokenizer="characters").load_state_dict(state)


def test_setup_again_does_nothing(root):
    data = module(root)
    for _ in range(2):
        data.prepare_data()
        data.setup("fit")
    kept = data._run("train")
    data.setup("fit")
    assert data._run("train") is kept and data._documents() is data._documents(), "read and encoded once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "gone.txt"}, r"there is no .*gone.txt"),
        ({"data": "empty.txt"}, r"empty.txt is empty"),
        ({"data": "bad.txt"}, r"bad.txt is not UTF-8: byte 0xff at offset 11"),
        (
            {"data": "short.txt"},
            r"context: the train part of short.txt has 4 token\(s\), one window needs .* = 17; lower",
        ),
        ({"validation_fraction": 0.01}, r"validation_context: the validation part .* lower validation_context"),
        ({"data": "digits.txt", "context": 360}, r"has 360 token\(s\), one window needs context \+ 1 = 361"),
        ({"validation_context": 2000}, r"validation_context \+ 1 = 2001"),
        ({"tokenizer": "byte"}, r"'byte' is neither bytes nor characters, and there is no file .*did you mean bytes\?"),
        ({"context": 0}, r"context: 0, expected at least 1"),
        ({"batch_size": 0}, r"batch_size: 0"),
        ({"batch_size": 1000}, r"batch_size: 1000, but an epoch has only \d+ window"),
        ({"num_workers": -1}, r"num_workers: -1"),
        ({"validation_fraction": 0.0}, r"validation_fraction: 0.0, expected between 0 and 1"),
        ({"validation_fraction": 1.0}, r"validation_fraction: 1.0, expected between 0 and 1"),
        ({"test_fraction": -0.1}, r"test_fraction: -0.1"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, r"together 1.0, expected under 1"),
        ({"test_fraction": 0.1, "test_data": "other.txt"}, r"given together with test_data"),
        ({"sampling": "sorted"}, r"sampling: 'sorted', expected contiguous or random"),
        ({"samples_per_epoch": 5}, r"only random sampling has a choice"),
        ({"sampling": "random", "samples_per_epoch": 0}, r"samples_per_epoch: 0"),
        ({"split_at": "document"}, r"cannot make 2 parts"),
        ({"validation_data": "l*.txt"}, r"validation_data: .*line.txt is also in the train part"),
        ({"validation_data": "line.txt"}, r"line.txt is also in the train part; give text that is nowhere else"),
    ],
    ids=lambda value: "-".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_refused(root, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data = module(root, **options)
        data.setup("fit")
        data.train_dataloader()
    assert "\n" not in str(caught.value)


def test_no_test_part_is_told(root):
    for ask in (lambda data: data.setup("test"), lambda data: data.test_dataloader()):
        with pytest.raises(ValueError, match="there is no test part; set test_fraction or test_data"):
            ask(module(root))


def test_every_option_is_documented():
    described = inspect.getdoc(TextDataModule).split("Args:")[1].split("Raises:")[0]
    options = list(inspect.signature(TextDataModule).parameters)
    assert [line.split(":")[0].strip() for line in described.splitlines() if line[4:5].strip()] == options


def test_the_room_is_cheap_to_enter():
    code = "import sys, mambakit.datamodules.text as room; dir(room); print('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
