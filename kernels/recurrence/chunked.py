"""The linear recurrence in vectorised PyTorch: chunks side by side, then the chunks' ends, by the same means.

A chunk that starts from nothing gives local states s_t and products p_t = a_t ... a_first; its true states are
s_t + p_t h, with h the state before it. The last elements of all chunks form the same recurrence, ``CHUNK`` times
shorter. The work is three multiplications an element whatever the length (Blelloch 1990), and nothing is divided by a
product, which may have underflowed.

Letters: B batch, L length, K chunks of S elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.kernels.scan.reference import state_dtype

CHUNK = 16
LARGE_STEP = 2**15  # one step of so many elements outweighs its call: then time goes by one step after another


def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """Every h_t (B, L, ...) in new memory; arguments as of the public :func:`mambakit.kernels.linear_scan`."""
    dtype = state_dtype(a, b, *(() if initial_state is None else (initial_state,)))
    h = torch.empty(b.shape, dtype=dtype, device=b.device).copy_(b)
    _scan(a.to(dtype), h, None if initial_state is None else initial_state.to(dtype), reverse)
    return h


def _scan(a: Tensor, h: Tensor, state: Tensor | None, reverse: bool) -> None:
    """h_t <- a_t h_{t-1} + h_t, in place on h (B, L, ...), from ``state`` (B, ...) or from nothing."""
    length = h.shape[1]
    if length <= CHUNK or h[:, 0].numel() >= LARGE_STEP:
        _loop(a, h, state, reverse)
        return
    whole = length // CHUNK * CHUNK  # the elements in full chunks come first in the scan's direction, then the rest
    body, rest = slice(0, whole), slice(whole, length)
    if reverse:
        body, rest = slice(length - whole, length), slice(0, length - whole)
    _scan_chunks(_at(a, body), h[:, body], state, reverse)
    if whole < length:
        _loop(_at(a, rest), h[:, rest], h[:, body.start if reverse else body.stop - 1], reverse)


def _loop(a: Tensor, h: Tensor, state: Tensor | None, reverse: bool) -> None:
    for t in reversed(range(h.shape[1])) if reverse else range(h.shape[1]):
        if state is not None:
            torch.addcmul(h[:, t], a[:, min(t, a.shape[1] - 1)], state, out=h[:, t])
        state = h[:, t]


def _scan_chunks(a: Tensor, h: Tensor, state: Tensor | None, reverse: bool) -> None:
    """As ``_scan``, for a length that is a multiple of ``CHUNK``."""
    h = h.unflatten(1, (-1, CHUNK))  # (B, K, S, ...)
    a = a.unsqueeze(1) if a.shape[1] == 1 else a.unflatten(1, (-1, CHUNK))
    products = a.new_empty(*a.shape[:2], CHUNK, *a.shape[3:])
    order = range(CHUNK - 1, -1, -1) if reverse else range(CHUNK)
    for before, t in zip((None, *order), order, strict=False):
        a_t = a[:, :, min(t, a.shape[2] - 1)]
        if before is None:
            products[:, :, t] = a_t
        else:
            torch.mul(a_t, products[:, :, before], out=products[:, :, t])
            torch.addcmul(h[:, :, t], a_t, h[:, :, before], out=h[:, :, t])

    last = order[-1]
    ends = h[:, :, last].clone()  # (B, K, ...)
    _scan(products[:, :, last], ends, state, reverse)
    chunks, arriving = (slice(0, -1), slice(1, None)) if reverse else (slice(1, None), slice(0, -1))
    h[:, chunks].addcmul_(_at(products, chunks), ends[:, arriving].unsqueeze(2))
    if state is not None:
        first = -1 if reverse else 0
        h[:, first].addcmul_(products[:, first], state.unsqueeze(1))


def _at(a: Tensor, times: slice) -> Tensor:
    """Elements of a along time; a coefficient constant in time, of one element, serves them all."""
    return a if a.shape[1] == 1 else a[:, times]
