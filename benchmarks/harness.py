"""How every operator of this folder is checked and timed: one ``Work`` at a time, ours beside its peers.

Times are medians of ``triton.testing.do_bench``, in milliseconds, which clears the L2 cache before every call and
counts what Python and autograd need for a launch where that is longer. A call shorter than ``SHORT`` is also timed as
the replay of a CUDA graph of many calls: the kernels' time alone, and with a cache that stays warm. Memory is PyTorch's
largest allocation during one forward and backward, less what was allocated before, in MiB: results, gradients, and all
between.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

FORWARD, BOTH = "forward", "forward + backward"
DEVICE = "cuda"  # the tests make it "cpu"
SHORT = 2.0  # milliseconds
# The largest relative RMS error against float64 that a result, and a gradient, may have.
RESULT_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
GRADIENT_ERROR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1e-2}
PACKAGES = ("torch", "triton", "mamba_ssm", "causal_conv1d", "fla-core", "mambapy")


@dataclass
class Contender:
    """One system's way of doing a piece of work.

    ``call`` gives one result or several, ``dout`` their gradients; ``leaves`` are what gradients are taken to (none:
    there is only a forward).
    """

    call: Callable[[], Any]
    leaves: Sequence[Tensor] = ()
    dout: Any = None
    channels_first: bool = False  # of the result, which is turned before it is compared

    def forward(self) -> Any:
        with torch.no_grad():
            return self.call()

    def result(self) -> Tensor:
        """The first result, channels last."""
        found = self.forward()
        found = found[0] if isinstance(found, tuple) else found
        return found.transpose(1, 2) if self.channels_first else found

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.call(), self.leaves, self.dout)


@dataclass
class Work:
    """An operator at one shape, ready to run.

    Attributes:
        operator, shape, dtype: its names in the table.
        ours: mambakit's public function.
        floors: milliseconds of each pass that no kernel on this GPU goes below.
        check: raises AssertionError unless our results are right; returns their relative RMS errors by name.
        peers: other systems that are installed, on the same numbers.
        recorded: milliseconds of each pass, and "MiB", of a system measured on another day, by its name.
        tolerance: the largest relative RMS difference between a peer's result and ours.
    """

    operator: str
    shape: str
    dtype: torch.dtype
    ours: Contender
    floors: dict[str, float]
    check: Callable[[], dict[str, float]]
    peers: dict[str, Contender] = field(default_factory=dict)
    recorded: dict[str, dict[str, float]] = field(default_factory=dict)
    tolerance: float = 2e-2


def measure(work: Work) -> dict[str, Any]:
    """Check ``work``, then time it and its peers. The keys are those of the JSON.

    ``first_call`` is in seconds: what a user waits for on a new shape, compilation included unless it is on the disk.
    """
    start = time.perf_counter()
    work.ours.both() if work.ours.leaves else work.ours.forward()
    torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    errors = work.check()
    row: dict[str, Any] = {
        "operator": work.operator,
        "shape": work.shape,
        "dtype": str(work.dtype).removeprefix("torch."),
        "first_call": first_call,
        "errors": errors,
        "floor": work.floors,
        "recorded": work.recorded,
        "mambakit": time_passes(work.ours),
        "peers": {},
    }
    for name, peer in work.peers.items():
        agree(f"{work.operator} {work.shape}: {name}", peer.result(), work.ours.result(), work.tolerance)
        row["peers"][name] = time_passes(peer)
    return row


def time_passes(contender: Contender) -> dict[str, float]:
    """Milliseconds of each pass, of its graph's replay where it is short, and the memory of forward and backward."""
    passes: dict[str, Callable[[], Any]] = {FORWARD: contender.forward}
    if contender.leaves:
        passes[BOTH] = contender.both
    found = {}
    for name, function in passes.items():
        found[name] = milliseconds(function)
        if found[name] < SHORT:
            try:
                found[f"{name}, graph"] = graph_milliseconds(function)
            except RuntimeError:  # something in it waits for the GPU, which a capture forbids: no figure then
                torch.cuda.synchronize()
    found["MiB"] = peak_mib(passes.get(BOTH, contender.forward))
    return found


def milliseconds(function: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(function, warmup=25, rep=150, return_mode="median"))


def graph_milliseconds(function: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median"))


def one_call(function: Callable[[], Any]) -> float:
    """Milliseconds of one call after another, by the host's clock: for what takes too long to repeat."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def peak_mib(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative_rms(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in float64; NaN where ``got`` holds one."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))


def agree(name: str, got: Tensor, want: Tensor, tolerance: float) -> float:
    """The relative RMS difference, which is finite and at most ``tolerance``, or AssertionError."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = relative_rms(got, want)
    assert error <= tolerance, f"{name}: relative RMS difference {error:.3g}, at most {tolerance:.3g} allowed"
    return error


def compare(name: str, dtype: torch.dtype, got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS errors by name, each within its bound; a name that begins with "grad " is a gradient's."""
    bounds = {key: (GRADIENT_ERROR if key.startswith("grad ") else RESULT_ERROR)[dtype] for key in want}
    return {key: agree(f"{name}: {key}", got[key], want[key], bounds[key]) for key in want}


@dataclass
class Ceilings:
    """What this GPU reaches, measured: bytes a second of a copy (read plus write), bfloat16 FLOP a second of a matrix
    product; and its exponentials a second, 16 a clock and multiprocessor at the clock that its driver reports.
    """

    bytes: float
    flops: float
    exponentials: float

    def copy_ms(self, count: float) -> float:
        return 1e3 * count / self.bytes

    def matmul_ms(self, count: float) -> float:
        return 1e3 * count / self.flops

    def exponentials_ms(self, count: float) -> float:
        return 1e3 * count / self.exponentials


def measure_ceilings() -> Ceilings:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / (1e-3 * milliseconds(lambda: target.copy_(source)))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = 2 * 8192**3 / (1e-3 * milliseconds(lambda: a @ b))
    gpu = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(gpu, "clock_rate", 1_980_000)  # kHz; the default is an H200's
    return Ceilings(copied, multiplied, 16 * gpu.multi_processor_count * clock)


def describe_machine(seed: int, commit: str | None) -> dict[str, Any]:
    """What a figure means nothing without. ``commit`` stands in where the tree is no git checkout."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(),
        "versions": versions | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "commit": commit or git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "clock": f"triton do_bench, median, L2 cleared; under {SHORT} ms also CUDA-graph replay, L2 warm",
    }


def git_commit() -> str:
    root = Path(__file__).resolve().parents[1]
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "mambakit", "kernels"])
    answers = []
    for arguments in commands:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False, env=os.environ
        )
        answers.append(done.stdout.strip())
    return (answers[0] or "unknown") + (" with changes" if answers[1] else "")


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Standard normal numbers on the GPU, from the seed that ``run.py`` sets afresh."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_(grad)
