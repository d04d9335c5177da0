"""``rms_norm`` with its residual addition: bfloat16 activations, a float32 residual stream, as a backbone calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import peers
import torch
from harness import BOTH, FORWARD, Ceilings, Contender, Work, compare, normal
from torch import Tensor

from mambakit.kernels import rms_norm
from mambakit.kernels.testing import poisoned_memory

SHAPES = {"lm130m": (32768, 768), "lm": (16384, 1024), "vision": (131072, 192)}  # tokens, channels
DTYPE = torch.bfloat16


def check(name: str, x: Tensor, residual: Tensor, weight: Tensor) -> dict[str, float]:
    """The whole shape in poisoned memory, beside the definition in float64."""
    dy, dsummed = torch.randn_like(x), torch.randn_like(residual)
    found = []
    for backend in ("triton", "reference"):
        leaves = [x, residual, weight]
        if backend == "reference":
            leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
        with poisoned_memory():
            y, summed = rms_norm(
                leaves[0], leaves[2], residual=leaves[1], prenorm=True, residual_in_fp32=True, backend=backend
            )
            gradients = torch.autograd.grad([y, summed], leaves, [dy.to(y.dtype), dsummed.to(summed.dtype)])
        names = ("out", "sum", "grad x", "grad residual", "grad weight")
        found.append(dict(zip(names, (y, summed, *gradients), strict=True)))
    return compare(f"rms_norm {name}", DTYPE, *found)


def build(name: str, device: str, ceilings: Ceilings) -> Work:
    x = normal(*SHAPES[name], dtype=DTYPE)
    residual, weight = normal(*SHAPES[name]), normal(x.shape[1])
    douts = torch.randn_like(x), torch.randn_like(residual)
    # Forward: x and residual in, y and the sum out. Backward: dy, the sum and its gradient in, dx and dresidual out.
    forward = ceilings.copy_ms(2 * (x.nbytes + residual.nbytes))
    backward = ceilings.copy_ms(2 * x.nbytes + 3 * residual.nbytes)
    return Work(
        operator="rms_norm",
        shape=name,
        dtype=DTYPE,
        ours=Contender(
            lambda: rms_norm(x, weight, residual=residual, prenorm=True, residual_in_fp32=True),
            [x, residual, weight],
            douts,
        ),
        floors={FORWARD: forward, BOTH: forward + backward},
        check=lambda: check(name, x, residual, weight),
        peers=peers.norm_peers(x, residual, weight, douts),
    )


def works(only: Sequence[str], device: str, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Work]]]:
    for name in SHAPES:
        if not only or name in only:
            yield name, partial(build, name, device, ceilings)
