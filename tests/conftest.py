"""Settings every test shares. Without a CUDA device the Triton kernels run in Triton's interpreter, on the CPU."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

INTERPRETING = not torch.cuda.is_available()
if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of ours


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot serve here: that of 3.6 stores scalars in a way NumPy 2.4 no longer takes."""
    try:
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError as missing:
        return f"{missing.name} is not installed"
    return "Triton 3.6's interpreter needs numpy<2.4" if triton < (3, 7) and numpy >= (2, 4) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what would run a kernel in an interpreter that cannot."""
    fault = _interpreter_fault() if INTERPRETING else None
    for item in items:
        runs_kernels = "triton" in item.name or item.path.name == "test_scan_triton.py"
        if runs_kernels and item.path.name != "test_triton_compiles.py":
            item.add_marker(pytest.mark.skipif(fault is not None, reason=str(fault)))
