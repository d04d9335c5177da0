"""Mamba-2's recurrence in vectorised PyTorch, by chunks (Dao and Gu 2024, arXiv 2405.21060, section 6, listing 1).

Inside a chunk of Q steps the recurrence is attention: outputs are (L ∘ C Bᵀ) applied to the inputs, with L_ij the decay
from step j to step i. Between chunks only states travel: each chunk's own state is a product of matrices, a recurrence
over chunks joins them, and one more product reads the outputs off them.

The decays of one span of chunks are a tensor of at most ``TILE`` numbers. In training each span is recomputed in the
backward, so that what is kept is the inputs and one state a span: memory grows with L, and not with L Q.

Letters: B batch, L length, H heads, P channels a head, N state size, G groups of heads, R = H / G heads of a group,
Q steps of a chunk. In the einsums b, g, r, p, n are those, c the chunk, i and j steps of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambakit.kernels.duality.reference import ssd_dtype, step_sizes

TILE = 1 << 24
# Decays cost Q numbers a step and head, states P N / Q: with P = 64 and N = 64 or 128 both are least together at 64 to
# 90 steps. On a CPU, 256 steps took twice the time of 64.
LARGEST_CHUNK = 64


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, H, P) and final state (B, H, P, N) of ``ssd``, differentiable in every tensor but seq_idx."""
    batch, length, heads, channels = x.shape
    chunk_size = min(chunk_size, length, LARGEST_CHUNK)
    span = chunk_size * max(1, TILE // (batch * heads * chunk_size * chunk_size))
    runs = None if seq_idx is None else _runs(seq_idx)
    if initial_state is None:
        state = x.new_zeros(batch, heads, channels, B.shape[3], dtype=ssd_dtype(x, dt, A, B, C))
    else:
        state = initial_state.to(ssd_dtype(x, dt, A, B, C))
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    recompute = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    outputs = []
    for start in range(0, length, span):
        here = slice(start, start + span)
        gate = None if z is None else z[:, here]
        # The runs of the span, with that of the element before it in front.
        owners = None if runs is None else torch.cat([runs[:, max(start - 1, 0)].unsqueeze(1), runs[:, here]], dim=1)
        arguments = (x[:, here], dt[:, here], A, B[:, here], C[:, here], D, gate, dt_bias, state, owners)
        options = (dt_softplus, dt_limit, chunk_size)
        if recompute:
            out, state = checkpoint(_span, *arguments, *options, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = _span(*arguments, *options)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def _runs(seq_idx: Tensor) -> Tensor:
    """(B, L): how many times seq_idx has changed, so that a value that comes again is another sequence."""
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(changes.cumsum(1), (1, 0))


def _span(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    owners: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Some chunks side by side: x (B, S, H, P) and the state before them to the outputs and the state after them.

    ``owners`` (B, 1 + S): the run of the element before the span and of each of its elements.
    """
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen here, and not autocast's to change
        wide, (length, heads), groups = state.dtype, x.shape[1:3], B.shape[2]
        steps = step_sizes(dt, dt_bias, dt_softplus, dt_limit, wide)
        wide_x = x.to(wide)
        inputs = _chunks(wide_x * steps.unsqueeze(-1), chunk_size).unflatten(3, (groups, -1))  # (B, c, Q, G, R, P)
        Bs, Cs = _chunks(B.to(wide), chunk_size), _chunks(C.to(wide), chunk_size)  # (B, c, Q, G, N)
        # Sums in float64: their differences are then exact to the last place of float32, however long the chunk.
        logs = _chunks(steps.double() * A.double(), chunk_size).unflatten(3, (groups, -1)).cumsum(2)  # (B, c, Q, G, R)

        # decay (B, c, G, R, Qi, Qj): from step j to step i; carry (B, c, Q, G, R): from before the chunk to step i.
        by_head = logs.permute(0, 1, 3, 4, 2)
        blocked = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
        carry = logs.to(wide).exp()
        if owners is not None:
            owner = _chunks(owners[:, 1:], chunk_size, fill=-1)
            owner = torch.where(owner < 0, owners[:, -1, None, None], owner)  # padding joins the last sequence
            before = torch.cat([owners[:, :1], owner[:, :-1, -1]], dim=1).unsqueeze(2)
            carry = carry.masked_fill((owner != before)[..., None, None], 0)
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
            state = through[:, c] * state + own_states[:, c]
        y = y + torch.einsum("bcign,bcgrpn->bcigrp", Cs, torch.stack(befores, dim=1)) * carry.unsqueeze(-1)

        y = y.flatten(3, 4).flatten(1, 2)[:, :length]
        if D is not None:
            y = y + D.to(wide).view(heads, -1) * wide_x
        if z is not None:
            y = y * F.silu(z.to(wide))
        return y.to(x.dtype), state.flatten(1, 2)


def _chunks(tensor: Tensor, chunk_size: int, fill: float = 0) -> Tensor:
    """(B, S, ...) as (B, c, Q, ...), ``fill`` behind the end: a step of size 0 leaves the state as it is."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill)
    return tensor.unflatten(1, (-1, chunk_size))
