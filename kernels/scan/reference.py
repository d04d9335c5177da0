"""The selective scan by its definition: a short loop over time that the faster implementations are tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD, REVERSE, HALF = 0, 1, 2  # what ``direction`` can be, see ``direction_of``
UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the recurrence: float32, widened to float64 or to complex where an argument is."""
    wide = torch.float32
    for tensor in tensors:
        if tensor.dtype not in UP_TO_FLOAT32:
            wide = torch.promote_types(wide, tensor.dtype)
    return wide


def direction_of(reverse: bool | str) -> int:
    """How ``selective_scan``'s ``reverse`` is written between Python functions and in the operators' schemas.

    FORWARD and REVERSE for False and True; HALF for "half": the first half of the channels forwards, the second in
    reverse.
    """
    return HALF if reverse == "half" else REVERSE if reverse else FORWARD


def has_halves(coefficients: Tensor) -> bool:
    """Whether the halves of the channels have a B or C of their own: not one for every channel."""
    return coefficients.dim() == 2 or (coefficients.dim() == 4 and coefficients.shape[2] > 1)


class Inputs(NamedTuple):
    """The tensors of a call of ``selective_scan``, in the order of every function behind it."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None


def channel_axes(whole: Inputs) -> dict[str, int]:
    """The axis of the channels, or of their groups, in every tensor that has one; a B or C of all channels has none."""
    axes = {"u": 2, "delta": 2, "A": 0, "D": 0, "z": 2, "delta_bias": 0, "initial_state": 1}
    return axes | {name: b.dim() - 2 for name, b in (("B", whole.B), ("C", whole.C)) if has_halves(b)}


def split_channels(whole: Inputs) -> tuple[Inputs, Inputs]:
    """The tensors of the first half of the channels and those of the second, as views."""
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name, axis in channel_axes(whole).items():
        tensor = getattr(whole, name)
        if tensor is not None:
            halves[0][name], halves[1][name] = tensor.chunk(2, axis)
    return whole._replace(**halves[0]), whole._replace(**halves[1])


def at_time(coefficients: Tensor, t: int, channels: int) -> Tensor:
    """B or C at time t for every channel, (B or 1, D, N), from any of its three forms."""
    if coefficients.dim() == 2:
        return coefficients.unsqueeze(0)
    if coefficients.dim() == 3:
        return coefficients[:, t].unsqueeze(1)
    return coefficients[:, t].repeat_interleave(channels // coefficients.shape[2], dim=1)


def scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    delta_softplus: bool = False,
    direction: int = FORWARD,
) -> tuple[Tensor, Tensor]:
    """Output and final state of ``selective_scan``, whose docstring says what each argument is.

    ``direction`` is ``direction_of(reverse)``. Everything is ordinary differentiable PyTorch: autograd gives the
    gradients, of any order. float64 stays float64, other inputs are computed in float32. Time and memory grow with L
    steps of several small operations each: this is for tests and for reading.
    """
    if direction == HALF:
        first, second = split_channels(Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx))
        halves = scan_reference(*first, delta_softplus, FORWARD), scan_reference(*second, delta_softplus, REVERSE)
        outs, states = zip(*halves, strict=True)
        return torch.cat(outs, dim=2), torch.cat(states, dim=1)
    reverse = direction == REVERSE
    batch, length, channels = u.shape
    dtype = state_dtype(u, delta, A, B, C)
    real = torch.empty((), dtype=dtype).real.dtype
    wide_u, wide_delta = u.to(real), delta.to(real)
    A, B, C = A.to(dtype), B.to(dtype), C.to(dtype)
    if delta_bias is not None:
        wide_delta = wide_delta + delta_bias.to(real)
    if delta_softplus:
        wide_delta = F.softplus(wide_delta)

    if initial_state is None:
        state = torch.zeros(batch, channels, A.shape[1], dtype=dtype, device=u.device)
    else:
        state = initial_state.to(dtype)
    outputs: list[Tensor] = []
    times = range(length - 1, -1, -1) if reverse else range(length)
    for t in times:
        if seq_idx is not None and outputs:
            same_sequence = seq_idx[:, t] == seq_idx[:, t + 1 if reverse else t - 1]
            state = torch.where(same_sequence[:, None, None], state, 0)
        step = wide_delta[:, t, :, None]
        state = torch.exp(step * A) * state + step * wide_u[:, t, :, None] * at_time(B, t, channels)
        y = (state * at_time(C, t, channels)).sum(-1)
        outputs.append(2 * y.real if dtype.is_complex else y)
    out = torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    if D is not None:
        out = out + D.to(real) * wide_u
    if z is not None:
        out = out * F.silu(z.to(real))
    return out.to(u.dtype), state
