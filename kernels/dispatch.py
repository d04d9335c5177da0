"""Which backend serves an operator's call, and why.

Three backends exist for every operator: ``triton`` (the kernels, on a CUDA device or in Triton's interpreter),
``torch`` (vectorised PyTorch, any device) and ``reference`` (the definition, a short loop). ``auto`` takes ``triton``
where the tensors lie on a CUDA device and the kernel covers the call, else ``torch``. No environment variable takes
part in the choice, and :func:`choose` always says its reason.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads this variable when a kernel is defined: with it, kernels run on the CPU, slowly, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

_preferred = "auto"


class Choice(NamedTuple):
    """A backend's name and the reason it was taken."""

    backend: str
    why: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every operator called inside with ``backend="auto"`` uses ``name`` instead.

    >>> with use_backend("reference"):
    ...     y = selective_scan(u, delta, A, B, C)
    """
    global _preferred
    _check_name("use_backend", name)
    before, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = before


def choose(operator: str, backend: str, tensor: torch.Tensor, not_in_triton: str | None = None) -> Choice:
    """The backend for a call of ``operator`` whose main input is ``tensor``.

    Args:
        operator: the operator's public name, for messages.
        backend: what the caller asked for, one of ``BACKENDS``.
        tensor: its device decides.
        not_in_triton: why the Triton kernel does not cover this call, or None when it does.

    Raises:
        ValueError: an unknown backend, or ``triton`` asked for where it cannot serve.
    """
    _check_name(operator, backend)
    wanted = backend if backend != "auto" else _preferred
    if wanted in ("torch", "reference"):
        return Choice(wanted, "asked for")
    obstacle = _obstacle(tensor, not_in_triton)
    if wanted == "triton":
        if obstacle is not None:
            raise ValueError(f"{operator}: backend='triton' cannot serve this call: {obstacle}; use backend='auto'")
        return Choice("triton", "asked for")
    if obstacle is None and tensor.device.type == "cuda":
        return Choice("triton", "CUDA tensors, and the kernel covers the call")
    return Choice("torch", obstacle or f"tensors on {tensor.device.type}; the interpreter serves only when asked for")


def _obstacle(tensor: torch.Tensor, not_in_triton: str | None) -> str | None:
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if tensor.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {tensor.device.type}, and Triton runs on CUDA devices"
    return not_in_triton


def _check_name(operator: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{operator}: backend={backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
