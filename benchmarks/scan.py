"""``selective_scan``: the shapes of the peers' table, its accuracy by dtype and length, and time against length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import harness
import peers
import torch
import torch.nn.functional as F
from harness import BOTH, FORWARD, Ceilings, Contender, Work, compare, milliseconds, normal, one_call
from torch import Tensor

from mambakit.kernels import selective_scan
from mambakit.kernels.testing import poisoned_memory

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
PER_CHANNEL = ("u", "delta", "A", "D", "z", "delta_bias")
D_STATE = 16
LOOP = 256  # the longest sequence for which the definition, a loop, is the reference; beyond it, its vectorised form


class Shape(NamedTuple):
    """A batch of B sequences of L steps of D channels, ``D_STATE`` states each."""

    name: str
    dtype: torch.dtype
    batch: int
    length: int
    channels: int


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = (
    Shape("lm", BF16, 8, 2048, 2048),
    Shape("lm130m", BF16, 16, 2048, 1536),
    Shape("prefill", BF16, 1, 2048, 2048),
    Shape("long64k", BF16, 1, 65536, 1024),
    Shape("long1m", BF16, 1, 1048576, 256),
    Shape("vim_tiny", BF16, 128, 197, 384),
    Shape("vim_small_448", BF16, 32, 785, 768),
    Shape("char", BF16, 64, 256, 768),
    Shape("lm, float32", FP32, 8, 2048, 2048),
    Shape("vim_tiny, float32", FP32, 128, 197, 384),
)
# Both have more than 2^31 elements in u: one by its rows, one within its only row.
LARGE = (Shape("offsets, rows", BF16, 1025, 1024, 2048), Shape("offsets, time", BF16, 1, 1049600, 2056))
ACCURACY_LENGTHS = (1, 2, 31, 197, 2049)
SWEEP_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
PLAIN_LENGTHS = (512, 2048)
SWEEP_TOKENS = 16384
SWEEP_CHANNELS = 2048  # a Mamba block of d_model 1024, as 16 attention heads of 64 are


def inputs(shape: Shape) -> dict[str, Any]:
    """Random u, z, B, C; steps and decays as the peers' times were taken with, near a fresh Mamba's."""
    size = (shape.batch, shape.length, shape.channels)
    rows = (shape.batch, shape.length, D_STATE)
    given = {
        "u": normal(*size, dtype=shape.dtype),
        "delta": torch.rand(size, device=harness.DEVICE, dtype=shape.dtype) * 0.5,
        "A": -torch.arange(1.0, D_STATE + 1, device=harness.DEVICE).repeat(shape.channels, 1),
        "B": normal(*rows, dtype=shape.dtype),
        "C": normal(*rows, dtype=shape.dtype),
        "D": torch.ones(shape.channels, device=harness.DEVICE),
        "z": normal(*size, dtype=shape.dtype),
        "delta_bias": torch.rand(shape.channels, device=harness.DEVICE) - 4.0,
    }
    return {name: tensor.requires_grad_() for name, tensor in given.items()} | {"delta_softplus": True}


def check(shape: Shape, given: dict[str, Any]) -> dict[str, float]:
    """The whole shape in poisoned memory, beside float64 on some channels of the first and last row.

    The gradient that enters is zero outside them, so that even the gradients that sum over all channels and rows
    depend on these alone; whatever the kernel leaves unwritten elsewhere is NaN and shows in those sums. Beyond
    ``LOOP`` steps the vectorised form stands for the definition: the tests hold the two together.
    """
    rows = sorted({0, shape.batch - 1})
    channels = sorted({c % shape.channels for c in (0, 1, 33, shape.channels // 2, -66, -1)})
    row, channel = torch.tensor(rows, device=harness.DEVICE), torch.tensor(channels, device=harness.DEVICE)
    chosen = torch.randn(len(rows), shape.length, len(channels), device=harness.DEVICE, dtype=shape.dtype)
    dout = torch.zeros(shape.batch, shape.length, shape.channels, device=harness.DEVICE, dtype=shape.dtype)
    dout[row[:, None, None], torch.arange(shape.length, device=harness.DEVICE)[:, None], channel] = chosen
    with poisoned_memory():
        out = selective_scan(**given, backend="triton")
        gradients = torch.autograd.grad(out, [given[name] for name in TENSORS], dout)
    named = dict(zip(TENSORS, gradients, strict=True))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (out, *gradients)), f"{shape.name}: not finite"

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name in ("A", "D", "delta_bias"):
            return tensor[channel]
        tensor = tensor[row]
        return tensor if name in ("B", "C") else tensor[..., channel]

    wide = {name: cut(name, given[name].detach()).double().requires_grad_() for name in TENSORS}
    want = selective_scan(**wide, delta_softplus=True, backend="reference" if shape.length <= LOOP else "torch")
    exact = dict(zip(TENSORS, torch.autograd.grad(want, list(wide.values()), chosen.double()), strict=True))
    return compare(
        f"selective_scan {shape.name}",
        shape.dtype,
        {"out": cut("u", out)} | {f"grad {name}": cut(name, tensor) for name, tensor in named.items()},
        {"out": want} | {f"grad {name}": tensor for name, tensor in exact.items()},
    )


def floors(shape: Shape, ceilings: Ceilings) -> dict[str, float]:
    """The larger of the bytes' time and the exponentials'. Forward: u, delta, z in, out out; N + 4 exponentials a
    channel and step, four for softplus and gate. The backward reads these and dout, writes three gradients, and needs
    each exponential once more. A kernel that computes some of them on the FMA units may pass this floor.
    """
    steps = shape.batch * shape.length * shape.channels
    size = torch.empty((), dtype=shape.dtype).element_size()
    exponentials = ceilings.exponentials_ms(steps * (D_STATE + 4))
    forward = max(exponentials, ceilings.copy_ms(4 * size * steps))
    backward = max(exponentials, ceilings.copy_ms(7 * size * steps))
    return {FORWARD: forward, BOTH: forward + backward}


def build(shape: Shape, device: str, ceilings: Ceilings) -> Work:
    given = inputs(shape)
    leaves = [given[name] for name in TENSORS]
    dout = torch.randn_like(given["u"])
    return Work(
        operator="selective_scan",
        shape=shape.name,
        dtype=shape.dtype,
        ours=Contender(lambda: selective_scan(**given), leaves, dout),
        floors=floors(shape, ceilings),
        check=lambda: check(shape, given),
        peers=peers.scan_peers(given, leaves, dout, given["u"].numel() * D_STATE),
        recorded=peers.recorded(device, peers.CUDA_SCAN, peers.SCAN.get(shape.name)),
    )


def works(only: Sequence[str], device: str, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Work]]]:
    for shape in SHAPES:
        if not only or shape.name in only:
            yield shape.name, partial(build, shape, device, ceilings)


def accuracy_shapes() -> Iterator[Shape]:
    """Every dtype and length, and beyond 2^31 elements."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for length in ACCURACY_LENGTHS:
            yield Shape(f"L {length}", dtype, 2, length, 72)
    yield from LARGE


