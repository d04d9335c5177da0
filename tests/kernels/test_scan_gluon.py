"""The Gluon scan: gradients against the definition in float64 on a GPU; that its kernels compile, anywhere.

The forward's outputs on a GPU are compared in test_scan_triton.py, which calls whichever kernels serve.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit.kernels.scan.reference import FORWARD, HALF, REVERSE, scan_reference
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

pytest.importorskip("triton")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Gluon has no interpreter: these need a GPU")

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def arguments(
    length: int,
    batch: int = 2,
    channels: int = 160,
    d_state: int = 16,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    packed: bool = False,
) -> dict[str, Any]:
    """Random arguments of the scan on the GPU, in its order; ``without`` names the ones that are None."""

    def numbers(seed: int, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return random_tensor(*shape, seed=length + seed, dtype=kind, device="cuda")

    vector = (batch, length, d_state) if groups is None else (batch, length, groups, d_state)
    row = (batch, length, channels)
    given: dict[str, Any] = {
        "u": numbers(1, *row, kind=dtype),
        "delta": numbers(2, *row, kind=dtype),
        "A": -numbers(3, channels, d_state).abs() - 0.2,
        "B": numbers(4, *vector, kind=dtype),
        "C": numbers(5, *vector, kind=dtype),
        "D": numbers(6, channels),
        "z": numbers(7, *row, kind=dtype),
        "delta_bias": numbers(8, channels) - 3,
        "initial_state": numbers(9, batch, channels, d_state),
        "seq_idx": (torch.arange(length, device="cuda") // 37).int().expand(batch, length) if packed else None,
    }
    return given | dict.fromkeys(without)


CASES: dict[str, tuple[dict[str, Any], bool, int]] = {
    **{f"length {length}": ({"length": length}, True, FORWARD) for length in (1, 2, 31, 64, 65, 197, 300)},
    "nothing optional": (
        {"length": 65, "without": ("D", "z", "delta_bias", "initial_state")}, False, FORWARD
    ),
    "packed": ({"length": 197, "packed": True}, True, FORWARD),
    "packed, reverse": ({"length": 197, "packed": True}, True, REVERSE),
    "halves": ({"length": 130, "channels": 320}, True, HALF),
    "halves in groups": ({"length": 197, "channels": 320, "groups": 2, "packed": True}, True, HALF),
    "four states": ({"length": 100, "d_state": 4}, True, FORWARD),
    "many states": ({"length": 100, "d_state": 128}, True, REVERSE),
    "bfloat16": ({"length": 300, "dtype": torch.bfloat16}, True, FORWARD),
    "float16": ({"length": 70, "dtype": torch.float16}, True, FORWARD),
}  # fmt: skip


@gpu
@pytest.mark.parametrize("segments", [None, 1])
@pytest.mark.parametrize("case", list(CASES))
def test_gradients_match_the_definition_and_repeat_to_the_bit(case: str, segments: int | None) -> None:
    from mambakit.kernels.scan.gluon_backward import scan_backward
    from mambakit.kernels.scan.gluon_launch import scan_forward

    shape, softplus, direction = CASES[case]
    given = arguments(**shape)
    if not softplus:
        given["delta"] = given["delta"].abs() * 0.1
    dout = random_tensor(*given["u"].shape, seed=10, dtype=given["u"].dtype, device="cuda")
    dfinal = random_tensor(dout.shape[0], *given["A"].shape, seed=11, device="cuda")
    wide = {
        name: value if value is None or name == "seq_idx" else value.double().requires_grad_()
        for name, value in given.items()
    }
    out, final = scan_reference(*wide.values(), softplus, direction)
    torch.autograd.backward([out, final], [dout.double(), dfinal.double()])

    _, _, checkpoints = scan_forward(*given.values(), softplus, direction)
    call = (dout, dfinal, *given.values(), checkpoints, softplus, direction, True)
    with poisoned_memory():
        *gradients, again = scan_backward(*call, segments=segments)
    repeated = scan_backward(*call, segments=segments)
    assert_close("out", again, out)
    for name, gradient, same in zip(NAMES, gradients, repeated, strict=False):
        if given[name] is None:
            assert gradient is None
        else:
            assert_close(f"d{name}", gradient, wide[name].grad)
            assert torch.equal(gradient, same), f"d{name} differs between two runs"


@pytest.mark.parametrize("groups", [(None, None), (2, None), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optional", [True, False])
def test_triton_adds_up_partial_gradients(
    groups: tuple[int | None, int | None], dtype: torch.dtype, optional: bool
) -> None:
    from mambakit.kernels.scan.triton_sums import add_partials

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiles, batch, length, d_state, channels, rows = 20, 2, 13, 8, 24, 19
    vectors = random_tensor(tiles, batch, length, 2, d_state, seed=1, dtype=dtype, device=device)
    A_parts = random_tensor(rows, channels, d_state, seed=2, device=device)
    D_parts, bias_parts = (random_tensor(rows, channels, seed=seed, device=device) for seed in (3, 4))

    with poisoned_memory():
        dB, dC = (
            torch.empty((batch, length, *(() if g is None else (g,)), d_state), dtype=dtype, device=device)
            for g in groups
        )
        dA, dD, dbias = (torch.empty(t.shape[1:], device=device) for t in (A_parts, D_parts, bias_parts))
    given = (D_parts, bias_parts) if optional else (None, None)
    add_partials(vectors, A_parts, *given, dB, dC, dA, *((dD, dbias) if optional else (None, None)))
    for name, got, parts, g in (("dB", dB, vectors[:, :, :, 0], groups[0]), ("dC", dC, vectors[:, :, :, 1], groups[1])):
        grouped = parts.double().unflatten(0, (g or 1, -1)).sum(1).permute(1, 2, 0, 3)
        assert_close(name, got, grouped.reshape(got.shape))
    assert_close("dA", dA, A_parts.double().sum(0))
    if optional:
        assert_close("dD", dD, D_parts.double().sum(0))
        assert_close("dbias", dbias, bias_parts.double().sum(0))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from mambakit.kernels.scan.gluon_backward import CONFIGS
from mambakit.kernels.scan.gluon_backward_kernel import scan_backward_kernel
from mambakit.kernels.scan.gluon_forward import scan_forward_kernel, segment_states_kernel
from mambakit.kernels.scan.gluon_launch import LONG, SEGMENTED, SHORT
from mambakit.kernels.scan.triton_kernels import SHARED_MEMORY

OPTIONAL = {"dfinal", "D", "z", "bias", "initial", "seq_idx", "dz", "out", "dD", "dbias", "dinitial"}
SEGMENTS = {"products", "ends"}
VECTORS = {"A", "D", "bias", "dfinal", "initial", "final", "checkpoints", "dA", "dBC", "dD", "dbias", "dinitial"}
POINTERS = {"dout", "u", "x", "delta", "B", "C", "V", "out", "du", "ddelta"} | OPTIONAL | SEGMENTS | VECTORS


def compile(kernel, arch, config, d_state, full, direction, required=(), **more):
    constants = dict(N=d_state, T=config.steps, CPT=config.channels, SPT=min(config.states, d_state), NW=config.warps,
                     CHUNK=64, SOFTPLUS=full, DIRECTION=direction, **more)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    absent = set() if full else OPTIONAL | SEGMENTS - set(required)
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or (name in absent and name not in required):
            signature[name], values[(i,)] = "constexpr", constants.get(name)
        elif name in POINTERS:
            wide = name in (VECTORS | SEGMENTS) - {"dBC"}
            signature[name] = "*i32" if name == "seq_idx" else "*fp32" if wide else "*bf16"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            attributes[(i,)] = [["tt.divisibility", 16]] if "_" in name else []
    source = GluonASTSource(kernel, signature, values, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": config.warps})
    assert len(binary.asm["cubin"]) > 1000
    assert binary.metadata.shared <= SHARED_MEMORY[d_state], binary.metadata.shared
    print("compiled", kernel.__name__, arch, d_state, full, direction)


for arch in (80, 90):
    for config, d_state, full, direction in (
        (LONG, 16, True, 2), (SHORT, 16, False, 1), (SEGMENTED, 16, True, 0), (SHORT, 4, True, 0), (LONG, 128, True, 1),
    ):
        compile(scan_forward_kernel, arch, config, d_state, full, direction, required=("out",))
        compile(segment_states_kernel, arch, config, d_state, full, direction, required=SEGMENTS, BACKWARD=not full)
    for d_state, full, direction in (
        (16, True, 2), (4, False, 1), (8, True, 0), (32, True, 0), (64, True, 1), (128, True, 0),
    ):
        compile(scan_backward_kernel, arch, CONFIGS[d_state], d_state, full, direction)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_ampere_and_hopper_and_fit_the_memory_they_are_served_by(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # an old result must not stand for this one
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("compiled") == 2 * (5 + 5 + 6)
