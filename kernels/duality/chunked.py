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

from typing import Any, NamedTuple

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
        out[:, start : start + span], state = _outputs(
            _pieces(start, span, x, weights, log_decays, B, C, z, owners), D, state, chunk_size
        )
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
    out: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, log_decays, B, C, D, z and initial_state (None for what was not given).

    out: tensors for those of x, B, C and z (None: a new one), of any strides that leave a step's numbers side by side.
    B's and C's share their strides.
    """
    chunk_size, span = chunks_of(x, chunk_size)
    owners = None if seq_idx is None else _owners(seq_idx)
    timed = (x, weights, log_decays, B, C, z)
    wholes: list[Any] = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in timed]
    for index, tensor in zip((0, 3, 4, 5), out or (), strict=False):
        wholes[index] = wholes[index] if tensor is None else tensor
    dD: Any = None if D is None else torch.zeros(D.shape, dtype=starts.dtype, device=D.device)
    dstate: Any = torch.zeros_like(starts[0]) if dfinal_state is None else dfinal_state
    for index in reversed(range(len(starts))):
        here = slice(index * span, (index + 1) * span)
        pieces = _pieces(here.start, span, *timed, owners)
        *parts, dD_part, dstate = _gradients(dout[:, here], dstate, pieces, D, starts[index], chunk_size)
        for whole, part in zip(wholes, parts, strict=True):
            if whole is not None:
                whole[:, here] = part
        if dD is not None:
            dD += dD_part
    dx, dweights, dlog_decays, dB, dC, dz = wholes
    dinitial = None if initial_state is None else dstate.to(initial_state.dtype)
    return dx, dweights, dlog_decays, dB, dC, None if D is None else dD.to(D.dtype), dz, dinitial


class Pieces(NamedTuple):
    """A span of S steps of each argument. ``owners`` (B, 1 + S): the sequence of the element before, and of each."""

    x: Any
    weights: Any
    log_decays: Any
    B: Any
    C: Any
    z: Any
    owners: Any


def _pieces(start: int, span: int, *timed: Tensor | None) -> Pieces:
    *tensors, owners = timed
    pieces: list[Any] = [None if t is None else t[:, start : start + span] for t in tensors]
    return Pieces(*[*pieces, None if owners is None else owners[:, start : start + span + 1]])


def _owners(seq_idx: Tensor) -> Tensor:
    """(B, 1 + L): which sequence each element belongs to, by how often seq_idx has changed; first the initial state's.

    Counted, since a value of seq_idx that comes again is another sequence.
    """
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return F.pad(changes.cumsum(1), (2, 0))


class Chunks(NamedTuple):
    """A span cut into chunks, with all decays in them; c the chunk, i and j steps of it.

    Attributes:
        x, inputs: (B, c, Q, G, R, P), and that times its weights (B, c, Q, G, R, 1).
        Bs, Cs: (B, c, Q, G, N).
        decay: (B, c, G, R, Qi, Qj), from step j to step i, 0 where j is later or in another sequence.
        carry, to_end: (B, c, Q, G, R, 1), from before the chunk to each step, and from each step to the chunk's end.
        reached: (B, c, Q, 1, 1, 1), whether the state before the chunk is of the step's own sequence; None: always.
    """

    x: Tensor
    weights: Tensor
    inputs: Tensor
    Bs: Tensor
    Cs: Tensor
    decay: Tensor
    carry: Tensor
    to_end: Tensor
    reached: Tensor | None


def _cut(pieces: Pieces, wide: torch.dtype, chunk_size: int) -> Chunks:
    groups = pieces.B.shape[2]

    def chunks(tensor: Tensor) -> Tensor:
        return _chunks(tensor, chunk_size)

    def by_group(tensor: Tensor) -> Tensor:
        return chunks(tensor).unflatten(3, (groups, -1))

    x, weights = by_group(pieces.x.to(wide)), by_group(pieces.weights.to(wide)).unsqueeze(-1)
    Bs, Cs = chunks(pieces.B.to(wide)), chunks(pieces.C.to(wide))
    # Sums in float64: their differences are then exact to the last place of float32, however long the chunk. A decay of
    # exp(-1e4) is 0 in float64, too, and a sum of such logs is finite.
    logs = by_group(pieces.log_decays.double().clamp(min=-1e4)).cumsum(2)
    by_head = logs.permute(0, 1, 3, 4, 2)
    blocked = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    carry, reached = logs.to(wide).exp().unsqueeze(-1), None
    if pieces.owners is not None:
        owner = _chunks(pieces.owners[:, 1:], chunk_size, fill=-1)
        owner = torch.where(owner < 0, pieces.owners[:, -1, None, None], owner)  # padding joins the last sequence
        before = torch.cat([pieces.owners[:, :1], owner[:, :-1, -1]], dim=1).unsqueeze(2)
        reached = (owner == before)[..., None, None, None]
        carry = torch.where(reached, carry, 0)
        blocked = (blocked | (owner.unsqueeze(3) != owner.unsqueeze(2)))[:, :, None, None]
    decay = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).to(wide).masked_fill(blocked, -torch.inf).exp()
    to_end = decay[..., -1, :].permute(0, 1, 4, 2, 3).unsqueeze(-1)
    return Chunks(x, weights, x * weights, Bs, Cs, decay, carry, to_end, reached)


def _reaching(tensor: Tensor, reached: Tensor | None) -> Tensor:
    """0 where the state before is another sequence's: multiplied by 0 it would leave NaN, were it infinite."""
    return tensor if reached is None else torch.where(reached, tensor, 0)


