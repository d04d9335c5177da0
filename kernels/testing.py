"""What a test of an operator needs: a comparison that catches NaN, poisoned memory, seeded inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Relative RMS error to expect of a kernel that accumulates in float32 and rounds its output to the given dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """``got`` matches ``want``: relative RMS below ``tolerance``, largest error below 20 times that of the RMS of want.

    The default tolerance is that of ``got``'s dtype (``TOLERANCE``). NaN or infinity anywhere fails, whatever the size.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if tolerance is None:
        tolerance = TOLERANCE[got.real.dtype if got.is_complex() else got.dtype]
    wide = torch.complex128 if got.is_complex() or want.is_complex() else torch.float64
    got, want = got.detach().to("cpu", wide), want.detach().to("cpu", wide)
    assert bool(torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all()), f"{name}: not finite"
    rms = want.abs().square().mean().sqrt().item()
    error = (got - want).abs()
    relative = error.square().mean().sqrt().item() / max(rms, 1e-30)
    assert relative <= tolerance or error.max().item() <= 1e-30, (
        f"{name}: relative RMS error {relative:.3g} > {tolerance:.3g}"
    )
    worst = error.max().item() / max(rms, 1e-30)
    assert worst <= 20 * tolerance + 20 * tolerance * (want.abs().max().item() / max(rms, 1e-30)), (
        f"{name}: largest error {worst:.3g} of the RMS, {20 * tolerance:.3g} allowed"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin hold NaN (integers: their largest value), so an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def random_tensor(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu", requires_grad: bool = False
) -> Tensor:
    """Standard normal numbers of a seed, the same on every device; drawn in float64, then rounded to ``dtype``."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=wide)
    return numbers.to(device, dtype).requires_grad_(requires_grad)


def scan_arguments(
    batch: int = 2,
    length: int = 21,
    channels: int = 6,
    d_state: int = 3,
    B: str = "per step",
    C: str = "per step",
    complex_A: bool = False,
    optional: bool = True,
    packed: bool = False,
    reverse: bool | str = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Random keyword arguments of ``selective_scan``, the same at every call.

    Args:
        B, C: "per step" (B, L, N), "2 groups" or "4 groups" (B, L, G, N), or "constant" (D, N).
        complex_A: A, B, C and the initial state are complex.
        optional: give every optional tensor as well.
        packed: give a ``seq_idx`` with a new sequence at about every fifth step.
    """
    number = torch.promote_types(dtype, torch.complex64) if complex_A else dtype
    seeds = iter(range(100))

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return random_tensor(*shape, seed=next(seeds), dtype=dtype, device=device)

    def coefficients(form: str) -> Tensor:
        shapes = {
            "per step": (batch, length, d_state),
            "2 groups": (batch, length, 2, d_state),
            "4 groups": (batch, length, 4, d_state),
            "constant": (channels, d_state),
        }
        return random(*shapes[form], dtype=number)

    A = random(channels, d_state, dtype=number)
    A = torch.complex(-A.real.exp(), A.imag) if complex_A else -A.exp()
    given: dict[str, Any] = {"u": random(batch, length, channels), "delta": random(batch, length, channels), "A": A}
    given |= {"B": coefficients(B), "C": coefficients(C)}
    if optional:
        given |= {"D": random(channels), "z": random(batch, length, channels), "delta_bias": random(channels)}
        given |= {"initial_state": random(batch, channels, d_state, dtype=number)}
    if packed:
        begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(7)) < 0.2
        given |= {"seq_idx": begins.cumsum(1).to(device, torch.int32)}
    return given | {"delta_softplus": True, "reverse": reverse, "return_final_state": True}
