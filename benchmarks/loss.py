"""``linear_cross_entropy`` on the tokens of a training step: bfloat16 vectors, float32 weights, as under autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import harness
import peers
import torch
from harness import BOTH, FORWARD, Ceilings, Contender, Work, compare, normal
from torch import Tensor

from mambakit.kernels import linear_cross_entropy
from mambakit.kernels.testing import poisoned_memory

SHAPES = {"lm130m": (32768, 768, 50277)}  # tokens, channels, vocabulary
DTYPE = torch.bfloat16
CHECKED = 256  # tokens


def check(name: str, hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """All tokens but ``CHECKED`` are ignored, so that loss and gradients hang on these alone, then taken in float64."""
    tokens = torch.randperm(hidden.shape[0], device=harness.DEVICE)[:CHECKED]
    labels = torch.full((hidden.shape[0],), -100, device=harness.DEVICE)
    labels[tokens] = torch.randint(weight.shape[0], (CHECKED,), device=harness.DEVICE)
    with poisoned_memory():
        loss = linear_cross_entropy(hidden, weight, labels, backend="triton")
        dhidden, dweight = torch.autograd.grad(loss, [hidden, weight])
    assert bool(torch.isfinite(dhidden).all()), f"{name}: not finite"
    # As the operator says, the products are taken in hidden's dtype: so the weight is rounded to it here, too.
    wide = [hidden.detach()[tokens].double(), weight.detach().to(DTYPE).double()]
    wide = [tensor.requires_grad_() for tensor in wide]
    want = linear_cross_entropy(*wide, labels[tokens], backend="reference")
    exact = torch.autograd.grad(want, wide)
    got = {"out": loss, "grad hidden": dhidden[tokens], "grad weight": dweight}
    return compare(f"linear_cross_entropy {name}", DTYPE, got, dict(zip(got, (want, *exact), strict=True)))


def build(name: str, device: str, ceilings: Ceilings) -> Work:
    tokens, channels, vocabulary = SHAPES[name]
    hidden = normal(tokens, channels, dtype=DTYPE)
    weight = (torch.randn(vocabulary, channels, device=harness.DEVICE) * channels**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=harness.DEVICE)
    dout = torch.ones((), device=harness.DEVICE)
    product = ceilings.matmul_ms(2 * tokens * channels * vocabulary)
    return Work(
        operator="linear_cross_entropy",
        shape=name,
        dtype=DTYPE,
        ours=Contender(lambda: linear_cross_entropy(hidden, weight, labels), [hidden, weight], dout),
        floors={FORWARD: product, BOTH: 3 * product},
        check=lambda: check(name, hidden, weight),
        peers=peers.loss_peers(hidden, weight, labels, dout),
    )


def works(only: Sequence[str], device: str, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Work]]]:
    for name in SHAPES:
        if not only or name in only:
            yield name, partial(build, name, device, ceilings)
