"""Mamba-3's recurrence by its definition: a short loop over time that the faster implementations are tested against.

Letters: B batch, L length, H heads, P channels a head, N state size, G groups of heads, S angles, R ranks (1 where
there is no ``mimo_x``). In the einsums b, h, p, n, r are those, and q is the rank of an output.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.duality.reference import ssd_dtype


class TrapezoidalState(NamedTuple):
    """What the recurrence carries: all of it float32, or float64 where an input is.

    angle: (B, H, S), the angle reached, from 0 to 2 pi.
    ssm: (B, H, P, N), in the rotated frame.
    k: (B, H, N), or (B, R, H, N) with ranks: the last B, biased and rotated.
    v: (B, H, P), the last x.
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


def rotate(tensor: Tensor, angle: Tensor, halves: bool) -> Tensor:
    """Turn S pairs of the last axis by ``angle``: numbers 2i and 2i + 1, or, in ``halves``, i and i + N/2, for i < S.

    Args:
        tensor: (..., N), N even.
        angle: (..., S), S at most N/2, broadcast against ``tensor``. Pairs from S on stay as they are.
    """
    pairs = tensor.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else tensor.unflatten(-1, (-1, 2))
    turned, rest = pairs[..., : angle.shape[-1], :], pairs[..., angle.shape[-1] :, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = turned.unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    pairs = torch.cat([turned, rest.expand(*turned.shape[:-2], -1, -1)], dim=-2)
    return (pairs.transpose(-1, -2) if halves else pairs).flatten(-2)


def by_head(tensor: Tensor, bias: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor:
    """B or C (..., R, G, N) for every head and with the bias (H, R, N): (..., R, H, N) in ``dtype``."""
    tensor = tensor.to(dtype).repeat_interleave(heads // tensor.shape[-2], dim=-2)
    return tensor if bias is None else tensor + bias.to(dtype).transpose(0, 1)


def start_state(
    state: TrapezoidalState | None, x: Tensor, B: Tensor, angles: Tensor, dtype: torch.dtype
) -> TrapezoidalState:
    """The state to begin from, in ``dtype`` and with an axis of ranks in k; zeros where none is given."""
    batch, _, heads, channels = x.shape
    _, _, ranks, _, d_state = B.shape
    if state is None:
        shapes = (heads, angles.shape[-1]), (heads, channels, d_state), (ranks, heads, d_state), (heads, channels)
        return TrapezoidalState(*(x.new_zeros(batch, *shape, dtype=dtype) for shape in shapes))
    angle, ssm, k, v = (tensor.to(dtype) for tensor in state)
    return TrapezoidalState(torch.remainder(angle, 2 * math.pi), ssm, k.reshape(batch, ranks, heads, d_state), v)


def by_rank(x: Tensor, mimo_x: Tensor | None) -> Tensor:
    """x (..., H, P) for every rank: (..., R, H, P), weighed by ``mimo_x`` (H, R, P) where there is one."""
    x = x.unsqueeze(-3)
    return x if mimo_x is None else x * mimo_x.to(x.dtype).transpose(0, 1)


def trapezoidal_ssd_reference(
    x: Tensor,
    dt: Tensor,
    dA: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: TrapezoidalState | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, TrapezoidalState]:
    """Output (B, L, R, H, P) and final state of ``trapezoidal_ssd``, whose docstring says what each argument is.

    B and C are (B, L, R, G, N), their biases (H, R, N), z and the output have the axis of ranks too. Ordinary
    differentiable PyTorch: autograd gives the gradients, of any order.
    """
    heads, dtype = x.shape[2], ssd_dtype(x, dt, dA, B, C)
    state = start_state(initial_state, x, B, angles, dtype)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen here, and not autocast's to change
        x_wide = x.to(dtype)
        B, C = by_head(B, B_bias, heads, dtype), by_head(C, C_bias, heads, dtype)
        dt, dA = dt.to(dtype), dA.to(dtype)
        ahead, behind = torch.sigmoid(trap.to(dtype)), torch.sigmoid(-trap.to(dtype))
        speeds = math.pi * torch.tanh(angles.to(dtype))
        outputs = []
        for t in range(x.shape[1]):
            if seq_idx is not None and t > 0:
                same_sequence = seq_idx[:, t] == seq_idx[:, t - 1]
                state = TrapezoidalState(*(_where(same_sequence, old, torch.zeros_like(old)) for old in state))
            angle = torch.remainder(state.angle + speeds[:, t, None] * dt[:, t, :, None], 2 * math.pi)
            q, k = (rotate(b[:, t], angle.unsqueeze(1), mimo_x is not None) for b in (C, B))
            v, v_before = by_rank(x_wide[:, t], mimo_x), by_rank(state.v, mimo_x)
            alpha, gamma = dA[:, t].exp(), ahead[:, t] * dt[:, t]
            beta = behind[:, t] * dt[:, t] * alpha
            before, now = (torch.einsum("brhp,brhn->bhpn", *pair) for pair in ((v_before, state.k), (v, k)))
            ssm = _scale(alpha, state.ssm) + _scale(beta, before) + _scale(gamma, now)
            y = torch.einsum("bhpn,bqhn->bqhp", ssm, q)
            y = y if D is None else y + D.to(dtype).unsqueeze(-1) * v
            outputs.append(y if z is None else y * F.silu(z[:, t].to(dtype)))
            new = TrapezoidalState(angle, ssm, k, x_wide[:, t])
            if lengths is not None:
                new = TrapezoidalState(*(_where(t < lengths, *pair) for pair in zip(new, state, strict=True)))
            state = new
    return torch.stack(outputs, dim=1).to(x.dtype), state


def _scale(coefficient: Tensor, state: Tensor) -> Tensor:
    """``state`` (B, H, P, N) times ``coefficient`` (B, H)."""
    return coefficient[..., None, None] * state


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``one`` in the batch rows where ``rows`` (B,) holds, else ``other``."""
    return torch.where(rows.view(-1, *(1,) * (one.dim() - 1)), one, other)
