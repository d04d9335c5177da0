"""The linear recurrence by its definition, a loop over time that the faster implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.kernels.scan.reference import state_dtype


def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None, reverse: bool = False) -> Tensor:
    """Every h_t (B, L, ...); arguments as of the public :func:`mambakit.kernels.linear_scan`.

    Ordinary differentiable PyTorch: autograd gives gradients of any order.
    """
    dtype = state_dtype(a, b, *(() if initial_state is None else (initial_state,)))
    a, b = a.to(dtype).expand_as(b), b.to(dtype)
    state = torch.zeros_like(b[:, 0]) if initial_state is None else initial_state.to(dtype)
    states: list[Tensor] = []
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, dim=1)
