"""The two operators of a decoding step, on the blocks of the 130M and the 1.4B Mamba: one token a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import harness
import torch
from harness import FORWARD, Ceilings, Contender, Work, compare, normal
from torch import Tensor

from mambakit.kernels import causal_conv1d_update, selective_state_update
from mambakit.kernels.testing import poisoned_memory

SHAPES = {"130m, B 1": (1, 1536), "130m, B 64": (64, 1536), "1.4b, B 1": (1, 4096), "1.4b, B 128": (128, 4096)}
DTYPE, D_STATE, WIDTH = torch.bfloat16, 16, 4


def state_arguments(name: str) -> dict[str, Any]:
    batch, channels = SHAPES[name]
    like = {key: normal(batch, channels, dtype=DTYPE, grad=False) for key in ("x", "dt", "z")}
    maps = {key: normal(batch, D_STATE, dtype=DTYPE, grad=False) for key in ("B", "C")}
    given = {"state": normal(batch, channels, D_STATE, grad=False), **like, **maps}
    given["A"] = -torch.arange(1.0, D_STATE + 1, device=harness.DEVICE).repeat(channels, 1)
    given["D"] = torch.ones(channels, device=harness.DEVICE)
    given["dt_bias"] = torch.rand(channels, device=harness.DEVICE) - 4.0
    return given


def conv_arguments(name: str) -> dict[str, Any]:
    batch, channels = SHAPES[name]
    return {
        "x": normal(batch, channels, dtype=DTYPE, grad=False),
        "conv_state": normal(batch, channels, WIDTH - 1, grad=False),
        "weight": normal(channels, WIDTH, grad=False),
        "bias": normal(channels, grad=False),
    }


def state_update(given: dict[str, Any], **options: Any) -> Tensor:
    return selective_state_update(**given, dt_softplus=True, **options)


def conv_update(given: dict[str, Any], **options: Any) -> Tensor:
    return causal_conv1d_update(**given, activation="silu", **options)


OPERATORS = {
    "selective_state_update": (state_arguments, state_update, "state"),
    "causal_conv1d_update": (conv_arguments, conv_update, "conv_state"),
}


def check(operator: str, name: str) -> dict[str, float]:
    """One step in poisoned memory beside float64: the output, and the state as it was left."""
    arguments, step, state = OPERATORS[operator]
    given = arguments(name)
    wide = {key: tensor.double() for key, tensor in given.items()}
    with poisoned_memory():
        out = step(given, backend="triton")
    want = step(wide, backend="reference")
    got = {"out": out, "state": given[state]}
    return compare(f"{operator} {name}", DTYPE, got, {"out": want, "state": wide[state]})


def build(operator: str, name: str, device: str, ceilings: Ceilings) -> Work:
    arguments, step, state = OPERATORS[operator]
    given = arguments(name)
    moved = sum(tensor.nbytes for tensor in given.values()) + given[state].nbytes + given["x"].nbytes
    return Work(
        operator=operator,
        shape=name,
        dtype=DTYPE,
        ours=Contender(lambda: step(given)),
        floors={FORWARD: ceilings.copy_ms(moved)},  # all arguments in, the state and the output out
        check=lambda: check(operator, name),
    )


def works(only: Sequence[str], device: str, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Work]]]:
    for operator in OPERATORS:
        for name in SHAPES:
            if not only or name in only:
                yield f"{operator} {name}", partial(build, operator, name, device, ceilings)
