"""The selective scan's Triton kernels, as the operator calls them.

The scan exists twice. The Gluon kernels (``gluon_forward.py``, ``gluon_backward.py``; read the head of
``gluon_common.py`` first) say which thread holds what, and serve nearly every call on an NVIDIA GPU. The plain ones
(``triton_forward.py``, ``triton_backward.py``; head of ``triton_common.py``) serve the rest: B or C constant in time,
numbers of states that are no power of two, other devices, and Triton's interpreter, which has no Gluon.
``triton_update.py`` holds the single step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from mambakit.kernels import dispatch
from mambakit.kernels.scan import triton_backward, triton_forward
from mambakit.kernels.scan.reference import HALF, REVERSE
from mambakit.kernels.scan.triton_backward import scan_backward_kernel
from mambakit.kernels.scan.triton_common import CHUNK, checkpoint_shape
from mambakit.kernels.scan.triton_forward import scan_forward_kernel
from mambakit.kernels.scan.triton_update import state_update, state_update_kernel

__all__ = ["checkpoint_shape", "compile_examples", "scan_backward", "scan_forward", "state_update"]


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.scan.triton_forward.scan_forward`."""
    if in_gluon(u, A, B, C):
        from mambakit.kernels.scan import gluon_launch

        return gluon_launch.scan_forward(u, delta, A, B, C, *rest, **options)
    return triton_forward.scan_forward(u, delta, A, B, C, *rest, **options)


def scan_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """As :func:`mambakit.kernels.scan.triton_backward.scan_backward`, from the states of the same path's forward."""
    arguments = (dout, dfinal_state, u, delta, A, B, C, *rest)
    if in_gluon(u, A, B, C):
        from mambakit.kernels.scan import gluon_backward

        return gluon_backward.scan_backward(*arguments, **options)
    return triton_backward.scan_backward(*arguments, **options)


# Bytes of shared memory that the Gluon backward takes at most, by the state sizes it serves.
SHARED_MEMORY = {4: 101376, 8: 121344, 16: 86528, 32: 139520, 64: 112128, 128: 203264}


def in_gluon(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the Gluon kernels take the call: B and C vary in time, and an NVIDIA GPU has room for N states."""
    needed = SHARED_MEMORY.get(A.shape[1])
    if needed is None or B.dim() == 2 or C.dim() == 2 or dispatch.INTERPRETED or torch.version.hip is not None:
        return False
    return u.is_cuda and needed <= _shared_memory(u.device)


@cache
def _shared_memory(device: torch.device) -> int:
    """What a program may take at most, as Triton's own launcher sees it."""
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


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
