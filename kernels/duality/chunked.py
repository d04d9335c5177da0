"""Mamba-2's recurrence in vectorised PyTorch, by chunks (Dao and Gu 2024, arXiv 2405.21060, section 6, listing 1).

Inside a chunk of Q steps the recurrence is attention: outputs are (L ∘ C Bᵀ) applied to the inputs, with L_ij the decay
from step j to step i. Between chunks only states travel: each chunk's own state is a product of matrices, a recurrence
over chunks joins them, and one more product reads the outputs off them.

The decays of one span of chunks are a tensor of at most ``TILE`` numbers. The forward keeps the state before each span,
and the backward computes each span again, so that memory grows with L, and not with L Q.

Letters: B batch, L length, H heads, P channels a head, N state size, G groups of heads, R = H / G heads of a group,
Q steps of a chunk. In the einsums b, g, r, p, n are those, c the chunk, i and j steps of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.duality.reference import ssd_dtype

TILE = 1 << 24
# Decays cost Q numbers a step and head, states P N / Q: with P = 64 and N = 64 or 128 both are least together at 64 to
# 90 steps. On a CPU, 256 steps took twice the time of 64.
LARGEST_CHUNK = 64


def span_count(x: Tensor, chunk_size: int) -> int:
    """How many spans the sequences of x (B, L, H, P) are cut into."""
    return -(-x.shape[1] // chunks_of(x, chunk_size)[1])


def chunks_of(x: Tensor, chunk_size: int) -> tuple[int, int]:
    """Steps of a chunk, and of a span: as many chunks as are computed side by side."""
    batch, length, heads, _ = x.shape
    chunk_size = min(chunk_size, length, LARGEST_CHUNK)
    return chunk_size, chunk_size * max(1, TILE // (batch * heads * chunk_size * chunk_size))


def ssd_forward(
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, H, P) and final state (B, H, P, N) of ``weighted_ssd``; the state before each span."""
    batch, length, heads, channels = x.shape
    chunk_size, span = chunks_of(x, chunk_size)
    dtype = ssd_dtype(x, weights, log_decays, B, C)
    if initial_state is None:
        state = x.new_zeros(batch, heads, channels, B.shape[3], dtype=dtype)
    else:
        state = initial_state.to(dtype)
    owners = None if seq_idx is None else _owners(seq_idx)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    starts = []
    for start in range(0, length, span):
        starts.append(state)
        pieces = _piece(start, span, x, weights, log_decays, B, C, z, owners)
        out[:, start : start + span], state = _span(*[*pieces, D, state, chunk_size])
    return out, state.clone(), torch.stack(starts)


