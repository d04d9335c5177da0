"""text/quickstart with every mixer, by one option and no other change."""

import re
from typing import get_args

import pytest

from mambakit.backbone import MixerName, mixer_factory
from mambakit.cli import main

CAUSAL = [name for name in get_args(MixerName) if mixer_factory(name).causal]
NOT_CAUSAL = [name for name in get_args(MixerName) if name not in CAUSAL]
# The recipe at a size for a test: what is asked of a mixer stays as it is.
SMALL = [
    *("--model.backbone.d_model", "32", "--model.backbone.n_layers", "1", "--model.optim.lr", "0.02"),
    *("--data.context", "64", "--data.batch_size", "8", "--data.validation_batch_size", "8"),
    *("--trainer.max_steps", "12", "--trainer.val_check_interval", "12", "--trainer.limit_val_batches", "4"),
    *("--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
]


@pytest.mark.parametrize("mixer", CAUSAL)
def test_a_mixer_learns(mixer, tmp_path, monkeypatch, capsys):
    """A dozen steps take two of the eight bits of a byte that nothing is known about: letters are no random bytes."""
    monkeypatch.chdir(tmp_path)
    options = ["--config", "text/quickstart", "--model.backbone.mixer", mixer, *SMALL]
    assert main(["fit", *options]) == 0, capsys.readouterr().err
    before, after = map(float, re.search(r"bits per byte: (\S+) -> (\S+)", capsys.readouterr().out).groups())
    assert before > 7.5 and after < 6.0, (before, after)


@pytest.mark.parametrize("mixer", NOT_CAUSAL)
def test_a_mixer_that_sees_later_tokens_is_refused(mixer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "text/quickstart", "--model.backbone.mixer", mixer, *SMALL]) == 1
    error = capsys.readouterr().err
    assert "sees later tokens" in error and "choose a causal mixer" in error and "Namespace" not in error
