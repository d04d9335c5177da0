"""Checkpoints of mamba_ssm and transformers load strictly, and the outputs are theirs."""

import json

import pytest
import torch
import torch.nn.functional as F

from mambakit.interop import language_model_from_config, load_language_model, rename_keys
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


def transformers_model(kind, **options):
    """A tiny language model of transformers with every weight drawn."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, the peer")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 13}
    configs = {
        "mamba": lambda: transformers.MambaConfig(**sizes, state_size=4, use_mambapy=False, **options),
        "falcon_mamba": lambda: transformers.FalconMambaConfig(**sizes, state_size=4, mixer_rms_eps=1e-3, **options),
        "mamba2": lambda: transformers.Mamba2Config(
            **sizes, state_size=4, num_heads=8, head_dim=4, n_groups=2, chunk_size=4, layer_norm_epsilon=1e-3, **options
        ),
        "jamba": lambda: transformers.JambaConfig(
            **(sizes | {"num_hidden_layers": 4, "num_experts": 3, "rms_norm_eps": 1e-3} | options),
            **{"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 4},
        ),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or name.endswith(".D") else 0.0, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mamba", {}),
        ("mamba", {"tie_word_embeddings": False}),
        ("falcon_mamba", {}),
        ("falcon_mamba", {"expand": 16, "intermediate_size": 32}),
        ("mamba2", {}),
        ("mamba2", {"tie_word_embeddings": True, "time_step_limit": (0.01, 2.0)}),
        ("jamba", {}),
        ("jamba", {"num_experts": 1, "tie_word_embeddings": True}),
    ],
)
def test_transformers_checkpoint(tmp_path, kind, options):
    """From the folder that transformers writes: every key used, the same logits."""
    theirs = transformers_model(kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = load_language_model(tmp_path)
    ids = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(1))
    assert_close("logits", ours(ids), theirs(ids).logits, 1e-4)


@torch.no_grad()
def test_a_checkpoint_in_several_files(tmp_path):
    theirs = transformers_model("mamba2")
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.arange(13)[None]
    assert_close("logits", load_language_model(tmp_path)(ids), theirs(ids).logits, 1e-5)


def test_codestral_has_a_model_around_it(tmp_path):
    """Its names are mamba_ssm's with ``model.`` before them, in a file of its own name, beside transformers' config."""
    from safetensors.torch import save_file

    theirs = transformers_model("mamba2")
    (tmp_path / "config.json").write_text(theirs.config.to_json_string())
    names = {key: "model." + key.replace("embeddings.", "embedding.") for key in theirs.state_dict()}
    save_file({names[key]: value for key, value in theirs.state_dict().items()}, tmp_path / "consolidated.safetensors")
    assert_close("head", load_language_model(tmp_path).lm_head.weight, theirs.lm_head.weight, 1e-9)


@torch.no_grad()
def test_jamba_with_stacked_experts():
    """In memory transformers holds a layer's experts as one tensor, gate before up; on disk one by one."""
    theirs = transformers_model("jamba")
    assert any(key.endswith("experts.gate_up_proj") for key in theirs.state_dict())
    ours = language_model_from_config(theirs.config.to_dict())
    ours.load_state_dict(rename_keys(theirs.state_dict()))
    ids = torch.arange(13)[None]
    assert_close("logits", ours(ids), theirs(ids).logits, 1e-4)


