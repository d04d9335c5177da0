"""Compile in a Lightning trainer: the same training, compiled once a shape."""

import functools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from mambakit import Backbone
from mambakit.callbacks import Compile
from mambakit.callbacks.compile import network_of


class Sorter(LightningModule):
    """Tells which of two kinds a short sequence is, by a Vim of one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential()
        self.model.add_module("backbone", Backbone(8, 1, mixer="vim"))
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.model(batch)[:, 0]), torch.zeros(len(batch), dtype=torch.long))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Frames(Callback):
    """Notes whether a gradient is left when a step begins."""

    def __init__(self) -> None:
        self.left: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left.append(any(parameter.grad is not None for parameter in pl_module.parameters()))


def fit(task, *callbacks, **options):
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(task, DataLoader(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1)), batch_size=2))
    return task


@pytest.fixture
def traced(monkeypatch):
    """The graphs that torch.compile is given, run as they are: there need be no C++ compiler here."""
    graphs, options, compile_ = [], [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def stand_in(function, **given):
        options.append(given)
        return compile_(function, backend=backend, fullgraph=given["fullgraph"], dynamic=given["dynamic"])

    monkeypatch.setattr(torch, "compile", functools.wraps(compile_)(stand_in))
    torch.compiler.reset()
    yield graphs, options
    torch.compiler.reset()


def test_a_compiled_fit_is_the_same_fit(traced):
    graphs, options = traced
    plain, frames = fit(Sorter()), Frames()
    compiled = fit(Sorter(), Compile(), frames)
    for (name, want), got in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert len(graphs) == 1 and options[0]["mode"] == "reduce-overhead"
    assert frames.left == [False] * 3


def test_gradients_are_left_to_the_trainer_without_graphs(traced):
    frames = Frames()
    fit(Sorter(), Compile(mode="default"), frames, accumulate_grad_batches=3)
    assert frames.left == [False, True, True]


def test_the_network_that_is_taken():
    task = Sorter()
    assert network_of(task, None) is task.model.backbone
    assert network_of(task, "model") is task.model
    assert network_of(task, "head") is task.head


def test_bad_input():
    with pytest.raises(ValueError, match="mode='fast', expected one of default"):
        Compile(mode="fast")
    with pytest.raises(ValueError, match="Sorter has no submodule 'net'; give network.* model, head"):
        fit(Sorter(), Compile("net"))
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 batches.*mode='default'"):
        fit(Sorter(), Compile(), accumulate_grad_batches=2)
