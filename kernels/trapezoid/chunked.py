"""Mamba-3's recurrence in vectorised PyTorch: by way of the structured state space duality of Mamba-2.

With gamma_t = sigmoid(trap_t) dt_t and beta_t = (1 - sigmoid(trap_t)) dt_t alpha_t, the state

    h_t = alpha_t h_{t-1} + beta_t v_{t-1} k_{t-1}ᵀ + gamma_t v_t k_tᵀ

holds v_s k_sᵀ, for s < t, times the decay from s to t and w_s = gamma_s + (1 - sigmoid(trap_{s+1})) dt_{s+1}; at s = t,
times gamma_t alone. The first is Mamba-2's recurrence with inputs weighed by w, read one step late: its state after
step t - 1 is what step t reads by q_t, times alpha_t. The second is added: gamma_t (q_t . k_t) v_t, which rotation does
not change. So nothing of step t + 1, which w_t knows, comes into y_t, and nothing is subtracted.

Ranks are steps, R of them in a row, of which the first decays and the others do not. What the R outputs of step t read
are the states between them: the r-th lacks the ranks behind r, which are added.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.duality import weighted_ssd
from mambakit.kernels.duality.reference import ssd_dtype
from mambakit.kernels.trapezoid.reference import (
    TrapezoidalState,
    by_head,
    by_rank,
    rotate,
    start_state,
    trapezoidal_ssd_reference,
)

# Angles are added up in blocks of so many steps, and the blocks' sums in float64: a sum over the whole length would
# lose in float32 the places that sines and cosines need.
ANGLE_BLOCK = 64


def trapezoidal_ssd_chunked(
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
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, TrapezoidalState]:
    """Arguments and results of ``trapezoidal_ssd_reference``, by chunks; ``backend`` computes the recurrence."""
    if x.shape[1] == 1:  # one step is the definition's
        return trapezoidal_ssd_reference(
            x, dt, dA, trap, B, C, angles, B_bias, C_bias, mimo_x, D, z, initial_state, seq_idx, lengths
        )
    heads, ranks, dtype = x.shape[2], B.shape[2], ssd_dtype(x, dt, dA, B, C)
    start = start_state(initial_state, x, B, angles, dtype)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen here, and not autocast's to change
        dt, dA = (masked(tensor.to(dtype), lengths) for tensor in (dt, dA))
        gamma, weights, reach = input_weights(dt, trap.to(dtype))
        angle = angle_sums(angles.to(dtype), dt, start.angle, seq_idx)
        B, C = by_head(B, B_bias, heads, dtype), by_head(C, C_bias, heads, dtype)
        q, k = (rotate(b, angle.unsqueeze(2), mimo_x is not None) for b in (C, B))
        v = by_rank(x.to(dtype), mimo_x)
        ssm = start.ssm + torch.einsum("bh,brhp,brhn->bhpn", reach, by_rank(start.v, mimo_x), start.k)

        q_next = F.pad(q[:, 1:], (0, 0) * 3 + (0, 1))
        read, ssm_end = weighted_ssd(
            v.flatten(1, 2),
            weights.repeat_interleave(ranks, dim=1),
            F.pad(dA.unsqueeze(2), (0, 0, 0, ranks - 1)).flatten(1, 2),
            k.flatten(1, 2),
            q_next.flatten(1, 2),
            chunk_size=chunk_size * ranks,
            initial_state=ssm,
            seq_idx=None if seq_idx is None else seq_idx.repeat_interleave(ranks, dim=1),
            backend=backend,
        )
        read = read.unflatten(1, (-1, ranks))
        if ranks > 1:
            behind = torch.ones(ranks, ranks, dtype=dtype, device=x.device).triu(1) * weights[..., None, None]
            read = read + torch.einsum("blhqr,blrhp->blqhp", behind * products(q_next, k), v)
        first = torch.einsum("bhpn,bqhn->bqhp", ssm, q[:, 0]).unsqueeze(1)
        before = torch.cat([first, read[:, :-1]], dim=1)
        if seq_idx is not None:
            before = before.masked_fill(begins(seq_idx)[..., None, None, None], 0)
        y = dA.exp()[:, :, None, :, None] * before
        y = y + torch.einsum("blhqr,blrhp->blqhp", gamma[..., None, None] * products(C, B), v)
        y = y if D is None else y + D.to(dtype).unsqueeze(-1) * v
        y = y if z is None else y * F.silu(z.to(dtype))
        k_end = unless_empty(lengths, at_end(k, lengths), start.k)
        v_end = unless_empty(lengths, at_end(x, lengths).to(dtype), start.v)
    return y.to(x.dtype), TrapezoidalState(angle[:, -1], ssm_end, k_end, v_end)


def products(q: Tensor, k: Tensor) -> Tensor:
    """(B, L, H, R, R): every rank of q (B, L, R, H, N) with every rank of k."""
    if q.shape[2] == 1:
        return (q * k).sum(-1).transpose(2, 3).unsqueeze(-1)
    return torch.einsum("blqhn,blrhn->blhqr", q, k)


def begins(seq_idx: Tensor) -> Tensor:
    """(B, L) bool: where another sequence begins, which the first element of a row does not count as."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def masked(tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, L, H) with zeros behind each row's length: a step of size 0 leaves the state as it is."""
    if lengths is None:
        return tensor
    padding = torch.arange(tensor.shape[1], device=tensor.device) >= lengths.unsqueeze(1)
    return tensor.masked_fill(padding.unsqueeze(-1), 0)