HYBRID = {
    **MAMBA_SSM,
    "n_layer": 3,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4, "use_mem_eff_path": True},
    "d_intermediate": 100,
    "attn_layer_idx": [1],
    "attn_cfg": {
        **{"causal": True, "num_heads": 2, "num_heads_kv": 1, "head_dim": 6, "rotary_emb_dim": 4},
        **{"qkv_proj_bias": False, "out_proj_bias": False},
    },
}


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [0, 4])
def test_a_hybrid_of_mamba_ssm(tmp_path, d_conv):
    """Mamba-2, attention (convolved in mamba2attn-2.7b) and gated MLPs, by mamba_ssm's keys, the model written out."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {"backbone.embedding.weight": draw(16, 8), "backbone.norm_f.weight": 1 + draw(8)}
    for i in range(3):
        mixer = {"in_proj.weight": draw(24, 8), "out_proj.weight": draw(8, 12)}  # 2 + 2 * 1 heads of 6
        mixer |= {"conv1d.weight": draw(24, 1, 4), "conv1d.bias": draw(24)} if d_conv else {}
        if i != 1:
            mixer = {
                **{"in_proj.weight": draw(2 * 16 + 2 * 4 + 4, 8), "out_proj.weight": draw(8, 16)},
                **{"conv1d.weight": draw(24, 1, 4), "conv1d.bias": draw(24), "norm.weight": 1 + draw(16)},
                **{"dt_bias": draw(4), "A_log": draw(4), "D": draw(4)},
            }
        layer = {f"mixer.{key}": value for key, value in mixer.items()}
        layer |= {"norm.weight": 1 + draw(8), "norm2.weight": 1 + draw(8)}
        layer |= {"mlp.fc1.weight": draw(256, 8), "mlp.fc2.weight": draw(8, 128)}
        weights |= {f"backbone.layers.{i}.{key}": value for key, value in layer.items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    config = HYBRID | {"attn_cfg": HYBRID["attn_cfg"] | {"d_conv": d_conv}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = load_language_model(tmp_path)
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    ids = torch.randint(13, (1, 6), generator=generator)
    assert_close("logits", model(ids), hybrid_in_plain_torch(weights, ids), 1e-5)


def hybrid_in_plain_torch(w, ids):
    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def attention(m, x):
        qkv = x @ m["in_proj.weight"].T
        if "conv1d.weight" in m:
            qkv = F.conv1d(F.pad(qkv.transpose(1, 2), (3, 0)), m["conv1d.weight"], m["conv1d.bias"], groups=24)
            qkv = qkv.transpose(1, 2)
        q, k, v = qkv.unflatten(-1, (4, 6)).split([2, 1, 1], 2)
        angle = torch.arange(ids.shape[1])[:, None, None] * 10000.0 ** (-torch.arange(2) / 2)
        q, k = (
            torch.cat(
                [
                    t[..., :2] * angle.cos() - t[..., 2:4] * angle.sin(),
                    t[..., 2:4] * angle.cos() + t[..., :2] * angle.sin(),
                    t[..., 4:],
                ],
                -1,
            )
            for t in (q, k)
        )
        scores = torch.einsum("bthp,bsp->bhts", q, k[:, :, 0]) / 6**0.5
        scores = scores.masked_fill(torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -torch.inf)
        return torch.einsum("bhts,bsp->bthp", scores.softmax(-1), v[:, :, 0]).flatten(2) @ m["out_proj.weight"].T

    def mamba2(m, x):
        z, xBC, dt = (x @ m["in_proj.weight"].T).split([16, 24, 4], -1)
        xBC = F.conv1d(F.pad(xBC.transpose(1, 2), (3, 0)), m["conv1d.weight"], m["conv1d.bias"], groups=24)
        u, B, C = F.silu(xBC.transpose(1, 2)).split([16, 4, 4], -1)
        u, dt = u.unflatten(-1, (4, 4)), F.softplus(dt + m["dt_bias"])
        h, outputs = torch.zeros(1, 4, 4, 4), []
        for t in range(ids.shape[1]):
            decay = torch.exp(-dt[:, t] * m["A_log"].exp())[..., None, None]
            h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, None, None]
            outputs.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]) + m["D"][:, None] * u[:, t])
        y = torch.stack(outputs, 1).flatten(2) * F.silu(z)
        return norm(y, m["norm.weight"]) @ m["out_proj.weight"].T

    hidden = w["backbone.embedding.weight"][ids]
    for i in range(3):
        layer = {key.split(f"layers.{i}.")[1]: value for key, value in w.items() if f"layers.{i}." in key}
        m = {key.removeprefix("mixer."): value for key, value in layer.items() if key.startswith("mixer.")}
        hidden = hidden + (attention if i == 1 else mamba2)(m, norm(hidden, layer["norm.weight"]))
        up, gate = (norm(hidden, layer["norm2.weight"]) @ layer["mlp.fc1.weight"].T).chunk(2, -1)
        hidden = hidden + (up * F.silu(gate)) @ layer["mlp.fc2.weight"].T
    return norm(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


JAMBA = {"model_type": "jamba", "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8, "vocab_size": 13}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MAMBA_SSM | {"ssm_cfg": {"layer": "Mamba4"}}, "'Mamba4', expected 'Mamba1'"),
        (MAMBA_SSM | {"ssm_cfg": {"d_stat": 3}}, "ssm_cfg has d_stat"),
        (MAMBA_SSM | {"rms_norm": False}, "rms_norm=False; only True"),
        (HYBRID | {"attn_cfg": HYBRID["attn_cfg"] | {"mlp_dim": 8}}, "attn_cfg has mlp_dim=8; only 0"),
        (HYBRID | {"attn_cfg": {"num_heads": 2}}, "causal=False; only True"),
        (HYBRID | {"attn_cfg": HYBRID["attn_cfg"] | {"out_proj_bias": True}}, "qkv_proj_bias and out_proj_bias"),
        (JAMBA | {"num_attention_heads": 2, "expert_layer_offset": 0}, "expert_layer_offset=0.*= 1"),
        (JAMBA | {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ({"model_type": "mamba", "hidden_size": 8, "intermediate_size": 12}, "intermediate_size=12.*hidden_size=8"),
        ({"model_type": "llama"}, "model_type='llama', expected.*jamba"),
    ],
)
def test_what_is_not_covered_is_named(config, words):
    with pytest.raises(ValueError, match=words):
        language_model_from_config(config)


def test_an_expert_that_is_missing():
    name = "model.layers.1.feed_forward.experts.{}.{}_proj.weight"
    weights = {name.format(n, part): torch.zeros(2, 2) for n in range(2) for part in ("up", "gate", "down")}
    del weights[name.format(0, "gate")]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts lacks 0\.gate_proj"):
        rename_keys(weights)


def test_queries_without_keys_are_left_to_strict_loading():
    """Half a matrix is no matrix: the key stays, so that loading names it."""
    assert list(rename_keys({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})) == [
        "backbone.layers.0.self_attn.q_proj.weight"
    ]


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
    with pytest.raises(ValueError, match=r"lacks: .*mixer\.A_log \(nearest: .*mixer\.A_logg\)"):
        load_language_model(tmp_path)
