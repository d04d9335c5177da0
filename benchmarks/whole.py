"""Whole models: a training step, generation, and a million tokens through a backbone, beside recorded figures.

The work and its checks are those of ``train_step.py`` and ``generate.py``; this makes rows of one kind of them. The
recorded peer is mamba_ssm 2.3.2.post1 with its CUDA kernels on one NVIDIA H200.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import generate
import train_step

from mambakit.backbone import MixerName

# Tokens a second and gigabytes.
TRAINING_PEERS: dict[MixerName, tuple[int, float]] = {"mamba1": (173_000, 33.0), "mamba2": (221_000, 33.2)}


def train(mixer: MixerName) -> dict[str, Any]:
    tokens_per_second, gigabytes = TRAINING_PEERS[mixer]
    name = "130m" if mixer == "mamba1" else f"{mixer} 130m"
    found = train_step.measure(mixer=mixer)
    peer = {"peer_tokens_per_second": tokens_per_second, "peer_peak_gb": gigabytes}
    return {"work": f"train {name}, B 16, L 2048"} | found | peer


def million() -> dict[str, Any]:
    """Forward and backward, each layer computed again in the backward."""
    found = train_step.measure(batch=1, length=1 << 20, checkpointing=True, backbone_only=True, steps=1)
    return {"work": "forward, backward 130m, L 1,048,576"} | found


def generation(name: str) -> dict[str, Any]:
    work, found = generate.WORKS[name], generate.measure(name)
    title = f"generate {name.rpartition('_')[0].replace('_', ' ')}, B {work.batch}, prompt {work.prompt}"
    return found | {"work": title, "peak_gb": found["peak_bytes"] / 1e9}


PARTS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "train": {"130m": partial(train, "mamba1"), "mamba2_130m": partial(train, "mamba2")},
    "generate": {name: partial(generation, name) for name in generate.WORKS},
    "million": {"130m": million},
}


def line(row: dict[str, Any], device: str) -> str:
    text = f"{row['work']:>46}   {row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_gb']:.2f} GB"
    peer = row.get("peer_tokens_per_second")
    if peer and "H200" in device:
        text += f"; mamba_ssm (recorded) {peer:,} tokens/s: {row['tokens_per_second'] / peer:.2f}x"
        text += f", {row['peer_peak_gb']:.1f} GB" if "peer_peak_gb" in row else ""
    return text