def accuracy(shape: Shape) -> dict[str, Any]:
    """Errors against float64, each within its bound."""
    return {
        "operator": "selective_scan",
        "shape": shape.name,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "errors": check(shape, inputs(shape)),
    }


def sweep(length: int) -> dict[str, Any]:
    """Milliseconds of the scan, of attention and of our PyTorch path at one length.

    There are ``SWEEP_TOKENS`` tokens in all, at greater lengths one sequence. Attention is timed up to 65,536, the
    PyTorch path, which launches some kernels a step and takes seconds, by one call at two lengths.
    """
    batch = max(1, SWEEP_TOKENS // length)
    given = inputs(Shape("sweep", BF16, batch, length, SWEEP_CHANNELS))
    leaves = [given[name] for name in TENSORS]
    dout = torch.randn_like(given["u"])
    scan = Contender(lambda: selective_scan(**given), leaves, dout)
    row: dict[str, Any] = {"length": length, "batch": batch, "selective_scan": _both(scan)}
    if length in PLAIN_LENGTHS:
        plain = Contender(lambda: selective_scan(**given, backend="torch"), leaves, dout)
        row["vectorised PyTorch"] = {FORWARD: one_call(plain.forward), BOTH: one_call(plain.both)}
    if length <= 65536:
        q, k, v = (normal(batch, 16, length, 64, dtype=BF16) for _ in range(3))
        attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            row["SDPA (flash)"] = _both(Contender(attend, [q, k, v], torch.randn_like(q)))
    return row


def _both(contender: Contender) -> dict[str, float]:
    return {FORWARD: milliseconds(contender.forward), BOTH: milliseconds(contender.both)}
