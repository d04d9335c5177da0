"""The language-model task: its loss and metrics count labels, not batches, and training learns."""

import math

import lightning
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from mambakit import Backbone
from mambakit.optim import OptimConfig
from mambakit.tasks import CausalLM


def batches(count, seed=0, ignored=0, n_bytes=None):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        # Batches of unequal size and unequal numbers of labels: a mean over batches would differ from one over labels.
        ids = torch.randint(7, (1 + i % 2, 12), generator=generator)
        labels = (ids + 1) % 7  # a rule one layer can learn
        labels[:, : ignored * (i % 2)] = -100
        batch = {"input_ids": ids, "labels": labels}
        if n_bytes is not None:
            batch["n_bytes"] = torch.full((len(ids),), n_bytes)
        made.append(batch)
    return DataLoader(made, batch_size=None)


def trainer(tmp_path, **options):
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def task(**options):
    lightning.seed_everything(0, verbose=False)
    return CausalLM(7, Backbone(16, 1), optim=OptimConfig(lr=1e-2, **options))


def test_validation_counts_labels_and_bytes(tmp_path):
    model = task().eval()
    loader = batches(5, ignored=5, n_bytes=3)
    (measured,) = trainer(tmp_path).validate(model, loader, verbose=False)
    nats, labels, size = 0.0, 0, 0
    with torch.no_grad():
        for batch in loader:
            logits = model(batch["input_ids"]).flatten(0, 1)
            nats += torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum").item()
            labels += int((batch["labels"] != -100).sum())
            size += 3 * len(batch["input_ids"])
    assert measured["validation/loss"] == pytest.approx(nats / labels, rel=1e-4)
    assert measured["validation/perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-4)
    assert measured["validation/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_without_bytes_nothing_is_said_of_them(tmp_path):
    (measured,) = trainer(tmp_path).test(task(), batches(2), verbose=False)
    assert set(measured) == {"test/loss", "test/perplexity"}


def test_a_split_of_ignored_labels_does_not_spoil_the_mean(tmp_path):
    """A batch whose labels are all ignored weighs nothing (and is not NaN)."""
    loader = list(batches(3))
    loader[1]["labels"][:] = -100
    (measured,) = trainer(tmp_path).validate(task(), DataLoader(loader, batch_size=None), verbose=False)
    (without,) = trainer(tmp_path).validate(task(), DataLoader([loader[0], loader[2]], batch_size=None), verbose=False)
    assert measured["validation/loss"] == pytest.approx(without["validation/loss"], rel=1e-5)


def test_a_fit_can_follow_a_validation(tmp_path):
    model = task()
    trainer(tmp_path).validate(model, batches(2, n_bytes=3), verbose=False)
    trainer(tmp_path, max_steps=2).fit(model, batches(3), batches(2, n_bytes=3))


def test_training_learns_a_rule(tmp_path):
    model = task()
    before = trainer(tmp_path).validate(model, batches(4, seed=9), verbose=False)[0]["validation/loss"]
    trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0).fit(model, batches(60))
    after = trainer(tmp_path).validate(model, batches(4, seed=9), verbose=False)[0]["validation/loss"]
    assert before == pytest.approx(math.log(7), abs=0.5)
    assert after < 0.3


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precisions_train(tmp_path, precision):
    model = task()
    trainer(tmp_path, max_steps=3, precision=precision).fit(model, batches(6))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_same_seed_same_weights(tmp_path):
    runs = []
    for _ in range(2):
        model = task()
        trainer(tmp_path, max_steps=4).fit(model, batches(6))
        runs.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*runs)


def test_groups_are_printed(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer(tmp_path, max_steps=1).fit(task(), batches(2))
    assert "weight_decay 0:" in caplog.text and "A_log" in caplog.text


def test_predict_gives_a_loss_for_each_label(tmp_path):
    model, loader = task().eval(), batches(2, ignored=4)
    predicted = trainer(tmp_path).predict(model, loader)
    assert [tuple(p.shape) for p in predicted] == [(1, 12), (2, 12)]
    assert bool((predicted[1][:, :4] == 0).all()) and bool((predicted[1][:, 4:] > 0).all())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_only_training_minds_the_balance_of_experts():
    torch.manual_seed(0)
    model = CausalLM(7, Backbone(16, 1, mlp="moe"), balance_weight=0.5)
    (batch,) = batches(1)
    _, balance = model.model.backbone(batch["input_ids"], return_balance=True)
    plain = model.predict_step(batch, 0).mean()
    assert model.training_step(batch, 0).item() == pytest.approx((plain + 0.5 * balance).item(), rel=1e-5)
