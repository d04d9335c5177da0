"""A run stopped anywhere and resumed sees exactly the batches of one that was not stopped."""

import itertools
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from mambakit.datamodules.text import TextDataModule

PER_EPOCH = 8
STEPS = 19  # two epochs and a part of the third


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 160 different characters, so that a token's id is its position."""
    path = tmp_path_factory.mktemp("text") / "different.txt"
    path.write_text("".join(chr(0x4E00 + place) for place in range(160)), encoding="utf-8")
    return path


def datamodule(text: Path, **options) -> TextDataModule:
    defaults = {"tokenizer": "characters", "alphabet": "whole", "context": 8, "batch_size": 2, "seed": 3}
    return TextDataModule(str(text), **{**defaults, **options})


class Recorder(LightningModule):
    """Learns nothing; keeps where the windows of each finished step begin, and breaks at a batch if told to."""

    def __init__(self, break_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.break_at = break_at
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def training_step(self, batch, batch_index):
        if self.global_step == self.break_at:
            raise RuntimeError("broken on purpose")
        self.seen.append((self.current_epoch, tuple(batch["input_ids"][:, 0].tolist())))
        return self.weight * 1.0

    def validation_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Save a checkpoint in one hook after so many steps."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self._save)

    def _save(self, trainer, *_, **__) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(module: Recorder, data: TextDataModule, folder: Path, *, resume: Path | None = None, callbacks=(), **options):
    trainer = Trainer(
        **{"max_steps": STEPS, "limit_val_batches": 0, **options},
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module.seen


@pytest.mark.parametrize("sampling", ["contiguous", "random"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_in_the_middle_of_an_epoch(text, tmp_path, sampling, workers):
    whole = fit(Recorder(), datamodule(text, sampling=sampling), tmp_path)
    assert len(whole) == len(set(whole)) == STEPS, "the batches should differ, or the test shows nothing"
    options = {"sampling": sampling, "num_workers": workers}
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    stopped = fit(Recorder(), datamodule(text, **options), tmp_path, callbacks=[checkpoint], max_steps=12)
    assert stopped == whole[:12]
    for step in (3, 9) if workers else (3, 6, 9, 12):
        assert (
            fit(Recorder(), datamodule(text, **options), tmp_path, resume=tmp_path / f"step={step}.ckpt")
            == (whole[step:])
        ), step


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize(
    ("hook", "epochs"),
    [
        ("on_train_start", 0),
        ("on_train_batch_end", 1),
        ("on_train_epoch_end", 1),
        ("on_validation_end", 1),
        ("on_train_end", 2),
    ],
)
def test_stopped_at_the_edge_of_an_epoch(text, tmp_path, hook, epochs, limit):
    options = {"limit_train_batches": limit, "limit_val_batches": 1, "max_steps": -1}
    whole = fit(Recorder(), datamodule(text), tmp_path, **options, max_epochs=4)
    per_epoch = limit or PER_EPOCH
    assert len(whole) == 4 * per_epoch
    path = tmp_path / "edge.ckpt"
    save = SaveAt(hook, epochs * per_epoch, path)
    fit(Recorder(), datamodule(text), tmp_path, callbacks=[save], **options, max_epochs=2)
    resumed = fit(Recorder(), datamodule(text), tmp_path, resume=path, **options, max_epochs=4)
    assert resumed == whole[epochs * per_epoch :]


def test_stopped_by_validation_inside_an_epoch(text, tmp_path):
    options = {"limit_val_batches": 1, "val_check_interval": 3}
    whole = fit(Recorder(), datamodule(text), tmp_path, **options)
    path = tmp_path / "validated.ckpt"
    fit(Recorder(), datamodule(text), tmp_path, callbacks=[SaveAt("on_validation_end", 11, path)], **options)
    assert fit(Recorder(), datamodule(text), tmp_path, resume=path, **options) == whole[11:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_was_interrupted_comes_again(text, tmp_path, workers):
    whole = fit(Recorder(), datamodule(text), tmp_path)
    path = tmp_path / "broken.ckpt"
    save = SaveAt("on_exception", 9, path)
    broken = Recorder(break_at=9)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(broken, datamodule(text, num_workers=workers), tmp_path, callbacks=[save])
    resumed = fit(Recorder(), datamodule(text, num_workers=workers), tmp_path, resume=path)
    assert broken.seen + resumed == whole


def test_another_batch_size_inside_an_epoch_is_refused(text, tmp_path):
    path = tmp_path / "middle.ckpt"
    fit(Recorder(), datamodule(text), tmp_path, callbacks=[SaveAt("on_train_batch_end", 3, path)], max_steps=3)
    with pytest.raises(ValueError, match="in the middle of an epoch with batch_size 2, and now it is 4"):
        fit(Recorder(), datamodule(text, batch_size=4), tmp_path, resume=path)


def test_another_tokenizer_is_refused(text, tmp_path):
    path = tmp_path / "characters.ckpt"
    fit(Recorder(), datamodule(text), tmp_path, callbacks=[SaveAt("on_train_end", 2, path)], max_steps=2)
    with pytest.raises(ValueError, match="the checkpoint was trained with another one"):
        fit(Recorder(), datamodule(text, tokenizer="bytes"), tmp_path, resume=path)


def test_overfitting_one_batch_repeats_it(text, tmp_path):
    seen = fit(Recorder(), datamodule(text), tmp_path, overfit_batches=1, max_steps=3)
    assert len({starts for _, starts in seen}) == 1


def test_without_a_trainer_the_loader_resumes_too(text):
    loader = datamodule(text).train_dataloader()
    loader.sampler.set_epoch(1)
    whole = [batch["input_ids"] for batch in loader]
    for _ in itertools.islice(loader, 4):
        state = loader.state_dict()
    again = datamodule(text).train_dataloader()
    again.load_state_dict(state)
    again.sampler.set_epoch(1)
    rest = [batch["input_ids"] for batch in again]
    assert len(rest) == len(whole) - 4
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[4:], strict=True))
    assert len(list(again)) == len(whole), "a later pass begins at the start"
