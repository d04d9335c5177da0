"""Causal convolution of packed sequences, of which none hears another.

Letters: B batch, L length, D channels, H steps in half a block, M blocks.

Two times are first parted where time is cut into halves of 1, 2, 4, ... steps. Across such a cut the earlier half
writes to the later one, both but for what is not of the sequence in which the earlier one ends: one mask on what goes
in and one on what comes out, and between them all taps at once, by a product or a transform.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE = 64  # the longest half whose taps are multiplied out; the longer ones are transformed


def count_changes(seq_idx: Tensor) -> Tensor:
    """(B, L) int64: how often seq_idx (B, L) has changed so far, so that no sequence bears the number of another."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)


def convolve_packed(x: Tensor, kernel: Tensor, sequence: Tensor) -> Tensor:
    """y_t = sum_k K_k x_{t-k} over the k for which t-k is of t's sequence: x (B, L, D), kernel (D, L) to (B, L, D).

    Elements are of one sequence where ``sequence`` (B, L) has one number, which stand together. At O(L log^2 L), with
    nothing of L times L, and no rounding passes from one sequence to another. float32 or float64, contiguous; gradients
    of any order flow to x and kernel, and nothing but these two is kept for them.
    """
    y: Tensor = _PackedConvolution.apply(x.permute(2, 0, 1).contiguous(), kernel, sequence)
    return y.permute(1, 2, 0).contiguous()


class _PackedConvolution(torch.autograd.Function):
    """The same with x (D, B, L). The gradients go the way back over every cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, sequence: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel, sequence)
        y = kernel[:, :1].unsqueeze(2) * x
        for half, other in _cuts(sequence):
            later = _across(_earlier(x, half, other), kernel[:, 1 : 2 * half])
            later = later.masked_fill(other[..., half:], 0)
            y = y + _resized(F.pad(later, (half, 0)).flatten(2), x.shape[2])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernel, sequence = ctx.saved_tensors
        length = x.shape[2]
        dx = kernel[:, :1].unsqueeze(2) * dy
        dkernel = _resized((x * dy).sum((1, 2)).unsqueeze(1), length)
        for half, other in _cuts(sequence):
            later = _resized(dy, other.shape[1] * 2 * half).unflatten(2, (-1, 2 * half))[..., half:]
            later = later.masked_fill(other[..., half:], 0)
            dearlier, dtaps = _across_backward(later, _earlier(x, half, other), kernel[:, 1 : 2 * half])
            dearlier = dearlier.masked_fill(other[..., :half], 0)
            dx = dx + _resized(F.pad(dearlier, (0, half)).flatten(2), length)
            dkernel = dkernel + _resized(F.pad(dtaps, (1, 0)), length)
        return dx, dkernel, None


def _cuts(sequence: Tensor) -> Iterator[tuple[int, Tensor]]:
    """H and, for the blocks that have a later half, where an element is not of the earlier half's last one's sequence.

    The masks are (B, M, 2 H).
    """
    length, half = sequence.shape[1], 1
    while half < length:
        blocks = (length + half - 1) // (2 * half)
        owner = _resized(sequence, 2 * half * blocks).unflatten(1, (blocks, 2 * half))
        yield half, owner != owner[:, :, half - 1 : half]
        half *= 2


def _earlier(x: Tensor, half: int, other: Tensor) -> Tensor:
    """x (D, B, L) in the earlier halves of the blocks, (D, B, M, H), 0 where ``other``."""
    return x.unfold(2, half, 2 * half)[:, :, : other.shape[1]].masked_fill(other[..., :half], 0)


def _resized(x: Tensor, length: int) -> Tensor:
    """x (..., L) cut off or filled up with zeros to (..., length)."""
    return x if x.shape[-1] == length else F.pad(x, (0, length - x.shape[-1]))


def _across(earlier: Tensor, taps: Tensor) -> Tensor:
    """What ``earlier`` (D, B, M, H) gives to the H steps after it, by ``taps`` (D, up to 2 H - 1) from K_1 on."""
    half = earlier.shape[3]
    if half > DENSE:
        n = 2 * half
        spectrum = torch.fft.rfft(earlier, n=n) * torch.fft.rfft(taps, n=n)[:, None, None]
        return torch.fft.irfft(spectrum, n=n)[..., half - 1 : -1]
    return (earlier.flatten(1, 2) @ _toeplitz(taps, half).mT).unflatten(1, earlier.shape[1:3])


def _across_backward(later: Tensor, earlier: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``earlier`` and, (D, 2 H - 1), of ``taps``, from that of what it gives, (D, B, M, H)."""
    half = earlier.shape[3]
    if half > DENSE:
        n = 2 * half
        slope = torch.fft.rfft(F.pad(later, (half - 1, 0)), n=n)
        dtaps = (slope * torch.fft.rfft(earlier, n=n).conj_physical()).sum((1, 2))
        slope = slope * torch.fft.rfft(taps, n=n).conj_physical()[:, None, None]
        return torch.fft.irfft(slope, n=n)[..., :half], torch.fft.irfft(dtaps, n=n)[..., :-1]
    flat = later.flatten(1, 2)
    dtoeplitz = (flat.mT @ earlier.flatten(1, 2)).flip(2)
    dtaps = torch.ops.aten.unfold_backward(dtoeplitz, [len(taps), 2 * half - 1], 1, half, 1)
    return (flat @ _toeplitz(taps, half)).unflatten(1, earlier.shape[1:3]), dtaps


def _toeplitz(taps: Tensor, half: int) -> Tensor:
    """(D, H, H): K_{H + s - t}, ``taps`` from K_1 on, for the s-th later and the t-th earlier step."""
    return _resized(taps, 2 * half - 1).unfold(1, half, 1).flip(2)
