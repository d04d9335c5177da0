"""The peers: figures recorded on one NVIDIA H200, and the ones that can be run where they are installed.

Recorded figures are medians of ``triton.testing.do_bench`` in milliseconds on one H200 (torch 2.11, Triton 3.6, CUDA
13.0), of mamba_ssm 2.3.2.post1 with its CUDA kernels built for sm_90 and of causal-conv1d 1.7, on inputs drawn as
``scan.py`` and ``conv.py`` draw them. They mean little beside another GPU, and are shown on an H200 alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from harness import BOTH, FORWARD, Contender
from torch import Tensor

CUDA_SCAN, CUDA_CONV = "mamba_ssm 2.3.2.post1 (recorded)", "causal-conv1d 1.7 (recorded)"
SDPA = "SDPA, flash (recorded)"

# shape: forward, forward + backward, MiB
SCAN = {
    "lm": (0.592, 2.931, 325),
    "lm130m": (0.874, 4.295, 489),
    "prefill": (0.088, 0.456, 41),
    "long64k": (1.422, 7.045, 656),
    "long1m": (9.983, 35.90, 2768),
    "vim_tiny": (0.395, 1.596, 103),
    "vim_small_448": (0.695, 2.698, 192),
    "lm, float32": (1.158, 3.842, 644),
    "vim_tiny, float32": (0.387, 1.595, 194),
}
# shape: forward, forward + backward; first (B, D, L), then channels-last
CONV = {
    "lm": ((0.038, 0.214), (0.048, 0.447)),
    "long64k": ((0.091, 0.484), (0.084, 0.436)),
    "vim_tiny": ((0.081, 0.581), (0.020, 0.211)),
}
# Causal attention, 16 heads of 64, 16,384 tokens in all (65,536 at that length): forward, forward + backward
ATTENTION = {
    512: (0.072, 0.334),
    2048: (0.185, 0.729),
    8192: (0.633, 2.31),
    16384: (1.21, 4.37),
    65536: (19.0, None),
}


def recorded(device: str, name: str, figures: tuple[float | None, ...] | None) -> dict[str, dict[str, float]]:
    """``figures`` by pass under the peer's ``name``; nothing on another GPU than that they were measured on."""
    if figures is None or "H200" not in device:
        return {}
    keys = (FORWARD, BOTH, "MiB")
    return {name: {key: figure for key, figure in zip(keys, figures, strict=False) if figure is not None}}


def installed(module: str) -> bool:
    return find_spec(module) is not None


def scan_peers(given: dict[str, Any], leaves: list[Tensor], dout: Tensor, elements: int) -> dict[str, Contender]:
    """Selective scans on the tensors ``given`` to ours; channels-first ones get transposed copies, made beforehand."""
    found = {}
    if installed("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        turned = {name: _leaf(given[name].transpose(1, 2)) for name in ("u", "delta", "B", "C", "z")}
        rest = {name: _leaf(given[name]) for name in ("A", "D", "delta_bias")}
        turned_dout = dout.transpose(1, 2).contiguous()
        found["mamba_ssm"] = Contender(
            lambda: selective_scan_fn(**turned, **rest, delta_softplus=True),
            [*turned.values(), *rest.values()],
            turned_dout,
            channels_first=True,
        )
    if installed("mambapy") and elements <= 1 << 31:  # it keeps several tensors of B L D N elements
        from mambapy.pscan import pscan

        def parallel_scan() -> Tensor:
            u, delta, A, B, C = (given[name] for name in ("u", "delta", "A", "B", "C"))
            step = F.softplus(delta.float() + given["delta_bias"])
            decay = torch.exp(step.unsqueeze(-1) * A)
            entry = (step * u).unsqueeze(-1) * B.unsqueeze(2)
            y = (pscan(decay, entry) @ C.unsqueeze(-1).float()).squeeze(3) + given["D"] * u
            return (y * F.silu(given["z"].float())).to(u.dtype)

        found["mambapy"] = Contender(parallel_scan, leaves, dout)
    return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_()


def conv_peers(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor) -> dict[str, Contender]:
    found = {}
    if installed("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        last = Contender(
            lambda: causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2),
            [x, weight, bias],
            dout,
        )
        turned = _leaf(x.transpose(1, 2))
        first = Contender(
            lambda: causal_conv1d_fn(turned, weight, bias, activation="silu"),
            [turned, weight, bias],
            dout.transpose(1, 2).contiguous(),
            channels_first=True,
        )
        found |= {"causal_conv1d, channels-last": last, "causal_conv1d, (B, D, L)": first}
    if installed("fla"):
        from fla.modules.causal_conv1d import causal_conv1d as fla_conv

        found["fla"] = Contender(lambda: fla_conv(x, weight, bias, activation="silu")[0], [x, weight, bias], dout)
    return found


def norm_peers(x: Tensor, residual: Tensor, weight: Tensor, douts: tuple[Tensor, Tensor]) -> dict[str, Contender]:
    """Residual addition and RMS norm, both results given back and differentiated."""
    leaves = [x, residual, weight]
    options: dict[str, Any] = {"residual": residual, "eps": 1e-5, "prenorm": True, "residual_in_fp32": True}

    def two_steps() -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.rms_norm(summed, x.shape[-1:], weight, 1e-5).to(x.dtype), summed

    found = {"torch": Contender(two_steps, leaves, douts)}
    if installed("mamba_ssm"):
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

        found["mamba_ssm"] = Contender(lambda: rms_norm_fn(x, weight, None, **options), leaves, douts)
    if installed("fla"):
        from fla.modules.norm.layernorm import rms_norm as fla_norm

        found["fla"] = Contender(lambda: fla_norm(x, weight, None, **options), leaves, douts)
    return found


def loss_peers(hidden: Tensor, weight: Tensor, labels: Tensor, dout: Tensor) -> dict[str, Contender]:
    leaves = [hidden, weight]
    found = {
        "torch": Contender(lambda: F.cross_entropy((hidden @ weight.T.to(hidden.dtype)).float(), labels), leaves, dout)
    }
    if installed("fla"):
        from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

        fused = FusedLinearCrossEntropyLoss()
        low = weight.detach().to(hidden.dtype).requires_grad_()
        found["fla"] = Contender(lambda: fused(hidden, labels, low).float(), [hidden, low], dout)
    return found
