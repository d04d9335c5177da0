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
from mambakit.kernels.dispatch import choose

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
TIMING = {"B": 2, "L": 1024, "D": 256, "N": 16}


def run(arguments: Sequence[str]) -> None:
    """Print versions, devices, the backend of each operator on each device and why, and a short timing."""
    parser = argparse.ArgumentParser(prog="mambakit doctor", description=run.__doc__)
    parser.parse_args(arguments)
    for title, lines in (("versions", versions()), ("devices", devices()), ("backends", backends())):
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
    return sorted(name for name in kernels.__all__ if name != "use_backend" and callable(getattr(kernels, name)))


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