def _states(cut: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the chunks (B, c, G, R, P, N), and the one behind them all."""
    own = torch.einsum("bcjgrp,bcjgn->bcgrpn", cut.inputs * cut.to_end, cut.Bs)
    befores = []
    for c in range(own.shape[1]):
        befores.append(state)
        state = _reaching(*_through(cut, c, state)) + own[:, c]
    return torch.stack(befores, dim=1), state


def _through(cut: Chunks, c: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
    """``state`` (B, G, R, P, N) times the decay through chunk c, and whether it reaches the chunk's end."""
    return cut.carry[:, c, -1, ..., None] * state, None if cut.reached is None else cut.reached[:, c, -1, ..., None]


def _outputs(pieces: Pieces, D: Tensor | None, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The outputs of a span, and the state (B, H, P, N) behind it, from the one before it."""
    cut = _cut(pieces, state.dtype, chunk_size)
    befores, state = _states(cut, state.unflatten(1, (pieces.B.shape[2], -1)))
    y = _joined(_ungated(cut, _scores(cut), befores), pieces.x)
    if D is not None:
        y = y + D.to(y.dtype).view(y.shape[2], -1) * pieces.x.to(y.dtype)
    if pieces.z is not None:
        y = y * F.silu(pieces.z.to(y.dtype))
    return y.to(pieces.x.dtype), state.flatten(1, 2)


def _scores(cut: Chunks) -> Tensor:
    return torch.einsum("bcign,bcjgn->bcgij", cut.Cs, cut.Bs).unsqueeze(3)


def _carried(cut: Chunks, befores: Tensor) -> Tensor:
    return _reaching(torch.einsum("bcign,bcgrpn->bcigrp", cut.Cs, befores) * cut.carry, cut.reached)


def _ungated(cut: Chunks, scores: Tensor, befores: Tensor) -> Tensor:
    return torch.einsum("bcgrij,bcjgrp->bcigrp", scores * cut.decay, cut.inputs) + _carried(cut, befores)


def _gradients(
    dout: Tensor, dstate: Tensor, pieces: Pieces, D: Tensor | None, state: Tensor, chunk_size: int
) -> tuple[Tensor | None, ...]:
    """Of a span, from ``dstate``, the gradient of the state behind it: those of x, weights, log_decays, B, C and z, a
    part of D's, and that of ``state``, which is before it.

    With S_t the gradient of h_t and g_t that of y_t: S_t = g_t C_tᵀ + exp(a_{t+1}) S_{t+1}, d(w_t x_t) = S_t B_t,
    dB_t = S_tᵀ w_t x_t, dC_t = h_tᵀ g_t and da_t = exp(a_t) <S_t, h_{t-1}>, the last as sums over the pairs of steps
    whose decay a_t is a part of.
    """
    wide, groups = state.dtype, pieces.B.shape[2]
    cut = _cut(pieces, wide, chunk_size)
    befores, _ = _states(cut, state.unflatten(1, (groups, -1)))
    scores, slopes, dz, dD = _scores(cut), dout.to(wide), None, None
    wide_x = pieces.x.to(wide)
    skip = None if D is None else D.to(wide).view(pieces.x.shape[2], -1)
    if pieces.z is not None:
        z = pieces.z.to(wide)
        y = _joined(_ungated(cut, scores, befores), pieces.x)
        y = y if skip is None else y + skip * wide_x
        gate = torch.sigmoid(z)
        dz = slopes * y * gate * (1 + z * (1 - gate))
        slopes = slopes * z * gate
    if D is not None:
        dD = (slopes * wide_x).sum((0, 1)).view(*D.shape[:1], -1)
        dD = dD.sum(1) if D.dim() == 1 else dD
    g = _chunks(slopes, chunk_size).unflatten(3, (groups, -1))

    own = torch.einsum("bcigrp,bcign->bcgrpn", g * cut.carry, cut.Cs)
    dstate, behinds = dstate.unflatten(1, (groups, -1)), []
    for c in reversed(range(own.shape[1])):
        behinds.append(dstate)
        dstate = _reaching(*_through(cut, c, dstate)) + own[:, c]
    behind = torch.stack(behinds[::-1], dim=1)

    leaving = torch.einsum("bcjgn,bcgrpn->bcjgrp", cut.Bs, behind) * cut.to_end
    dinputs = leaving + torch.einsum("bcgrij,bcigrp->bcjgrp", scores * cut.decay, g)
    dmixed = torch.einsum("bcigrp,bcjgrp->bcgrij", g, cut.inputs) * cut.decay
    dscores = dmixed.sum(3)
    dC = torch.einsum("bcgij,bcjgn->bcign", dscores, cut.Bs)
    dC = dC + _reaching(
        torch.einsum("bcigrp,bcgrpn->bcign", g * cut.carry, befores),
        None if cut.reached is None else cut.reached[..., 0],
    )
    dB = torch.einsum("bcgij,bcign->bcjgn", dscores, cut.Cs)
    dB = dB + torch.einsum("bcjgrp,bcgrpn->bcjgn", cut.inputs * cut.to_end, behind)

    pairs = dmixed * scores
    # What stands on both sides, such as a step's pair with itself, cancels exactly in float64.
    inside = (pairs.sum(5, dtype=torch.float64) - pairs.sum(4, dtype=torch.float64)).permute(0, 1, 4, 2, 3)
    inside = inside + (g * _carried(cut, befores)).sum(-1)
    past = (cut.inputs * leaving).sum(-1)
    through = (
        _reaching(
            befores * behind * cut.carry[:, :, -1, ..., None],
            None if cut.reached is None else cut.reached[:, :, -1, ..., None],
        )
        .sum((4, 5))
        .unsqueeze(2)
    )
    dlogs = inside.flip(2).cumsum(2).flip(2) + past.cumsum(2) - past + through
    dx = _joined(dinputs * cut.weights, pieces.x)
    dx = dx if skip is None else dx + skip * slopes
    length = pieces.x.shape[1]
    dweights, dlogs = (t.flatten(3).flatten(1, 2)[:, :length] for t in ((cut.x * dinputs).sum(-1), dlogs))
    dB, dC = (t.flatten(1, 2)[:, :length] for t in (dB, dC))
    return dx, dweights, dlogs, dB, dC, dz, dD, dstate.flatten(1, 2)


def _chunks(tensor: Tensor, chunk_size: int, fill: float = 0) -> Tensor:
    """(B, S, ...) as (B, c, Q, ...), ``fill`` behind the end: a step of size 0 leaves the state as it is."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill)
    return tensor.unflatten(1, (-1, chunk_size))


def _joined(chunks: Tensor, like: Tensor) -> Tensor:
    """(B, c, Q, G, R, P) as (B, S, H, P), without what pads the last chunk."""
    return chunks.flatten(3, 4).flatten(1, 2)[:, : like.shape[1]]
