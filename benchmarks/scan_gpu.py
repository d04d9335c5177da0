"""The selective scan on one GPU: right first, then its time beside the official CUDA kernel's and the hardware's floor.

    PYTHONPATH=. python3 benchmarks/scan_gpu.py                  # every shape
    PYTHONPATH=. python3 benchmarks/scan_gpu.py --only lm char   # some of them
    PYTHONPATH=. python3 benchmarks/scan_gpu.py --json out.json

Every shape is first compared, output and all gradients, with the definition in float64 on a few channels and steps.
Times are medians of ``triton.testing.do_bench`` in milliseconds. The peer's times (mamba_ssm 2.3.2.post1, its CUDA
kernel built for sm_90) were measured on one H200 and mean little beside another GPU. The floor of the forward is its
exponentials, 16 a clock and multiprocessor: B L D (N + 4) of them, four for softplus and gate; of forward plus
backward, three times that, the backward computing each decay at least twice. ``of floor`` is floor / time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mambakit.kernels import selective_scan
from mambakit.kernels.testing import assert_close

BOOST_CLOCK = 1.98e9  # an H200's, in the clocks a second that its own driver reports under load
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


class Shape(NamedTuple):
    """A batch of B sequences of L steps of D channels, 16 states each; the peer's milliseconds where measured."""

    name: str
    dtype: torch.dtype
    batch: int
    length: int
    channels: int
    peer_forward: float | None = None
    peer_both: float | None = None


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = (
    Shape("char", BF16, 64, 256, 768),
    Shape("lm", BF16, 8, 2048, 2048, 0.592, 2.931),
    Shape("lm130m", BF16, 16, 2048, 1536, 0.874, 4.295),
    Shape("prefill", BF16, 1, 2048, 2048, 0.088, 0.456),
    Shape("long64k", BF16, 1, 65536, 1024, 1.422, 7.045),
    Shape("long1m", BF16, 1, 1048576, 256, 9.983, 35.90),
    Shape("vim_tiny", BF16, 128, 197, 384, 0.395, 1.596),
    Shape("vim_small_448", BF16, 32, 785, 768, 0.695, 2.698),
    Shape("lm-fp32", FP32, 8, 2048, 2048, 1.158, 3.842),
    Shape("vim_tiny-fp32", FP32, 128, 197, 384, 0.387, 1.595),
)
D_STATE = 16


def inputs(shape: Shape, requires_grad: bool) -> dict[str, Any]:
    """Random u, z, B, C; steps and decays as a freshly initialised Mamba has them."""
    torch.manual_seed(0)
    batch, length, channels = shape.batch, shape.length, shape.channels

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=shape.dtype)

    given = {
        "u": normal(batch, length, channels),
        "delta": torch.rand(batch, length, channels, device="cuda", dtype=shape.dtype) * 0.5,
        "A": -torch.arange(1.0, D_STATE + 1, device="cuda").repeat(channels, 1),
        "B": normal(batch, length, D_STATE),
        "C": normal(batch, length, D_STATE),
        "D": torch.ones(channels, device="cuda"),
        "z": normal(batch, length, channels),
        "delta_bias": torch.rand(channels, device="cuda") - 4.0,
    }
    return {name: tensor.requires_grad_(requires_grad) for name, tensor in given.items()} | {"delta_softplus": True}


def check(shape: Shape) -> None:
    """The Triton kernels against the definition in float64, on two rows, 300 steps and 70 channels of this shape."""
    small = shape._replace(batch=min(2, shape.batch), length=min(300, shape.length), channels=70)
    given = inputs(small, requires_grad=True)
    wide = {k: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v for k, v in given.items()}
    dout = torch.randn(small.batch, small.length, small.channels, device="cuda", dtype=shape.dtype)
    found = []
    for arguments, backend in ((given, "triton"), (wide, "reference")):
        out = selective_scan(**arguments, backend=backend)
        gradients = torch.autograd.grad(out, [arguments[name] for name in TENSORS], dout.to(out.dtype))
        found.append({"out": out} | dict(zip(TENSORS, gradients, strict=True)))
    for name, want in found[1].items():
        assert_close(f"{shape.name} {name}", found[0][name], want)


def milliseconds(function: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median"))


def measure(shape: Shape) -> dict[str, Any]:
    check(shape)
    given = inputs(shape, requires_grad=True)
    leaves = [given[name] for name in TENSORS]
    dout = torch.randn_like(given["u"])

    def forward() -> Tensor:
        with torch.no_grad():
            return selective_scan(**given)

    def both() -> None:
        torch.autograd.grad(selective_scan(**given), leaves, dout)

    # The full shape holds no surprise: finite everywhere, and its first rows are those of a call of their own.
    first = {k: v.detach()[:1, :64] if v.dim() == 3 else v for k, v in given.items() if isinstance(v, Tensor)}
    out = forward()
    assert bool(torch.isfinite(out).all()), shape.name
    alone = selective_scan(**first, delta_softplus=True, backend="reference").detach()
    assert_close(f"{shape.name} first rows", out[:1, :64], alone)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    steps = shape.batch * shape.length * shape.channels
    floor = 1e3 * steps * (D_STATE + 4) / (16 * multiprocessors * BOOST_CLOCK)
    return {
        "shape": shape.name,
        "forward": milliseconds(forward),
        "peer forward": shape.peer_forward,
        "both": milliseconds(both),
        "peer both": shape.peer_both,
        "floor": floor,
        "peak MiB": memory,
    }


def report(row: dict[str, Any]) -> str:
    def peer(key: str) -> str:
        return "     -" if row[key] is None else f"{row[key]:6.3f}"

    forward, both, floor = row["forward"], row["both"], row["floor"]
    return (
        f"{row['shape']:>14} | {forward:7.3f} {peer('peer forward')} {floor / forward:6.0%} | "
        f"{both:7.3f} {peer('peer both')} {3 * floor / both:6.0%} | {row['peak MiB']:8.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SHAPE", help=", ".join(shape.name for shape in SHAPES))
    parser.add_argument("--json", type=Path, help="also write every figure here")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {shape.name for shape in SHAPES}
    if unknown:
        parser.error(f"--only {sorted(unknown)} unknown; expected some of {[shape.name for shape in SHAPES]}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark times GPU kernels")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}; milliseconds")
    print(f"{'':>14} | {'forward':>7} {'peer':>6} {'floor':>6} | {'fwd+bwd':>7} {'peer':>6} {'floor':>6} | peak MiB")
    rows = []
    for shape in SHAPES:
        if options.only is None or shape.name in options.only:
            rows.append(measure(shape))
            print(report(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    if options.json:
        versions = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps(versions | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