def ssd_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, log_decays, B, C, D, z and initial_state (None for what was not given)."""
    chunk_size, span = chunks_of(x, chunk_size)
    owners = None if seq_idx is None else _owners(seq_idx)
    timed = (x, weights, log_decays, B, C, z)
    gradients: list[Any] = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in timed]
    dD: Any = None if D is None else torch.zeros_like(D, dtype=starts.dtype)
    dstate: Any = torch.zeros_like(starts[0]) if dfinal_state is None else dfinal_state
    for index in reversed(range(len(starts))):
        here = slice(index * span, (index + 1) * span)
        pieces = _piece(here.start, span, *timed, owners)
        with torch.enable_grad():
            # Detached even where they are whole, so that no gradient goes past this span.
            leaves: list[Any] = [
                t if t is None else t.detach().requires_grad_() for t in (*pieces[:6], D, starts[index])
            ]
            results = _span(*[*leaves[:6], pieces[6], *leaves[6:], chunk_size])
            given = [leaf for leaf in leaves if leaf is not None]
            found = iter(torch.autograd.grad(results, given, (dout[:, here], dstate)))
        *parts, dD_part, dstate = (None if leaf is None else next(found) for leaf in leaves)
        for whole, part in zip(gradients, parts, strict=True):
            if whole is not None:
                whole[:, here] = part
        if dD is not None:
            dD += dD_part
    dx, dweights, dlog_decays, dB, dC, dz = gradients
    dD = None if D is None else dD.to(D.dtype)
    dinitial = None if initial_state is None else dstate.to(initial_state.dtype)
    return dx, dweights, dlog_decays, dB, dC, dD, dz, dinitial


def _piece(start: int, span: int, *timed: Tensor | None) -> list[Any]:
    """``span`` steps of each tensor from ``start``; of the last, the owners, with that of the element before."""
    *tensors, owners = timed
    pieces = [None if t is None else t[:, start : start + span] for t in tensors]
    return [*pieces, None if owners is None else owners[:, start : start + span + 1]]


def _owners(seq_idx: Tensor) -> Tensor:
    """(B, 1 + L): which sequence each element belongs to, by how often seq_idx has changed; first the initial state's.

    Counted, since a value of seq_idx that comes again is another sequence.
    """
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(changes.cumsum(1), (2, 0))


def _span(
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    owners: Tensor | None,
    D: Tensor | None,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Some chunks side by side: x (B, S, H, P) and the state before them to the outputs and the state after them.

    ``owners`` (B, 1 + S): the sequence of the element before the span and of each of its elements.
    """
    wide, (length, heads), groups = state.dtype, x.shape[1:3], B.shape[2]
    wide_x = x.to(wide)
    inputs = _chunks(wide_x * weights.to(wide).unsqueeze(-1), chunk_size).unflatten(3, (groups, -1))  # (B,c,Q,G,R,P)
    Bs, Cs = _chunks(B.to(wide), chunk_size), _chunks(C.to(wide), chunk_size)  # (B, c, Q, G, N)
    # Sums in float64: their differences are then exact to the last place of float32, however long the chunk. A decay of
    # exp(-1e4) is 0 in float64, too, and a sum of such logs is finite.
    logs = (
        _chunks(log_decays.double().clamp(min=-1e4), chunk_size).unflatten(3, (groups, -1)).cumsum(2)
    )  # (B, c, Q, G, R)

    # decay (B, c, G, R, Qi, Qj): from step j to step i; carry (B, c, Q, G, R): from before the chunk to step i.
    by_head = logs.permute(0, 1, 3, 4, 2)
    blocked = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    carry, from_before = logs.to(wide).exp(), Cs
    reached = None
    if owners is not None:
        owner = _chunks(owners[:, 1:], chunk_size, fill=-1)
        owner = torch.where(owner < 0, owners[:, -1, None, None], owner)  # padding joins the last sequence
        before = torch.cat([owners[:, :1], owner[:, :-1, -1]], dim=1).unsqueeze(2)
        reached = (owner == before)[..., None, None]  # (B, c, Q, 1, 1)
        # Selected before the products and after them: 0 times the state of another sequence, were that infinite,
        # would be NaN, in the product and in its gradient.
        carry, from_before = torch.where(reached, carry, 0), torch.where(reached, Cs, 0)
        blocked = (blocked | (owner.unsqueeze(3) != owner.unsqueeze(2)))[:, :, None, None]
    decay = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).to(wide).masked_fill(blocked, -torch.inf).exp()

    scores = torch.einsum("bcign,bcjgn->bcgij", Cs, Bs).unsqueeze(3)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", scores * decay, inputs)
    to_end = decay[..., -1, :].permute(0, 1, 4, 2, 3).unsqueeze(-1)
    own_states = torch.einsum("bcjgrp,bcjgn->bcgrpn", inputs * to_end, Bs)
    through = carry[:, :, -1, :, :, None, None]
    state = state.unflatten(1, (groups, -1))
    befores = []
    for c in range(own_states.shape[1]):
        befores.append(state)
        state = _reaching(through[:, c] * state, reached if reached is None else reached[:, c, -1, ..., None, None])
        state = state + own_states[:, c]
    carried = torch.einsum("bcign,bcgrpn->bcigrp", from_before, torch.stack(befores, dim=1)) * carry.unsqueeze(-1)
    y = y + _reaching(carried, reached if reached is None else reached.unsqueeze(-1))

    y = y.flatten(3, 4).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + D.to(wide).view(heads, -1) * wide_x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), state.flatten(1, 2)


def _reaching(tensor: Tensor, reached: Tensor | None) -> Tensor:
    """Zero where the state before is another sequence's."""
    return tensor if reached is None else torch.where(reached, tensor, 0)


def _chunks(tensor: Tensor, chunk_size: int, fill: float = 0) -> Tensor:
    """(B, S, ...) as (B, c, Q, ...), ``fill`` behind the end: a step of size 0 leaves the state as it is."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill)
    return tensor.unflatten(1, (-1, chunk_size))
