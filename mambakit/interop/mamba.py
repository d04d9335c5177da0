"""Released Mamba-1 language models: checkpoints of mamba_ssm and of Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambakit.backbone import Backbone
from mambakit.mixers.mamba1 import Mamba1
from mambakit.models.language_model import LanguageModel

# transformers' MambaConfig field -> mamba_ssm's Mamba argument.
TRANSFORMERS_SSM_FIELDS = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "time_step_rank": "dt_rank",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
}


def language_model_from_config(config: Mapping[str, Any]) -> LanguageModel:
    """An untrained model of the shape a ``config.json`` describes.

    Args:
        config: mamba_ssm's ``MambaConfig`` fields (d_model, n_layer, vocab_size, ssm_cfg, ...) or transformers'
            (hidden_size, num_hidden_layers, state_size, ...).

    Raises:
        ValueError: a configuration this backbone does not cover, with the field named.
    """
    if "d_model" in config and "n_layer" in config:
        options = dict(config.get("ssm_cfg") or {})
        if options.pop("layer", "Mamba1") != "Mamba1":
            raise ValueError(f"config: ssm_cfg names layer {config['ssm_cfg']['layer']!r}; this loader covers 'Mamba1'")
        for field in ("attn_layer_idx", "d_intermediate"):
            if config.get(field):
                raise ValueError(f"config: {field}={config[field]!r}; this loader covers pure Mamba-1 stacks")
        if not config.get("rms_norm", True):
            raise ValueError("config: rms_norm=false; this loader covers models with RMSNorm")
        multiple = config.get("pad_vocab_size_multiple", 8)
        vocab_size = round_up(config["vocab_size"], multiple)
        width, depth, tied, eps = config["d_model"], config["n_layer"], config.get("tie_embeddings", True), 1e-5
    elif config.get("model_type") == "mamba":
        options = {ours: config[theirs] for theirs, ours in TRANSFORMERS_SSM_FIELDS.items() if theirs in config}
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config: hidden_act={config['hidden_act']!r}; Mamba-1 here uses 'silu'")
        width, depth, vocab_size = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
        tied, eps = config.get("tie_word_embeddings", True), config.get("layer_norm_epsilon", 1e-5)
    else:
        raise ValueError("config: neither mamba_ssm's fields (d_model, n_layer) nor transformers' model_type 'mamba'")
    backbone = Backbone(width, depth, mixer=partial(Mamba1, **options), norm_eps=eps)
    return LanguageModel(vocab_size, backbone, tie_embeddings=tied)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def rename_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of mamba_ssm or transformers as :class:`LanguageModel` names them; mamba_ssm's are the same already."""
    return {key.replace("backbone.embeddings.", "backbone.embedding."): value for key, value in state_dict.items()}


def load_language_model(folder: str | Path) -> LanguageModel:
    """A released model from its folder: ``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``.

    Args:
        folder: as ``huggingface_hub.snapshot_download("state-spaces/mamba-130m")`` gives it.

    Raises:
        FileNotFoundError: no configuration or no weights in the folder.
        RuntimeError: keys or sizes that do not fit, each named by torch.
    """
    folder = Path(folder)
    configuration = folder / "config.json"
    if not configuration.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder of a downloaded model")
    model = language_model_from_config(json.loads(configuration.read_text()))
    if (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").is_file():
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    weights = rename_keys(weights)
    embedding = model.backbone.embedding
    if "lm_head.weight" not in weights and embedding is not None and model.lm_head.weight is embedding.weight:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]  # safetensors stores a tied matrix once
    model.load_state_dict(weights)
    return model
