"""Causal convolution of packed sequences, of which none hears another.

Letters: B batch, L length, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE = 64  # the longest half whose taps are multiplied out; the longer ones are transformed


def count_changes(seq_idx: Tensor) -> Tensor:
    """(B, L) int64: how often seq_idx (B, L) has changed so far, so that no sequence bears the number of another."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)


def convolve_packed(x: Tensor, kernel: Tensor, sequence: Tensor) -> Tensor:
    """y_t = sum_k K_k x_{t-k} over the k for which t-k is of t's sequence: x (B, L, D), kernel (D, L) to (B, L, D).

    ``sequence`` (B, L) never falls along a row; elements of equal number are one sequence. Two elements are first
    parted where time is cut into halves of 1, 2, 4, ... steps; across that cut the earlier half writes to the later
    one, both but for what is not of the sequence that the cut lies in: one mask on what goes in and one on what comes
    out, at O(L) a halving, and a product or a transform between. In all O(L log^2 L), nothing of L times L, and no
    rounding passes from one sequence to another. float32 or float64, contiguous; gradients flow to x and kernel.
    """
    length = x.shape[1]
    x = x.permute(2, 0, 1).contiguous()
    y = kernel[:, :1].unsqueeze(2) * x
    half = 1
    while half < length:
        blocks = (length + half - 1) // (2 * half)  # those with anything in their later half
        missing = 2 * half * blocks - length  # below 0 where the rest would all be an earlier half
        owner = F.pad(sequence, (0, missing)).unflatten(1, (blocks, 2 * half))
        other = owner != owner[:, :, half - 1 : half]
        earlier = F.pad(x, (0, missing)).unflatten(2, (blocks, 2 * half))[..., :half]
        later = _across(earlier.masked_fill(other[..., :half], 0), kernel[:, 1 : 2 * half])
        later = later.masked_fill(other[..., half:], 0)
        y = y + F.pad(F.pad(later, (half, 0)).flatten(2), (0, -missing))
        half *= 2
    return y.permute(1, 2, 0).contiguous()


def _across(earlier: Tensor, taps: Tensor) -> Tensor:
    """What ``earlier`` (D, B, M, H) gives to the H steps after it, by ``taps`` (D, up to 2 H - 1) from K_1 on."""
    half = earlier.shape[3]
    if half > DENSE:
        spectrum = torch.fft.rfft(earlier, n=2 * half) * torch.fft.rfft(taps, n=2 * half)[:, None, None]
        return torch.fft.irfft(spectrum, n=2 * half)[..., half - 1 : -1]
    taps = F.pad(taps, (0, 2 * half - 1 - taps.shape[1]))
    toeplitz = taps.unfold(1, half, 1).flip(2)  # (D, H, H): K_{H + s - t} for the s-th later and t-th earlier step
    return (earlier.flatten(1, 2) @ toeplitz.mT).unflatten(1, earlier.shape[1:3])
