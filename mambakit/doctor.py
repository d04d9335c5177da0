"""What this machine has, and what would serve each operator on it."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from mambakit import kernels
from mambakit.kernels import tuning
from mambakit.kernels.dispatch import INTERPRETED, choose, machine_obstacle

PACKAGES = (
    "mambakit",
    "torch",
    "triton",
    "lightning",
    "torchvision",
    "torchaudio",
    "timm",
    "torchmetrics",
    "jsonargparse",
    "tokenizers",
    "datasets",
    "tensorboard",
)
SETTINGS = {"autotune", "use_backend"}  # what mambakit.kernels exports beside its operators
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMING = {"B": 2, "L": 1024, "D": 256, "N": 16}


def run(arguments: Sequence[str]) -> None:
    """Print versions, devices, whether Triton works, each operator's backend and why, and a short timing."""
    parser = argparse.ArgumentParser(prog="mambakit doctor", description=run.__doc__)
    parser.parse_args(arguments)
    for title, lines in (
        ("versions", versions()),
        ("devices", devices()),
        ("triton", triton_state()),
        ("backends", backends()),
    ):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines), flush=True)
    sizes = ", ".join(f"{name} {size}" for name, size in TIMING.items())
    print(f"selective_scan, forward and backward ({sizes}, float32)")
    for device in device_names():
        print(f"  {device}: {1e3 * time_scan(device):.1f} ms (median of 5)", flush=True)


def versions() -> list[str]:
    """Python and each package that plays a part, or that it is missing."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    return lines


def device_names() -> list[str]:
    """``cpu`` and every CUDA device."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def devices() -> list[str]:
    """The processor, and each GPU with its memory and compute capability."""
    lines = [f"cpu: {platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
        lines.append(f"cuda:{i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}{bf16}")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        lines.append(f"no CUDA device (this torch is {built})")
    return lines


def operators() -> list[str]:
    """Names of the public operators: the functions that ``mambakit.kernels`` exports, less its settings."""
    return sorted(name for name in kernels.__all__ if name not in SETTINGS and callable(getattr(kernels, name)))


def triton_state() -> list[str]:
    """For each GPU whether a test kernel of each dtype compiled and ran there, and what autotune() has kept for it."""
    if INTERPRETED:
        return ["TRITON_INTERPRET is set: kernels run in Triton's interpreter, on the CPU and slowly, when asked for"]
    lines = []
    for device in map(torch.device, device_names()[1:]):
        obstacles = {str(dtype).removeprefix("torch."): machine_obstacle(device, dtype) for dtype in DTYPES}
        fine = [name for name, obstacle in obstacles.items() if obstacle is None]
        if fine:
            lines.append(f"{device}: a test kernel ran in {', '.join(fine)}")
        lines += [f"{device}: no kernels: {obstacle}" for obstacle in dict.fromkeys(obstacles.values()) if obstacle]
        if fine:
            lines.append(f"{device}: {tuned(device)}")
    return lines or ["kernels need a CUDA device; here every operator is served by vectorised PyTorch"]


def tuned(device: torch.device) -> str:
    """How many configurations ``autotune()`` has kept for this GPU, this Triton and these kernels."""
    file = tuning.cache_file(device.index)
    count = len(tuning.load(file))
    return (
        f"autotune() has kept {count} configurations in {file}" if count else "each kernel's rule decides, none tuned"
    )


def backends() -> list[str]:
    """For each operator and device the backend of a plain call, and the reason."""
    lines = []
    for operator in operators():
        for device in device_names():
            choice = choose(operator, "auto", torch.empty(1, device=device))
            lines.append(f"{operator} on {device}: {choice.backend} ({choice.why})")
    return lines


def time_scan(device: str) -> float:
    """Median seconds of a selective scan's forward and backward on ``device``, after two calls to warm up."""
    draw = torch.Generator().manual_seed(0)
    batch, length, channels, states = TIMING.values()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device).requires_grad_()

    u, delta = normal(batch, length, channels), normal(batch, length, channels)
    A = (-torch.rand(channels, states, generator=draw)).to(device).requires_grad_()
    B, C = normal(batch, length, states), normal(batch, length, states)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        kernels.selective_scan(u, delta, A, B, C, delta_softplus=True).sum().backward()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])
