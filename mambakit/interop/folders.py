"""A released model from the folder it was downloaded to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from mambakit.checkpoints import misfits
from mambakit.interop.configs import language_model_from_config
from mambakit.interop.keys import rename_keys
from mambakit.models.language_model import LanguageModel

INDEX = "model.safetensors.index.json"
FILES = ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin")


def load_language_model(folder: str | Path) -> LanguageModel:
    """A released model of mamba_ssm (Mamba-1, Mamba-2, with attention and MLPs) or transformers (Mamba, Mamba-2,
    Falcon-Mamba, Jamba).

    Args:
        folder: as ``huggingface_hub.snapshot_download("state-spaces/mamba-130m")`` gives it: ``config.json``, and the
            weights as ``model.safetensors`` (one, or several with their index), ``consolidated.safetensors`` or
            ``pytorch_model.bin``.

    Returns:
        The model in float32, on the CPU. Every key was used, and every parameter found.

    Raises:
        FileNotFoundError: no configuration or no weights in the folder.
        ValueError: a configuration that is not covered; keys or sizes that do not fit, with the nearest right key.
    """
    folder = Path(folder)
    configuration = folder / "config.json"
    if not configuration.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder of a downloaded model")
    model = language_model_from_config(json.loads(configuration.read_text(encoding="utf-8")))
    weights = rename_keys(_read(folder))
    embedding = model.backbone.embedding
    if "lm_head.weight" not in weights and embedding is not None and model.lm_head.weight is embedding.weight:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]  # safetensors stores a tied matrix once
    faults = misfits(weights, model.state_dict())
    if faults:
        raise ValueError(f"weights: those in {folder} do not fit its config.json: {'; '.join(faults)}")
    model.load_state_dict(weights)
    return model


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors in the folder, by their names there."""
    names = [name for name in FILES if (folder / name).is_file()][:1]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    if not names:
        raise FileNotFoundError(f"{folder} holds none of {', '.join((INDEX, *FILES))}; download the weights as well")
    weights: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(".bin"):
            weights |= torch.load(folder / name, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            weights |= load_file(folder / name)
    return weights
