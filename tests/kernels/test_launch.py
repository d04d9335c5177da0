"""Remembered launches: the same compiled form for the same arguments, Triton's own way for all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambakit.kernels import launch as launch_module
from mambakit.kernels.launch import launch


class Kernel:
    """Stands for a kernel of Triton: notes what its own launches and those of its compiled forms were given."""

    arg_names = ("x", "y", "length", "BLOCK", "FLAG")

    def __init__(self, interpreted: bool = False) -> None:
        self.slow: list[Any] = []
        self.fast: list[Any] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.slow.append((grid, arguments, constants))
            return None if self.interpreted else Form(self, len(self.slow))

        return run


class Form:
    def __init__(self, kernel: Kernel, number: int) -> None:
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.fast.append((self.number, grid[:3], arguments))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "_compiled", {})


def test_the_second_launch_takes_the_compiled_form() -> None:
    kernel, x, other = Kernel(), torch.zeros(8), torch.ones(8)
    launch(kernel, (3,), x, None, 5, FLAG=True, BLOCK=16, num_warps=4)
    assert kernel.slow == [((3,), (x, None, 5), {"FLAG": True, "BLOCK": 16, "num_warps": 4})]
    launch(kernel, (2, 7), other, None, 5, FLAG=True, BLOCK=16, num_warps=4)
    assert len(kernel.slow) == 1
    ((number, grid, arguments),) = kernel.fast
    assert (number, grid) == (1, (2, 7, 1))
    assert arguments == (other.data_ptr(), None, 5, 16, True)  # constants in the kernel's order


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(9)[1:]},
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"y": torch.zeros(8)},
        {"length": 6},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=["alignment", "dtype", "a tensor for None", "number", "constant", "option"],
)
def test_whatever_triton_compiles_for_is_told_apart(change: dict[str, Any]) -> None:
    kernel = Kernel()
    call = {"x": torch.zeros(8), "y": None, "length": 5, "BLOCK": 16, "FLAG": True, "num_warps": 4}
    for given in (call, call | change, call, call | change):
        constants = {name: given[name] for name in ("BLOCK", "FLAG", "num_warps")}
        launch(kernel, (1,), given["x"], given["y"], given["length"], **constants)
    assert len(kernel.slow) == 2
    assert [number for number, _, _ in kernel.fast] == [1, 2]


def test_kernels_are_told_apart_and_interpreted_ones_not_remembered() -> None:
    first, second, interpreted = Kernel(), Kernel(), Kernel(interpreted=True)
    for kernel in (first, second, interpreted, first, second, interpreted):
        launch(kernel, (1,), torch.zeros(8), None, 5, BLOCK=16, FLAG=True)
    assert [len(kernel.slow) for kernel in (first, second, interpreted)] == [1, 1, 2]
    assert [len(kernel.fast) for kernel in (first, second, interpreted)] == [1, 1, 0]


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "MOST_ENTRIES", 3)
    kernel = Kernel()
    for length in range(10):
        launch(kernel, (1,), torch.zeros(8), None, length, BLOCK=16, FLAG=True)
        assert len(launch_module._compiled) <= 3
