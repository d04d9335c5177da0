"""``causal_conv1d``, width 4 with bias and SiLU, bfloat16, on the shapes of the peer's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import harness
import peers
import torch
from harness import BOTH, FORWARD, Ceilings, Contender, Work, compare, normal
from torch import Tensor

from mambakit.kernels import causal_conv1d
from mambakit.kernels.testing import poisoned_memory

SHAPES = {"lm": (8, 2048, 2048), "long64k": (1, 65536, 1024), "vim_tiny": (128, 197, 384)}  # B, L, D
DTYPE, WIDTH = torch.bfloat16, 4


def check(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    """The whole shape in poisoned memory, beside float64 on some channels of all rows, which alone get a gradient.

    The vectorised form stands for the definition, a loop over time: the tests hold the two together.
    """
    channel = torch.tensor([0, 1, 33, x.shape[2] // 2, x.shape[2] - 66, x.shape[2] - 1], device=harness.DEVICE)
    dout = torch.zeros_like(x).detach()
    dout[..., channel] = torch.randn(*x.shape[:2], len(channel), device=harness.DEVICE, dtype=x.dtype)
    with poisoned_memory():
        y = causal_conv1d(x, weight, bias, "silu", backend="triton")
        gradients = torch.autograd.grad(y, [x, weight, bias], dout)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (y, *gradients)), f"{name}: not finite"
    wide = [x[..., channel], weight[channel], bias[channel]]
    wide = [tensor.detach().double().requires_grad_() for tensor in wide]
    want = causal_conv1d(*wide, "silu", backend="torch")
    exact = torch.autograd.grad(want, wide, dout[..., channel].double())
    dx, dweight, dbias = gradients
    got = {"out": y[..., channel], "grad x": dx[..., channel]}
    got |= {"grad weight": dweight[channel], "grad bias": dbias[channel]}
    return compare(f"causal_conv1d {name}", DTYPE, got, dict(zip(got, (want, *exact), strict=True)))


def build(name: str, device: str, ceilings: Ceilings) -> Work:
    x = normal(*SHAPES[name], dtype=DTYPE)
    weight, bias = normal(x.shape[2], WIDTH), normal(x.shape[2])
    dout = torch.randn_like(x)
    recorded = {}
    for layout, figures in zip(("(B, D, L)", "channels-last"), peers.CONV[name], strict=True):
        recorded |= peers.recorded(device, f"{peers.CUDA_CONV}, {layout}", figures)
    # Forward: x in, y out. Backward: x and dy in, dx out.
    forward, backward = ceilings.copy_ms(2 * x.nbytes), ceilings.copy_ms(3 * x.nbytes)
    return Work(
        operator="causal_conv1d",
        shape=name,
        dtype=DTYPE,
        ours=Contender(lambda: causal_conv1d(x, weight, bias, "silu"), [x, weight, bias], dout),
        floors={FORWARD: forward, BOTH: forward + backward},
        check=lambda: check(name, x, weight, bias),
        peers=peers.conv_peers(x, weight, bias, dout),
        recorded=recorded,
    )


def works(only: Sequence[str], device: str, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Work]]]:
    for name in SHAPES:
        if not only or name in only:
            yield name, partial(build, name, device, ceilings)
