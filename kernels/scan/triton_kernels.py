"""The selective scan's Triton kernels, as the operator calls them.

``triton_forward.py`` and ``triton_backward.py`` hold the scan, ``triton_update.py`` its single step, and
``triton_common.py`` what they share; read that file's head first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mambakit.kernels.scan.reference import HALF, REVERSE
from mambakit.kernels.scan.triton_backward import scan_backward, scan_backward_kernel
from mambakit.kernels.scan.triton_common import CHUNK, checkpoint_shape
from mambakit.kernels.scan.triton_forward import scan_forward, scan_forward_kernel
from mambakit.kernels.scan.triton_update import state_update, state_update_kernel

__all__ = ["checkpoint_shape", "compile_examples", "scan_backward", "scan_forward", "state_update"]


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps) of typical calls, to compile without a GPU.

    A signature gives each argument its Triton type (``*bf16``, ``i32``, ``constexpr``); an absent tensor is a
    constexpr None.
    """
    # Triton compiles an integer argument that is 1, such as B_share where B has a group for each tile, as a constant.
    everything: dict[str, Any] = {"CONSTANT_B": False, "CONSTANT_C": False, "CHUNK": CHUNK, "B_share": 1, "C_share": 1}
    plain: dict[str, Any] = {
        "CONSTANT_B": True,
        "CONSTANT_C": True,
        "CHUNK": CHUNK,
        "z": None,
        "D": None,
        "bias": None,
        "initial": None,
    }
    plain |= {"seq_idx": None, "dz": None, "dD": None, "dbias": None, "dfinal": None, "dinitial": None}
    for options, dtype, BN, warps, direction in (
        (everything, "bf16", 16, (1, 1), HALF),
        (plain, "fp32", 64, (1, 4), REVERSE),
    ):
        for kernel, BD, num_warps in zip((scan_forward_kernel, scan_backward_kernel), (32, 32), warps, strict=True):
            constants = {"N": BN, "BN": BN, "BD": BD, "STEPS": 2, "SOFTPLUS": True, "DIRECTION": direction}
            yield kernel, *_typed(kernel, dtype, constants | options), num_warps
    for options, dtype in (({}, "bf16"), ({"D": None, "z": None, "dt_bias": None, "indices": None}, "fp32")):
        constants = {"N": 16, "BN": 16, "BD": 64, "SOFTPLUS": True}
        yield state_update_kernel, *_typed(state_update_kernel, dtype, constants | options), 4


def _typed(kernel: Any, dtype: str, constants: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The signature of ``kernel`` with activations of ``dtype``, and those constants that it takes."""
    activations = {"u", "delta", "z", "B", "C", "out", "dout", "du", "ddelta", "dz", "x", "dt"}
    parameters = {"A", "D", "bias", "initial", "final", "checkpoints", "scratch", "dfinal", "dA", "dB", "dC", "dD"}
    parameters |= {"dbias", "dinitial", "state", "dt_bias"}
    types = dict.fromkeys(activations, f"*{dtype}") | dict.fromkeys(parameters, "*fp32")
    types |= {"seq_idx": "*i32", "indices": "*i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    return signature, {name: value for name, value in constants.items() if name in signature}
