"""The Triton kernels of ``ssd``, as the operator calls them.

``triton_common`` says how time is cut and what the kernels share; ``triton_states`` makes the states where segments of
time meet, ``triton_forward`` the outputs, ``triton_backward`` the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl
from torch import Tensor

from mambakit.kernels.duality.triton_backward import input_gradients_kernel, ssd_backward, vector_gradients_kernel
from mambakit.kernels.duality.triton_common import prepare_kernel
from mambakit.kernels.duality.triton_forward import ssd_forward, ssd_forward_kernel
from mambakit.kernels.duality.triton_states import join_kernel, states_kernel

__all__ = ["compile_examples", "span_count", "ssd_backward", "ssd_forward"]


def span_count(x: Tensor, chunk_size: int) -> int:
    """States that the forward keeps for the backward: none, which computes its own."""
    return 0


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps) of typical calls, to compile without a GPU.

    A signature gives each argument its Triton type (``*bf16``, ``i32``, ``constexpr``); an absent tensor is a
    constexpr None.
    """
    absent = dict.fromkeys(("z", "owners", "dz", "initial", "entering", "D", "dD", "sum_B", "sum_C"))
    shape = {"WIDTH": 512, "AHEAD": 8, "BH": 32, "STAGES": 2, "STATE": 8192, "WHOLE": False}
    narrow: dict[str, Any] = {"P": 64, "BP": 64, "Q": 64, "OPERAND": tl.bfloat16, "PRECISION": "tf32"}
    wide: dict[str, Any] = {"P": 24, "BP": 32, "Q": 32, "OPERAND": tl.float32, "PRECISION": "tf32x3"}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("bf16", narrow | {"N": 128, "BN": 128}),
        ("bf16", narrow | {"N": 64, "BN": 64} | absent),
        ("fp32", wide | {"N": 16, "BN": 16}),
    )
    kernels = (prepare_kernel, states_kernel, join_kernel, ssd_forward_kernel)
    for dtype, options in cases:
        for kernel in (*kernels, input_gradients_kernel, vector_gradients_kernel):
            keep: dict[str, Any] = {"KEEP": True, "throughs": None} if "owners" in options else {"KEEP": False}
            keep = keep if kernel is states_kernel else {}
            yield kernel, *_typed(kernel, dtype, shape | options | keep), 4


def _typed(kernel: Any, dtype: str, constants: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The signature of ``kernel`` with activations of ``dtype``, and those constants that it takes."""
    activations = {"x", "B", "C", "z", "out", "dout", "dx", "dz", "dB", "dC", "befores", "afters", "vectors"}
    wide = {"weights", "logs", "log_decays", "rows", "D", "entering", "final", "initial", "states", "throughs"}
    wide |= {"leaving", "dfinal", "dinitial", "dweights", "dlogs", "sum_B", "sum_C", "dD"}
    types = dict.fromkeys(activations, f"*{dtype}") | dict.fromkeys(wide, "*fp32") | {"owners": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    return signature, {name: value for name, value in constants.items() if name in signature}
