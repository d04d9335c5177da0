"""Presets: their sizes against the released checkpoints, the vocabulary's padding, the way through the command line."""

from functools import partial
from typing import get_args

import pytest
import torch

from mambakit import Backbone, LanguageModel, models
from mambakit.cli import main
from mambakit.mixers import Attention, Mamba1
from mambakit.mlp import MixtureOfExperts, SwiGLU
from mambakit.models import presets

# Parameters of state-spaces/mamba-*, and of state-spaces/mamba2-130m and -2.7b.
RELEASED = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1_4b": 1_372_178_432,
    "mamba_2_8b": 2_768_345_600,
    "mamba2_130m": 128_989_632,
    "mamba2_2_7b": 2_702_599_680,
}


def by_hand(kind, d, n):
    """The number of parameters, counted from the papers' definitions."""
    inner = 2 * d
    mamba1 = 3 * d * inner + inner * (4 + 1) + inner * (d // 16 + 32) + inner * (d // 16 + 1) + inner * 17
    mixed, heads = inner + 2 * 128, inner // 64
    mamba2 = d * (inner + mixed + heads) + mixed * (4 + 1) + 3 * heads + inner + inner * d
    hidden = -(-8 * d // 384) * 128
    block = {"mamba": mamba1 + d, "mamba2": mamba2 + d, "transformer": 4 * d * d + 3 * d * hidden + 2 * d}[kind]
    return n * block + d + (50280 if kind == "mamba" else 50288) * d


@pytest.mark.parametrize("name", [name for name in get_args(models.PresetName) if name != "jamba_small"])
def test_sizes(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = name.split("_")[0]
    assert count == by_hand(kind, model.backbone.d_model, len(model.backbone.layers)) == RELEASED.get(name, count)
    stated = float(name.removeprefix(kind + "_")[:-1].replace("_", ".")) * (1e9 if name.endswith("b") else 1e6)
    assert 0.98 * stated < count < 1.04 * stated, "the name is the size"


def test_jamba():
    with torch.device("meta"):
        layers = models.jamba_small().backbone.layers
    assert [isinstance(layer.mixer, Attention) for layer in layers] == [i == 4 for i in range(8)]
    assert [type(layer.mlp) for layer in layers] == [SwiGLU, MixtureOfExperts] * 4
    assert all(layer.mixer.has_norms for layer in layers if isinstance(layer.mixer, Mamba1))
    assert layers[4].mixer.d_rotary == 0


def test_options():
    tiny = presets.Preset(partial(Backbone, 8, 2), pad_vocab=16)
    model = tiny(vocab_size=17, tie_embeddings=False, dropout=0.25, gradient_checkpointing=True)
    assert isinstance(model, LanguageModel) and model.vocab_size == 32
    assert model.lm_head.weight is not model.backbone.embedding.weight
    assert model.backbone.dropout.p == 0.25 and model.backbone.gradient_checkpointing


def test_a_backbone_is_that_of_the_model():
    with torch.device("meta"):
        model, backbone = models.mamba2_130m(dropout=0.5), models.PresetBackbone("mamba2_130m", dropout=0.5)
    names = {f"backbone.{name}": tensor.shape for name, tensor in backbone.state_dict().items()}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert names == {name: shape for name, shape in wanted.items() if "embedding" not in name and "lm_head" not in name}
    assert backbone.dropout.p == 0.5


def test_a_wrong_name():
    with pytest.raises(ValueError, match=r"'mamba_13m' is unknown \(did you mean mamba_130m\?\)"):
        models.preset("mamba_13m")


def test_every_name_is_exported():
    assert all(isinstance(getattr(models, name), models.Preset) for name in get_args(models.PresetName))


OPTIONS = [
    *("fit", "--config", "text/quickstart", "--data.data", "text.txt", "--data.context", "16", "--data.batch_size=2"),
    *("--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1"),
]


@pytest.mark.parametrize(
    "options",
    [
        ["--model.backbone=mamba_130m"],
        ["--model.backbone=mambakit.models.PresetBackbone", "--model.backbone.name=mamba_130m"],
    ],
    ids=["name", "class"],
)
def test_from_the_command_line(options, tmp_path, monkeypatch, capsys):
    """A preset trains by one option, and its checkpoint generates on its own. (Of a size for a test.)"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "mamba_130m", presets.Preset(partial(Backbone, 8, 1)))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    assert main([*OPTIONS, *options]) == 0, capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "The", "--max-new", "3"]) == 0


def test_a_wrong_name_at_the_command_line(capsys):
    assert main(["fit", "--config", "text/quickstart", "--model.backbone=mamba_13m"]) == 1
    error = capsys.readouterr().err
    assert "--model.backbone: expected" in error and "(did you mean mamba_130m?)" in error and "path but" not in error
