"""Reads checkpoints with plain words for what is wrong with one.

A checkpoint written by ``mambakit fit`` holds the model's configuration and the tokenizer beside the weights, so that
nothing else is needed to build the model again.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mambakit.datamodules.text import Tokenizer
    from mambakit.models import LanguageModel


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint's dictionary, its tensors on the CPU. Only plain data is unpickled, never code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}; a fit writes RUN/checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle at all end in any error, IndexError too
        raise ValueError(
            f"checkpoint: {path} is not a checkpoint, or one cut short; give a .ckpt file that 'mambakit fit' wrote"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"checkpoint: {path} holds no state_dict; give a .ckpt file that 'mambakit fit' wrote")
    return checkpoint


def check_fits(checkpoint: dict[str, Any], model: nn.Module, path: str | Path) -> None:
    """Raise ValueError, naming keys and sizes, unless the checkpoint's weights are those of ``model``."""
    faults = misfits(checkpoint["state_dict"], model.state_dict())
    if faults:
        raise ValueError(
            f"checkpoint: {path} is of another model: {'; '.join(faults)}; use the config.yaml that lies beside its run"
        )


def misfits(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``saved`` from being loaded strictly as ``wanted``: sizes and keys, the nearest beside each."""
    different = [
        f"{key} is {tuple(saved[key].shape)} in the file, {tuple(wanted[key].shape)} in the model"
        for key in wanted
        if key in saved and saved[key].shape != wanted[key].shape
    ]
    extra = [key for key in saved if key not in wanted]
    missing = [_beside(key, extra) for key in wanted if key not in saved]
    return [
        *_listed("differing sizes", different),
        *_listed("the file lacks", missing),
        *_listed("the model lacks", extra),
    ]


def load_language_model(path: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """The language model and tokenizer of a checkpoint that ``mambakit fit`` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, or one that holds no language model or no tokenizer.
    """
    from lightning.pytorch.cli import instantiate_module

    from mambakit.datamodules.text import tokenizer_from_state
    from mambakit.tasks import CausalLM

    checkpoint = read_checkpoint(path)
    settings = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if key[0] != "_"}
    if not {"vocab_size", "backbone"} <= settings.keys():
        kind = checkpoint.get("hyper_parameters", {}).get("_class_path", "a task without its configuration")
        raise ValueError(
            f"checkpoint: {path} holds {kind}, and generating needs a mambakit.tasks.CausalLM trained by 'mambakit fit'"
        )
    tokenizer = next(
        (value["tokenizer"] for value in checkpoint.values() if isinstance(value, dict) and "tokenizer" in value), None
    )
    if tokenizer is None:
        raise ValueError(f"checkpoint: {path} holds no tokenizer; train with mambakit.datamodules.text.TextDataModule")
    task = instantiate_module(CausalLM, settings)
    check_fits(checkpoint, task, path)
    task.load_state_dict(checkpoint["state_dict"])
    return task.model.eval(), tokenizer_from_state(tokenizer)


def _beside(key: str, extra: list[str]) -> str:
    close = difflib.get_close_matches(key, extra, n=1, cutoff=0.8)
    return f"{key} (nearest: {close[0]})" if close else key


def _listed(title: str, items: list[str], limit: int = 3) -> list[str]:
    """``["title: a, b, c and 4 more"]``, or nothing for no items."""
    if not items:
        return []
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return [f"{title}: {', '.join(items[:limit])}{more}"]
