"""``ssd`` (Mamba-2), bfloat16, 32 heads of 64 channels in one group, on the shapes of the peer's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import harness
import peers
import torch
from harness import BOTH, FORWARD, Ceilings, Contender, Work, compare, normal
from torch import Tensor

from mambakit.kernels import ssd
from mambakit.kernels.testing import poisoned_memory

DTYPE, HEADS, CHANNELS = torch.bfloat16, 32, 64
LEAVES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
PEER = "mamba_ssm 2.3.2.post1, Triton (recorded)"


class Shape(NamedTuple):
    """A batch of B sequences of L steps, N states a channel; what the peer took: forward, both, MiB."""

    name: str
    batch: int
    length: int
    d_state: int
    peer: tuple[float, float, float] | None


SHAPES = (
    Shape("ssd", 8, 2048, 128, (0.428, 3.69, 302)),
    Shape("ssd64k", 1, 65536, 128, (1.393, 5.54, 1157)),
    Shape("ssd_n64", 8, 2048, 64, (0.950, 3.77, 254)),
)


def inputs(shape: Shape, heads: int = HEADS, channels: int = CHANNELS) -> dict[str, Any]:
    """Random x, B and C, side by side as a convolution leaves them; steps and decays near a fresh Mamba-2's."""
    rows = (shape.batch, shape.length)
    sizes = [heads * channels, shape.d_state, shape.d_state]
    x, B, C = normal(*rows, sum(sizes), dtype=DTYPE, grad=False).split(sizes, dim=-1)
    given = {
        "x": x.unflatten(-1, (heads, channels)),
        "dt": torch.rand(*rows, heads, device=harness.DEVICE, dtype=DTYPE) * 0.5,
        "A": -1 - 15 * torch.rand(heads, device=harness.DEVICE),
        "B": B.unsqueeze(2),
        "C": C.unsqueeze(2),
        "D": torch.ones(heads, device=harness.DEVICE),
        "dt_bias": torch.rand(heads, device=harness.DEVICE) - 4.0,
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in given.items()} | {"dt_softplus": True}


def check(name: str, given: dict[str, Any]) -> dict[str, float]:
    """The whole shape in poisoned memory, beside float64 on some heads of the first and last row.

    The gradient that enters is zero outside them, so that those of B and C depend on these alone; whatever else the
    kernels leave unwritten is NaN, and must be finite. PyTorch in float64 stands for the definition, a loop over time:
    the tests hold the two together.
    """
    batch, _, heads, _ = given["x"].shape
    row = torch.tensor(sorted({0, batch - 1}), device=harness.DEVICE)
    head = torch.tensor(sorted({0, heads // 2, heads - 1}), device=harness.DEVICE)

    def cut(key: str, tensor: Tensor) -> Tensor:
        if key in ("A", "D", "dt_bias"):
            return tensor[head]
        return tensor[row] if key in ("B", "C") else tensor[row][:, :, head]

    chosen = torch.randn_like(cut("x", given["x"].detach()))
    dout = torch.zeros(given["x"].shape, device=harness.DEVICE, dtype=DTYPE)
    for number, index in enumerate(row):
        dout[index][:, head] = chosen[number]
    with poisoned_memory():
        out = ssd(**given, backend="triton")
        gradients = torch.autograd.grad(out, [given[key] for key in LEAVES], dout)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (out, *gradients)), f"{name}: not finite"
    wide = {key: cut(key, given[key].detach()).double().requires_grad_() for key in LEAVES}
    want = ssd(**wide, dt_softplus=True, backend="torch")
    exact = torch.autograd.grad(want, list(wide.values()), chosen.double())
    got = {"out": cut("x", out)} | {f"grad {k}": cut(k, g) for k, g in zip(LEAVES, gradients, strict=True)}
    return compare(f"ssd {name}", DTYPE, got, dict(zip(got, (want, *exact), strict=True)))


def floors(given: dict[str, Any], ceilings: Ceilings) -> dict[str, float]:
    """The larger of the bytes' time and the products'. Forward: x in, y out; each step's input goes into the state and
    each output comes from it, 4 P N operations. The backward reads x and dout, writes dx, and computes the state again,
    its gradient, and the gradients of x, B and C: 10 P N.
    """
    x, d_state = given["x"], given["B"].shape[3]
    forward = max(ceilings.copy_ms(2 * x.nbytes), ceilings.matmul_ms(4 * x.numel() * d_state))
    backward = max(ceilings.copy_ms(3 * x.nbytes), ceilings.matmul_ms(10 * x.numel() * d_state))
    return {FORWARD: forward, BOTH: forward + backward}


def build(shape: Shape, device: str, ceilings: Ceilings) -> Work:
    given = inputs(shape)
    return Work(
        operator="ssd",
        shape=shape.name,
        dtype=DTYPE,
        ours=Contender(lambda: ssd(**given), [given[key] for key in LEAVES], torch.randn_like(given["x"])),
        floors=floors(given, ceilings),
        check=lambda: check(shape.name, given),
        recorded=peers.recorded(device, PEER, shape.peer),
    )


def works(only: Sequence[str], device: str, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Work]]]:
    for shape in SHAPES:
        if not only or shape.name in only:
            yield shape.name, partial(build, shape, device, ceilings)
