"""Random inputs of ``trapezoidal_ssd``, and all its outputs and gradients, for tests."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.testing import random_tensor
from mambakit.kernels.trapezoid.op import trapezoidal_ssd
from mambakit.kernels.trapezoid.reference import TrapezoidalState


def arguments(
    length: int = 21,
    groups: int = 2,
    ranks: int = 0,
    angles: int = 2,
    optional: bool = True,
    packed: bool = False,
    padded: bool = False,
    batch: int = 2,
    heads: int = 4,
    channels: int = 3,
    d_state: int = 6,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Random keyword arguments of ``trapezoidal_ssd``, the same at every call; ``ranks`` 0 is without ``mimo_x``."""
    seeds = count()
    rank = (ranks,) if ranks else ()

    def random(*shape: int) -> Tensor:
        return random_tensor(*shape, seed=next(seeds), dtype=dtype, device=device)

    given: dict[str, Any] = {"x": random(batch, length, heads, channels), "dt": random(batch, length, heads).exp()}
    given |= {"dA": -random(batch, length, heads).exp(), "trap": random(batch, length, heads)}
    given |= {"B": random(batch, length, *rank, groups, d_state), "C": random(batch, length, *rank, groups, d_state)}
    given["angles"] = random(batch, length, angles)
    if optional:
        given |= {"B_bias": random(heads, *rank, d_state), "C_bias": random(heads, *rank, d_state), "D": random(heads)}
        given["z"] = random(batch, length, *rank, heads, channels)
        given["initial_state"] = TrapezoidalState(
            angle=random(batch, heads, angles),
            ssm=random(batch, heads, channels, d_state),
            k=random(batch, *rank, heads, d_state),
            v=random(batch, heads, channels),
        )
    if ranks:
        given["mimo_x"] = random(heads, ranks, channels)
    if packed:
        begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(7)) < 0.2
        given["seq_idx"] = (begins.cumsum(1) % 2).to(device, torch.int32)  # a number may come again
    if padded:
        given["lengths"] = torch.tensor([length - 2, 0], device=device)
        given.pop("seq_idx", None)
    return given | {"chunk_size": 8, "return_final_state": True} | options


def run(given: dict[str, Any], autocast: bool = False, **changed: Any) -> dict[str, Tensor]:
    """Output, final state and the gradient of every tensor, of a loss that weighs each number differently."""

    def leaf(value: Any) -> Any:
        if isinstance(value, TrapezoidalState):
            return TrapezoidalState(*map(leaf, value))
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if floats else value

    given = {name: leaf(value) for name, value in {**given, **changed}.items()}
    with torch.autocast(given["x"].device.type, dtype=torch.bfloat16, enabled=autocast):
        out, final = trapezoidal_ssd(**given)
    if given.get("lengths") is not None:  # outputs behind a row's length may be anything
        out = out[:1, : given["lengths"][0]]
    loss = sum(
        (t * random_tensor(*t.shape, seed=100 + i, dtype=t.dtype, device=t.device.type)).sum()
        for i, t in enumerate((out, *final))
    )
    leaves = {name: t for name, t in given.items() if isinstance(t, Tensor) and t.requires_grad}
    if given.get("initial_state") is not None:
        leaves |= {f"initial {name}": t for name, t in given["initial_state"]._asdict().items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, **final._asdict(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}
