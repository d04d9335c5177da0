"""Time one training step of a Mamba language model on a CUDA device: loss, backward, fused AdamW.

    PYTHONPATH=. python3 benchmarks/train_step.py             # Mamba-1 130M, 16 x 2,048 tokens, bfloat16 autocast
    PYTHONPATH=. python3 benchmarks/train_step.py --mixer mamba2
    PYTHONPATH=. python3 benchmarks/train_step.py --profile   # and where the time goes, kernel by kernel
    PYTHONPATH=. python3 benchmarks/train_step.py --batch 1 --length 1048576 --checkpointing --backbone-only --steps 1

First two layers of the same width are compared, loss and every gradient, with the definitions in float64. Then random
weights, random tokens, one batch: times are wall-clock medians of whole steps, the device idle at the start of each.
Peak memory is PyTorch's largest allocation over a step, optimiser state included. The recorded peer is mamba_ssm
2.3.2.post1 with its CUDA kernels on one H200: 173,000 tokens/s and 33.0 GB for the first command's work, 221,000 and
33.2 for the second's.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import triton
from torch import Tensor, nn

from mambakit.backbone import Backbone, MixerName
from mambakit.kernels import use_backend
from mambakit.kernels.testing import assert_close
from mambakit.models import LanguageModel

VOCABULARY = 50_277


def measure(
    batch: int = 16,
    length: int = 2048,
    d_model: int = 768,
    n_layers: int = 24,
    mixer: MixerName = "mamba1",
    vocabulary: int = VOCABULARY,
    checkpointing: bool = False,
    backbone_only: bool = False,
    steps: int = 10,
    profile: bool = False,
) -> dict[str, Any]:
    """One configuration's ``milliseconds`` a step (median), ``tokens_per_second`` and ``peak_gb`` (10^9 bytes).

    Args:
        batch, length: sequences and tokens of each.
        d_model, n_layers, mixer, vocabulary: the model, its embedding tied to its head.
        checkpointing: recompute each layer in the backward pass.
        backbone_only: forward and backward of the backbone on random vectors: no embedding, loss or optimiser.
        steps: timed steps, after two that are not (one where only one is asked for).
        profile: also ``kernels``, [name, calls, milliseconds] of one step, the longest first, and ``cpu_ms``, how long
            Python needed to launch a step.
    """
    check(d_model, checkpointing, mixer)
    torch.manual_seed(0)
    backbone = Backbone(d_model, n_layers, mixer, gradient_checkpointing=checkpointing)
    model: nn.Module = backbone if backbone_only else LanguageModel(vocabulary, backbone)
    model = model.cuda()
    step = _backbone_step(model, batch, length, d_model) if backbone_only else _step(model, batch, length, vocabulary)

    for _ in range(2 if steps > 1 else 1):
        loss = step()
    if not torch.isfinite(loss):
        raise RuntimeError(f"train_step: the loss is {loss.item()}")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, launches = [], []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        launches.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    result = {
        "batch": batch,
        "length": length,
        "d_model": d_model,
        "n_layers": n_layers,
        "mixer": mixer,
        "checkpointing": checkpointing,
        "backbone_only": backbone_only,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "milliseconds": 1e3 * median(times),
        "milliseconds_all": [1e3 * seconds for seconds in times],
        "tokens_per_second": batch * length / median(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    if profile:
        result |= {"cpu_ms": 1e3 * median(launches), "kernels": kernel_times(step)}
    return result


def check(d_model: int, checkpointing: bool, mixer: MixerName) -> None:
    """Loss and every gradient of two layers under autocast, beside the definitions in float64."""
    torch.manual_seed(1)
    model = LanguageModel(1000, Backbone(d_model, 2, mixer, gradient_checkpointing=checkpointing)).cuda()
    exact = copy.deepcopy(model).double()
    ids, labels = torch.randint(1000, (2, 2, 130), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model.loss(ids, labels)
    loss.backward()
    with use_backend("reference"):
        want = exact.loss(ids, labels)
        want.backward()
    assert_close("loss", loss, want, 0.01)
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert_close(name, parameter.grad, other.grad, 0.03)  # a dozen roundings to 8 bits: about 0.01


def _step(model: nn.Module, batch: int, length: int, vocabulary: int) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, labels = torch.randint(vocabulary, (2, batch, length), device="cuda")

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.loss(ids, labels)  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _backbone_step(model: nn.Module, batch: int, length: int, d_model: int) -> Callable[[], Tensor]:
    x = torch.randn(batch, length, d_model, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x).sum()
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return step


def kernel_times(step: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """(name, calls, milliseconds) of every kernel of one step, the longest in all first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    found = [
        (event.key, event.count, event.self_device_time_total / 1e3)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda row: -row[2])


def report(result: dict[str, Any], rows: int = 30) -> str:
    lines = [
        f"{result['mixer']}, {result['batch']} x {result['length']} tokens, {result['parameters'] / 1e6:.0f}M: "
        f"{result['milliseconds']:.1f} ms, {result['tokens_per_second']:,.0f} tokens/s, peak {result['peak_gb']:.2f} GB"
    ]
    if "kernels" in result:
        total = sum(row[2] for row in result["kernels"])
        lines.append(f"launched in {result['cpu_ms']:.1f} ms; kernels {total:.1f} ms:")
        lines += [f"{time:8.3f} ms {calls:5d} x {name[:90]}" for name, calls, time in result["kernels"][:rows]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--n-layers", type=int, default=24)
    parser.add_argument("--mixer", choices=get_args(MixerName), default="mamba1")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer in the backward pass")
    parser.add_argument("--backbone-only", action="store_true", help="no embedding, loss or optimiser")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one step")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    options = vars(parser.parse_args())
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark times GPU kernels")
    target = options.pop("json")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    result = measure(**options)
    print(report(result))
    if target:
        versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        target.write_text(json.dumps(versions | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
