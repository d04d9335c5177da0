"""mambakit: selective state space models on one backbone, for PyTorch Lightning.

The names below load on first use, so ``import mambakit`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mambakit.registry import register_with_timm

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mambakit.backbone import Backbone as Backbone
    from mambakit.models.language_model import LanguageModel as LanguageModel
    from mambakit.swap import swap_convolutions as swap_convolutions
    from mambakit.swap import swap_mixers as swap_mixers

_HOMES = {
    "Backbone": "mambakit.backbone",
    "LanguageModel": "mambakit.models.language_model",
    "swap_convolutions": "mambakit.swap",
    "swap_mixers": "mambakit.swap",
}
_ROOMS = (
    "kernels",
    "mixers",
    "embeddings",
    "heads",
    "tasks",
    "models",
    "generation",
    "interop",
    "inspect",
    "datamodules",
    "optim",
)

__all__ = ["Backbone", "LanguageModel", "__version__", "swap_convolutions", "swap_mixers"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"mambakit.{name}")
    raise AttributeError(f"module 'mambakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])


register_with_timm()
