"""Images for classification and pretraining: ``VisionDataModule`` and what it is made of.

The names load on first use, so importing this package imports neither Lightning nor torchvision nor timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambakit.datamodules.vision.augment import Augment as Augment
    from mambakit.datamodules.vision.datamodule import VisionDataModule as VisionDataModule
    from mambakit.datamodules.vision.normalization import Normalization as Normalization
    from mambakit.datamodules.vision.sources import ImageError as ImageError

_HOMES = {
    "Augment": "augment",
    "ImageError": "sources",
    "Normalization": "normalization",
    "VisionDataModule": "datamodule",
}

__all__ = ["Augment", "ImageError", "Normalization", "VisionDataModule"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
