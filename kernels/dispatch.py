"""Which backend serves an operator's call, and why.

Three backends exist for every operator: ``triton`` (the kernels, on a CUDA device or in Triton's interpreter),
``torch`` (vectorised PyTorch, any device) and ``reference`` (the definition, a short loop). ``auto`` takes ``triton``
where the tensors lie on a CUDA device, Triton works there and the kernel covers the call, else ``torch``. Where that
costs speed, CUDA tensors without a kernel, one warning says so. No environment variable takes part in the choice, and
:func:`choose` always says its reason.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads this variable when a kernel is defined: with it, kernels run on the CPU, slowly, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

_preferred = "auto"
_probed: dict[tuple[torch.device, torch.dtype], str | None] = {}
_warned: set[str] = set()


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


def choose(
    operator: str, backend: str, tensor: torch.Tensor, not_in_triton: str | None = None, *, warn: bool = True
) -> Choice:
    """The backend for a call of ``operator`` whose main input is ``tensor``.

    Args:
        operator: the operator's public name, for messages.
        backend: what the caller asked for, one of ``BACKENDS``.
        tensor: its device and dtype decide.
        not_in_triton: why the Triton kernel does not cover this call, or None when it does.
        warn: say once where CUDA tensors go to ``torch``; False for an operator without kernels, where no caller can
            change it.

    Raises:
        ValueError: an unknown backend, or ``triton`` asked for where it cannot serve.
    """
    _check_name(operator, backend)
    wanted = backend if backend != "auto" else _preferred
    if wanted in ("torch", "reference"):
        return Choice(wanted, "asked for")
    on_cuda = tensor.device.type == "cuda"
    machine = machine_obstacle(tensor.device, tensor.dtype)
    obstacle = machine or not_in_triton
    if wanted == "triton":
        if obstacle is not None:
            raise ValueError(f"{operator}: backend='triton' cannot serve this call: {obstacle}; use backend='auto'")
        return Choice("triton", "asked for")
    if obstacle is not None:
        if (
            on_cuda and warn
        ):  # one warning for what concerns the whole machine, one for each call an operator cannot take
            warn_once("mambakit's operators" if machine else operator, obstacle)
        return Choice("torch", obstacle)
    if on_cuda:
        return Choice("triton", "CUDA tensors, and the kernel covers the call")
    return Choice("torch", f"tensors on {tensor.device.type}; the interpreter serves only when asked for")


def machine_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can serve tensors of ``dtype`` on ``device``, whichever operator asks; None if one can."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and Triton runs on CUDA devices"
    return probe(device, dtype)


def probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton does not work on a CUDA device with tensors of ``dtype``, or None; found out once, at the first call.

    A test kernel is compiled and run (``mambakit.kernels.triton_probe``), so that no launch needs to be guarded.
    float64 is asked about as float32: no kernel computes in it, and each says so itself.
    """
    if dtype == torch.float64 or dtype.is_complex:
        dtype = torch.float32
    key = (device, dtype)
    if key not in _probed:
        if not _may_launch():
            return None
        from mambakit.kernels.triton_probe import failure

        why = failure(device, dtype)
        name = str(dtype).removeprefix("torch.")
        _probed[key] = None if why is None else f"Triton cannot run a {name} kernel on {device} ({why})"
    return _probed[key]


def _may_launch() -> bool:
    """Whether a kernel can be tried now: not beside the capture of a graph, nor where a GPU is only imagined."""
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def warn_once(who: str, obstacle: str) -> None:
    """Say once that CUDA tensors go the slow way, and what that costs."""
    message = (
        f"{who}: no Triton kernel serves here, because {obstacle}; vectorised PyTorch does instead: as exact, but much "
        "slower on a GPU, a scan most of all. backend='torch' asks for it without this warning."
    )
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=4)


# torch.compile does not trace these two but calls them while it traces, and takes what they return for a constant.
# (torch.compiler.assume_constant_result sets the same mark, and would import the whole compiler with mambakit.)
probe._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_name(operator: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{operator}: backend={backend!r} is unknown; expected one of {', '.join(BACKENDS)}")


def as_they_are(backend: str, tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Autocast off for vectorised PyTorch, where the dtypes are chosen and not autocast's to change."""
    return nullcontext() if backend == "triton" else torch.autocast(tensor.device.type, enabled=False)
