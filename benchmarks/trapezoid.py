"""``trapezoidal_ssd`` (Mamba-3, one rank), bfloat16: 32 heads of 64 channels, one group, half of the states turning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import harness
import torch
from harness import BOTH, FORWARD, GRADIENT_ERROR, RESULT_ERROR, Ceilings, Contender, Work, agree, normal
from torch import Tensor

from mambakit.kernels import trapezoidal_ssd
from mambakit.kernels.testing import poisoned_memory

DTYPE, HEADS, CHANNELS = torch.bfloat16, 32, 64
LEAVES = ("x", "dt", "dA", "trap", "B", "C", "angles", "B_bias", "C_bias", "D", "z")
OF_HEADS = ("B_bias", "C_bias", "D")
SHARED = ("B", "C", "angles")
# Differences of products whose operands are rounded to the narrow dtype: what cancels leaves the rounding.
CANCELLING = ("dt", "dA", "angles")
# Steps up to which that holds for the angles' gradient, which adds up what turns q and k at every later step. Exactly,
# pairs of a q and a k that both lie behind cancel, however long the sequence is; rounded, each step leaves an error of
# its own, and the sum of L independent ones grows as the square root of L. docs/kernels_of_mixers.md has the figures.
CANCELLING_STEPS = 2048


class Shape(NamedTuple):
    """A batch of B sequences of L steps, N states a channel, a quarter as many angles."""

    name: str
    batch: int
    length: int
    d_state: int


SHAPES = (Shape("mamba3", 8, 2048, 128), Shape("mamba3_64k", 1, 65536, 128))


def inputs(shape: Shape, heads: int = HEADS, channels: int = CHANNELS) -> dict[str, Tensor]:
    """Random z, x and angles, side by side as in_proj leaves them, normed B and C; steps near a fresh Mamba-3's."""
    rows, angles = (shape.batch, shape.length), shape.d_state // 4
    width = heads * channels
    z, x, theta = normal(*rows, 2 * width + angles, dtype=DTYPE, grad=False).split([width, width, angles], dim=-1)
    dt = torch.nn.functional.softplus(torch.rand(*rows, heads, device=harness.DEVICE) - 4.0)
    given = {
        "x": x.unflatten(-1, (heads, channels)),
        "dt": dt,
        "dA": -dt * (0.5 + torch.rand(*rows, heads, device=harness.DEVICE)),
        "trap": normal(*rows, heads, dtype=DTYPE, grad=False),
        "B": normal(*rows, 1, shape.d_state, dtype=DTYPE, grad=False),
        "C": normal(*rows, 1, shape.d_state, dtype=DTYPE, grad=False),
        "angles": theta,
        "B_bias": torch.ones(heads, shape.d_state, device=harness.DEVICE),
        "C_bias": torch.ones(heads, shape.d_state, device=harness.DEVICE),
        "D": torch.ones(heads, device=harness.DEVICE),
        "z": z.unflatten(-1, (heads, channels)),
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in given.items()}


def check(name: str, given: dict[str, Tensor]) -> dict[str, float]:
    """The whole shape in poisoned memory, beside float64 on some heads of the first and last row.

    The gradient that enters is zero outside them, so that those of B, C and the angles depend on these alone; whatever
    else the kernels leave unwritten is NaN, and must be finite. PyTorch in float64 stands for the definition, a loop
    over time: the tests hold the two together.
    """
    batch, _, heads, _ = given["x"].shape
    row = torch.tensor(sorted({0, batch - 1}), device=harness.DEVICE)
    head = torch.tensor(sorted({0, heads // 2, heads - 1}), device=harness.DEVICE)

    def cut(key: str, tensor: Tensor) -> Tensor:
        if key in OF_HEADS:
            return tensor[head]
        return tensor[row] if key in SHARED else tensor[row][:, :, head]

    chosen = torch.randn_like(cut("x", given["x"].detach()))
    dout = torch.zeros(given["x"].shape, device=harness.DEVICE, dtype=DTYPE)
    for number, index in enumerate(row):
        dout[index][:, head] = chosen[number]
    with poisoned_memory():
        out = trapezoidal_ssd(**given, backend="triton")
        gradients = torch.autograd.grad(out, [given[key] for key in LEAVES], dout)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (out, *gradients)), f"{name}: not finite"
    wide = {key: cut(key, given[key].detach()).double().requires_grad_() for key in LEAVES}
    want = trapezoidal_ssd(**wide, backend="torch")
    exact = torch.autograd.grad(want, list(wide.values()), chosen.double())
    errors = {"out": agree(f"trapezoid {name}: out", cut("x", out), want, RESULT_ERROR[DTYPE])}
    for key, got, right in zip(LEAVES, gradients, exact, strict=True):
        bound = GRADIENT_ERROR[DTYPE] * (4 if key in CANCELLING else 1)
        if key == "angles":
            bound *= max(1.0, (given["x"].shape[1] / CANCELLING_STEPS) ** 0.5)
        errors[f"grad {key}"] = agree(f"trapezoid {name}: grad {key}", cut(key, got), right, bound)
    return errors


def floors(given: dict[str, Tensor], ceilings: Ceilings) -> dict[str, float]:
    """The larger of the bytes' time and the products', as of ``ssd``: x and z in, y out; x, z and dout in, dx and dz
    out. That q and k of every head pass through memory is our way of doing it, and not in the floor.
    """
    x, d_state = given["x"], given["B"].shape[3]
    forward = max(ceilings.copy_ms(3 * x.nbytes), ceilings.matmul_ms(4 * x.numel() * d_state))
    backward = max(ceilings.copy_ms(5 * x.nbytes), ceilings.matmul_ms(10 * x.numel() * d_state))
    return {FORWARD: forward, BOTH: forward + backward}


def build(shape: Shape, device: str, ceilings: Ceilings) -> Work:
    given = inputs(shape)
    return Work(
        operator="trapezoid",
        shape=shape.name,
        dtype=DTYPE,
        ours=Contender(lambda: trapezoidal_ssd(**given), [given[key] for key in LEAVES], torch.randn_like(given["x"])),
        floors=floors(given, ceilings),
        check=lambda: check(shape.name, given),
    )


def works(only: Sequence[str], device: str, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Work]]]:
    for shape in SHAPES:
        if not only or shape.name in only:
            yield shape.name, partial(build, shape, device, ceilings)
