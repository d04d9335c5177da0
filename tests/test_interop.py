"""Checkpoints of mamba_ssm and transformers load strictly, and the outputs are theirs."""

import json

import pytest
import torch
import torch.nn.functional as F

from mambakit.interop import language_model_from_config, load_language_model
from mambakit.kernels.testing import assert_close

MAMBA_SSM = {
    "d_model": 8,
    "n_layer": 2,
    "vocab_size": 13,
    "ssm_cfg": {"d_state": 4},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def mamba_ssm_weights(seed=0):
    """A state dictionary with mamba_ssm's keys and shapes, written from its published layout, not from our code."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    D, N, rank, width = 16, 4, 1, 8
    weights = {"backbone.embedding.weight": draw(16, width), "backbone.norm_f.weight": 1 + draw(width)}
    for i in range(2):
        weights |= {
            f"backbone.layers.{i}.mixer.in_proj.weight": draw(2 * D, width),
            f"backbone.layers.{i}.mixer.conv1d.weight": draw(D, 1, 4),
            f"backbone.layers.{i}.mixer.conv1d.bias": draw(D),
            f"backbone.layers.{i}.mixer.x_proj.weight": draw(rank + 2 * N, D),
            f"backbone.layers.{i}.mixer.dt_proj.weight": draw(D, rank),
            f"backbone.layers.{i}.mixer.dt_proj.bias": draw(D),
            f"backbone.layers.{i}.mixer.A_log": draw(D, N),
            f"backbone.layers.{i}.mixer.D": draw(D),
            f"backbone.layers.{i}.mixer.out_proj.weight": draw(width, D),
            f"backbone.layers.{i}.norm.weight": 1 + draw(width),
        }
    return weights | {"lm_head.weight": weights["backbone.embedding.weight"]}


def forward_in_plain_torch(w, ids):
    """The published model, written here a second time, step by step."""
    hidden = w["backbone.embedding.weight"][ids]

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    for i in range(2):
        m = {key.split("mixer.")[1]: value for key, value in w.items() if f"layers.{i}.mixer." in key}
        x, z = (norm(hidden, w[f"backbone.layers.{i}.norm.weight"]) @ m["in_proj.weight"].T).chunk(2, -1)
        x = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), m["conv1d.weight"], m["conv1d.bias"], groups=16)
        x = F.silu(x.transpose(1, 2))
        dt, B, C = (x @ m["x_proj.weight"].T).split([1, 4, 4], -1)
        dt = F.softplus(dt @ m["dt_proj.weight"].T + m["dt_proj.bias"])
        h, outputs = torch.zeros(len(ids), 16, 4, dtype=x.dtype), []
        for t in range(ids.shape[1]):
            decay = torch.exp(dt[:, t, :, None] * -torch.exp(m["A_log"]))
            h = decay * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
            outputs.append((h * C[:, t, None, :]).sum(-1) + m["D"] * x[:, t])
        hidden = hidden + (torch.stack(outputs, 1) * F.silu(z)) @ m["out_proj.weight"].T
    return norm(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


def test_mamba_ssm_checkpoint(tmp_path):
    weights = mamba_ssm_weights()
    (tmp_path / "config.json").write_text(json.dumps(MAMBA_SSM))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = load_language_model(tmp_path)
    assert set(model.state_dict()) == set(weights)
    ids = torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(0))
    want = forward_in_plain_torch({key: value.double() for key, value in weights.items()}, ids)
    assert_close("logits", model(ids), want, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_checkpoint(tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="needs transformers, the peer")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=13, state_size=4, use_mambapy=False, tie_word_embeddings=tied
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_language_model(tmp_path)
    ids = torch.randint(13, (2, 9))
    with torch.no_grad():
        assert_close("logits", ours(ids), theirs(ids).logits, 1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx"),
        ({"rms_norm": False}, "rms_norm"),
    ],
)
def test_what_is_not_covered_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        language_model_from_config(MAMBA_SSM | change)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_language_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MAMBA_SSM))
    with pytest.raises(FileNotFoundError, match=r"safetensors"):
        load_language_model(tmp_path)


def test_a_wrong_key_is_named(tmp_path):
    weights = mamba_ssm_weights()
    weights["backbone.layers.0.mixer.A_logg"] = weights.pop("backbone.layers.0.mixer.A_log")
    (tmp_path / "config.json").write_text(json.dumps(MAMBA_SSM))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match=r"A_log\b"):
        load_language_model(tmp_path)
