"""Puts our vision models into timm's registry as soon as timm is there, without importing it ourselves.

timm knows a model once the function that makes it has been registered, and has no way of its own of finding other
packages. So where timm has been imported before mambakit, our models are registered with ``import mambakit``; where it
has not, a finder waits in ``sys.meta_path`` for ``import timm`` and registers them when that is done.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules that register their models with timm when they are imported. Their classes they import only where a model is
# made: importing a class may be what imports timm, and then it is not there yet when these run.
MODEL_HOMES = ("mambakit.models.vim", "mambakit.models.vision_pyramids")


def register_with_timm() -> None:
    """Register every model of ours now if timm has been imported, else when it is."""
    if "timm" in sys.modules:
        register_models()
    elif not any(isinstance(finder, AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterTimm())


def register_models() -> None:
    """Import what registers. A failure is a warning: ``import timm`` must not break because of us."""
    for home in MODEL_HOMES:
        try:
            importlib.import_module(home)
        except Exception as error:
            warnings.warn(f"mambakit: timm does not know the models of {home}: {error}", stacklevel=2)


class AfterTimm(MetaPathFinder):
    """Finds nothing by itself: lets the other finders find timm, and registers our models once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            del loader.exec_module  # the class's own again
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register_models()

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
