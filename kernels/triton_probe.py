"""Whether Triton works on a device: one tiny kernel, compiled for it, run on it, and its answer looked at.

This catches what no version number tells: a device too old or too new for this Triton, no C compiler for the launcher
that Triton builds at first use, a broken CUDA installation. :mod:`mambakit.kernels.dispatch` asks once a device and
dtype.
"""

from __future__ import annotations

from threading import Thread

import torch
import triton
import triton.language as tl

SIZE = 32


@triton.jit
def halve_exponent(x, out, SIZE: tl.constexpr):
    """out = 2 ** (x / 2): a load, a conversion, float32 arithmetic with an exponential, a store."""
    place = tl.arange(0, SIZE)
    value = tl.exp2(tl.load(x + place).to(tl.float32) * 0.5)
    tl.store(out + place, value.to(out.dtype.element_ty))


def failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """What kept the kernel from running on ``device`` with tensors of ``dtype``, in one line; None when it ran.

    It runs in a thread of its own, because what may surround the caller (fake tensors while torch.compile traces, a
    default device, inference mode, a stream) belongs to the caller's thread.
    """
    found: list[str | None] = []
    thread = Thread(target=lambda: found.append(_failure(device, dtype)), name="mambakit-triton-probe")
    thread.start()
    thread.join()
    return found[0]


def _failure(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        with torch.cuda.device(device):
            x = torch.full((SIZE,), 4.0, device=device, dtype=dtype)
            out = torch.zeros_like(x)
            halve_exponent[(1,)](x, out, SIZE=SIZE, num_warps=1)
            right = bool((out == 4).all())
    except Exception as error:  # whatever a compiler, an assembler, a linker or a driver may raise
        message = " ".join(str(error).split())
        return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__
    return None if right else "a test kernel gave a wrong result"