def input_weights(dt: Tensor, trap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gamma (B, L, H), w (B, L, H), and (B, H) what the first step takes of the element before it.

    The w of a sequence's last element knows the next sequence, but nothing reads the state in which it stands.
    """
    gamma = torch.sigmoid(trap) * dt
    behind = dt - gamma
    return gamma, gamma + F.pad(behind[:, 1:], (0, 0, 0, 1)), behind[:, 0]


def angle_sums(angles: Tensor, dt: Tensor, start: Tensor, seq_idx: Tensor | None) -> Tensor:
    """The angle (B, L, H, S) reached at each step, in [0, 2 pi): ``start`` (B, H, S) and the sum of pi tanh(angles) dt.

    In a second sequence of a row the sum begins at 0.
    """
    length = dt.shape[1]
    turns = math.pi * torch.tanh(angles).unsqueeze(2) * dt.unsqueeze(-1)
    block = min(ANGLE_BLOCK, length)
    blocks = F.pad(turns, (0, 0) * 2 + (0, -length % block)).unflatten(1, (-1, block))
    ends = blocks.sum(2, dtype=torch.float64).cumsum(1)
    before = torch.remainder(F.pad(ends[:, :-1], (0, 0) * 2 + (1, 0)), 2 * math.pi).to(dt.dtype)
    sums = (blocks.cumsum(2) + before.unsqueeze(2)).flatten(1, 2)[:, :length]
    if seq_idx is None:
        sums = sums + start.unsqueeze(1)
    else:
        steps = torch.arange(length, device=dt.device)
        last_begin = torch.where(begins(seq_idx), steps, 0).cummax(1).values
        index = (last_begin - 1).clamp(min=0)[..., None, None].expand_as(sums)
        first = (last_begin == 0)[..., None, None]
        sums = torch.where(first, sums + start.unsqueeze(1), sums - sums.gather(1, index))
    return torch.remainder(sums, 2 * math.pi)


def at_end(tensor: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, ...): the last of each row's elements of ``tensor`` (B, L, ...), or its first where a row has none."""
    if lengths is None:
        return tensor[:, -1]
    rows = torch.arange(len(tensor), device=tensor.device)
    return tensor[rows, (lengths - 1).clamp(min=0)]


def unless_empty(lengths: Tensor | None, last: Tensor, before: Tensor) -> Tensor:
    """``last`` (B, ...), or ``before`` where a row has no element."""
    if lengths is None:
        return last
    return torch.where(lengths.view(-1, *(1,) * (last.dim() - 1)) > 0, last, before)
