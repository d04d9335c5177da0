"""The selective scan in vectorised PyTorch, forward and backward written by hand.

Time is cut into chunks of ``CHUNK`` steps. Of one chunk, every tensor with a state axis is a tile
(rows, CHUNK, N, D) in a buffer that is used again for the next chunk, and whatever else the chunk needs (the step, the
gate, ...) is computed beside it. So only inputs, results and one state a chunk (the checkpoints, from which the
backward recomputes the others) ever leave the processor's cache. Inside a tile all but the recurrence is a handful of
whole-tile operations; the recurrence is one ``addcmul`` a step.

Letters: B batch, L length, D channels, N state size, G groups of B and C, R rows (lanes of sequences) scanned
side by side, S their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.scan.coefficients import Constant, PerStep
from mambakit.kernels.scan.lanes import CHUNK, Chunk, Lanes
from mambakit.kernels.scan.reference import (
    FORWARD,
    HALF,
    REVERSE,
    Inputs,
    channel_axes,
    has_halves,
    split_channels,
    state_dtype,
)

# The rows (rows, 1, 1) in which a sequence begins, by the time at which it does; times at which none does are absent.
Resets = dict[int, Tensor]


def checkpoint_shape(batch: int, length: int, channels: int, d_state: int) -> tuple[int, int, int]:
    """Shape of the states saved for the backward: (B, chunks, N D), the state (N, D) before each chunk.

    Where the halves of the channels run in opposite directions, the first half's states lie before the second's.
    """
    return batch, (length + CHUNK - 1) // CHUNK, d_state * channels


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    direction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``selective_scan`` without gradients: ``(out (B, L, D), final_state (B, D, N), checkpoints)``."""
    if direction == HALF:
        first, second = split_channels(Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx))
        halves = scan_forward(*first, delta_softplus, FORWARD), scan_forward(*second, delta_softplus, REVERSE)
        out, final_state, checkpoints = zip(*halves, strict=True)
        return torch.cat(out, 2), torch.cat(final_state, 1), torch.cat(checkpoints, 2)
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, seq_idx, delta_softplus, direction == REVERSE)
    return scan.forward(initial_state)


def scan_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    direction: int,
    recompute_out: bool = False,
    dz: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``scan_forward``: for u, delta, A, B, C, D, z, delta_bias and initial_state, None where that is.

    With ``recompute_out`` also its ``out``, from a second forward. That of z is put into ``dz`` too, where given.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    out = (scan_forward(*arguments, delta_softplus, direction)[0],) if recompute_out else ()
    if direction == HALF:
        found = tuple(_backward_of_halves(dout, dfinal_state, Inputs(*arguments), checkpoints, delta_softplus))
        if dz is not None:
            dz.copy_(cast(Tensor, found[6]))
        return *found, *out
    scan = _Scan(u, delta, A, B, C, D, z, delta_bias, seq_idx, delta_softplus, direction == REVERSE)
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    gradients = scan.backward(dout, dfinal_state, checkpoints, {name: t for name, t in given.items() if t is not None})
    dstate = gradients.pop("initial_state")
    if dz is not None:
        dz.copy_(gradients["z"])
    return *map(gradients.get, given), None if initial_state is None else _like(dstate, initial_state), *out


def _backward_of_halves(
    dout: Tensor, dfinal_state: Tensor | None, whole: Inputs, checkpoints: Tensor, delta_softplus: bool
) -> Iterator[Tensor | None]:
    """``scan_backward`` where the second half of the channels runs in reverse."""
    # A B or C of every channel gets its gradient from both halves: added before it is rounded to a narrow dtype.
    shared = {name: b for name, b in (("B", whole.B), ("C", whole.C)) if not has_halves(b)}
    wide = {name: b.to(torch.promote_types(b.dtype, torch.float32)) for name, b in shared.items()}
    first, second = split_channels(whole._replace(**wide))
    douts, states = dout.chunk(2, 2), checkpoints.chunk(2, 2)
    dfinals = (None, None) if dfinal_state is None else dfinal_state.chunk(2, 1)
    firsts = scan_backward(douts[0], dfinals[0], *first, states[0], delta_softplus, FORWARD)
    seconds = scan_backward(douts[1], dfinals[1], *second, states[1], delta_softplus, REVERSE)
    axes = channel_axes(whole)
    for name, one, other in zip(whole._fields, firsts, seconds, strict=False):  # the last, seq_idx, has no gradient
        if one is None or other is None:
            yield None
        elif name in shared:
            yield (one + other).to(shared[name].dtype)
        else:
            yield torch.cat((one, other), axes[name])


def _like(gradient: Tensor, argument: Tensor) -> Tensor:
    """The gradient with its argument's shape and dtype: the real part where the argument is real."""
    if gradient.is_complex() and not argument.is_complex():
        gradient = gradient.real
    return gradient.reshape(argument.shape).to(argument.dtype).contiguous()


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = max(x, 0) + 2 artanh(y / (2 + y)) with y = e^-|x|: seven times as fast as PyTorch's, by log1p."""
    y = torch.abs(x).mul_(-math.log2(math.e)).exp2_()
    return x.clamp_min(0).add_(y.div_(y + 2).atanh_(), alpha=2)


class _Scan(Lanes):
    """One call's arguments, cut into lanes.

    Inputs and results are (R, S, ...) in their own dtype, and tiles in the recurrence's. States are (R, N, D): the
    channels, by far the longest axis, are contiguous for vector instructions, and B and C are scalars along it.
    """

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        seq_idx: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
    ) -> None:
        batch, length, channels = u.shape
        super().__init__(batch, length, channels, A.shape[1], reverse)
        self.dtype = state_dtype(u, delta, A, B, C)
        self.real = torch.empty((), dtype=self.dtype).real.dtype
        self.u, self.delta = self.fold(u), self.fold(delta)
        self.z = None if z is None else self.fold(z)
        self.D = None if D is None else D.to(self.real)
        self.bias = None if delta_bias is None else delta_bias.to(self.real)
        self.delta_softplus = delta_softplus
        self.A = Constant(A.to(self.dtype).t().contiguous())
        self.A_log2 = Constant(self.A.values * math.log2(math.e))  # for exp2, which is four times as fast as exp
        self.B, self.C = self._coefficients(B), self._coefficients(C)
        # Whether a sequence begins at an element (R, S, 1, 1): no product with a decay of 0, which infinity survives.
        self.begins: Tensor | None = None
        if seq_idx is not None:
            begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1) if reverse else (1, 0))
            self.begins = self.fold(begins)[:, :, None, None]
        # The elements that fill up the last lane: steps of size 0 pass the state unchanged.
        self.filling: Tensor | None = None
        if self.missing:
            self.filling = self.fold(u.new_ones(self.batch, self.length, 1, dtype=torch.bool)).logical_not()

    def _coefficients(self, values: Tensor) -> Constant | Tensor:
        if values.dim() == 2:
            return Constant(values.to(self.dtype).t().contiguous())
        return self.fold(values if values.dim() == 4 else values.unsqueeze(2))

    def state(self, state: Tensor | None) -> Tensor:
        """A caller's (B, D, N), or None for zeros, as (B, N, D)."""
        if state is None:
            return self.A.values.new_zeros(self.batch, self.d_state, self.channels)
        return state.to(self.dtype).transpose(1, 2)

    def coefficients(self, values: Constant | Tensor, chunk: Chunk) -> Constant | PerStep:
        return values if isinstance(values, Constant) else PerStep(self.read(values, chunk).to(self.dtype))

    def inputs(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """u, the step before softplus, and the step: (rows, times, D)."""
        u = self.read(self.u, chunk).to(self.real)
        raw = self.read(self.delta, chunk).to(self.real)
        if self.bias is not None:
            raw = raw + self.bias
        step = _softplus(raw) if self.delta_softplus else raw
        if self.filling is not None:
            step = step.masked_fill(self.read(self.filling, chunk), 0)
        return u, raw, step

    def output_gradient(self, dout: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients (rows, times, D) of out, of C h + D u, and of C h (twice as large for complex states)."""
        dgated = dy = self.read(dout, chunk).to(self.real)
        if self.z is not None:
            dy = dgated * F.silu(self.read(self.z, chunk).to(self.real))
        return dgated, dy, 2 * dy if self.dtype.is_complex else dy

    def decay(self, step: Tensor, out: Tensor) -> Tensor:
        """a_t = exp(delta_t A)."""
        return self.A_log2.outer(step, out).exp2_()

    def resets(self, chunk: Chunk) -> Resets:
        """Where in the chunk the state from before an element is cleared."""
        return {} if self.begins is None else _resets(self.read(self.begins, chunk))

    def lane_decay(self) -> Tensor:
        """The product of a whole lane's decays, (B, lanes, N, D): the exponential of a sum, never a quotient."""
        totals = [self.inputs(chunk)[2].sum(1, keepdim=True) for chunk in self.chunks(slice(0, self.rows))]
        out = self.A.values.new_empty(self.rows, 1, self.d_state, self.channels)
        return self.by_lane(self.decay(torch.stack(totals).sum(0), out).squeeze(1))

    def lane_resets(self) -> Resets:
        """In which lanes the state that enters them is cleared."""
        return {} if self.begins is None else _resets(self.by_lane(self.begins.any(1)))

    def readout(self, C: Constant | PerStep, h: Tensor, u: Tensor, scratch: Tensor) -> Tensor:
        """C h + D u, (rows, times, D). Complex states stand for conjugate pairs, whose sum is twice the real part."""
        y = C.contract(h, scratch)
        y = 2 * y.real if self.dtype.is_complex else y
        return y if self.D is None else y.addcmul_(u, self.D)

    def lane_starts(self, initial: Tensor) -> Tensor:
        """The state at which each lane starts, (R, N, D): scan every lane from zero, then join them one by one."""
        if self.count == 1:
            return initial.clone(memory_format=torch.contiguous_format)
        rows = slice(0, self.rows)
        end = initial.new_zeros(self.rows, self.d_state, self.channels)
        buffers = self.buffers(rows, 2, like=end)
        for chunk in self.chunks(rows):
            a, h = self.tiles(buffers, chunk)
            u, _, step = self.inputs(chunk)
            self.decay(step, a)
            self.coefficients(self.B, chunk).outer(step * u, h)
            end.copy_(_recur(end, a, h, self.resets(chunk)))
        ends, decays, resets = self.by_lane(end), self.lane_decay(), self.lane_resets()
        starts, state = torch.empty_like(ends), initial
        for lane in range(self.count):
            starts[:, lane] = state
            state = torch.addcmul(ends[:, lane], decays[:, lane], _cleared(state, resets, lane))
        return self.by_row(starts)

    def lane_arrivals(self, dfinal: Tensor, dout: Tensor) -> Tensor:
        """What reaches each lane's end from the lanes after it, (R, N, D): as ``lane_starts``, from the other side."""
        if self.count == 1:
            return dfinal.clone(memory_format=torch.contiguous_format)
        rows = slice(0, self.rows)
        leaving = dfinal.new_zeros(self.rows, self.d_state, self.channels)
        buffers = self.buffers(rows, 2, like=leaving)
        for chunk in self.chunks(rows, backwards=True):
            a, g = self.tiles(buffers, chunk)
            self.decay(self.inputs(chunk)[2], a).conj_physical_()
            self.coefficients(self.C, chunk).conj().outer(self.output_gradient(dout, chunk)[2], g)
            resets = self.resets(chunk)
            _recur_back(leaving, a, g, resets)
            torch.mul(a[:, 0], _cleared(g[:, 0], resets, 0), out=leaving)
        leaves, decays, resets = self.by_lane(leaving), self.lane_decay().conj_physical_(), self.lane_resets()
        arrivals, arriving = torch.empty_like(leaves), dfinal
        for lane in range(self.count - 1, -1, -1):
            arrivals[:, lane] = arriving
            arriving = torch.addcmul(leaves[:, lane], decays[:, lane], _cleared(arriving, resets, lane))
        return self.by_row(arrivals)

    def forward(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """out (B, L, D), the last state (B, D, N), and the checkpoints."""
        out = self.u.new_empty(self.rows, self.lane_length, self.channels)
        state = self.lane_starts(self.state(initial_state))
        checkpoints = state.new_empty(checkpoint_shape(self.batch, self.length, self.channels, self.d_state))
        saved = checkpoints.unflatten(2, (self.d_state, self.channels))
        for rows in self.row_groups():
            buffers = self.buffers(rows, 2, like=state)
            for chunk in self.chunks(rows):
                slots = self.slots(saved, chunk)
                slots.copy_(self.by_lane(state[rows])[:, : slots.shape[1]])
                a, h = self.tiles(buffers, chunk)
                u, _, step = self.inputs(chunk)
                self.decay(step, a)
                self.coefficients(self.B, chunk).outer(step * u, h)
                state[rows] = _recur(state[rows], a, h, self.resets(chunk))
                y = self.readout(self.coefficients(self.C, chunk), h, u, scratch=a)
                if self.z is not None:
                    y = y.mul_(F.silu(self.read(self.z, chunk).to(self.real)))
                self.write(out, chunk, y)
        final_state = self.by_lane(state)[:, -1].transpose(1, 2)
        return self.unfold(out).contiguous(), final_state.contiguous(), checkpoints

    def backward(
        self, dout: Tensor, dfinal_state: Tensor | None, checkpoints: Tensor, given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The gradients of the arguments ``given``, and of the initial state, by name."""
        dout = self.fold(dout)
        checkpoints = checkpoints.unflatten(2, (self.d_state, self.channels))
        arriving = self.lane_arrivals(self.state(dfinal_state), dout)
        series, totals = {}, {}
        for name, argument in given.items():
            if argument.dim() > 2:
                inner = (1, self.d_state) if name in "BC" and argument.dim() == 3 else argument.shape[2:]
                series[name] = argument.new_empty(self.rows, self.lane_length, *inner)
            else:
                totals[name] = arriving.new_zeros(argument.shape[::-1])
        for rows in self.row_groups():
            buffers = self.buffers(rows, 3, like=arriving)
            for chunk in self.chunks(rows, backwards=True):
                tiles = self.tiles(buffers, chunk)
                for name, value in self.chunk_gradients(chunk, dout, arriving, checkpoints, *tiles):
                    if name in series:
                        self.write(series[name], chunk, value)
                    elif name in totals:
                        totals[name] += value
        gradients = {name: self.unfold(value) for name, value in series.items()}
        gradients |= {name: value.t() for name, value in totals.items()}
        gradients = {name: _like(gradients[name], argument) for name, argument in given.items()}
        return gradients | {"initial_state": self.by_lane(arriving)[:, 0].transpose(1, 2)}

    def chunk_gradients(
        self, chunk: Chunk, dout: Tensor, arriving: Tensor, checkpoints: Tensor, a: Tensor, h: Tensor, g: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """One chunk's gradients by name: of its own elements, or its share where the argument serves all of them.

        ``arriving`` (R, N, D) is a_{t+1} g_{t+1} of the chunk after this one, with g the gradient of h; it is brought
        up to date for the chunk before. The tiles a, h and g are overwritten.
        """
        u, raw, step = self.inputs(chunk)
        B, C = self.coefficients(self.B, chunk), self.coefficients(self.C, chunk)
        slots = self.slots(checkpoints, chunk)
        start = slots.new_zeros(slots.shape[0], self.count, *slots.shape[2:])
        start[:, : slots.shape[1]] = slots
        start = self.by_row(start)
        self.decay(step, a)
        B.outer(step * u, h)
        resets = self.resets(chunk)
        _recur(start, a, h, resets)

        dgated, dy, dreadout = self.output_gradient(dout, chunk)
        if self.z is not None:
            gate = self.read(self.z, chunk).to(self.real)
            dy_dgate = dgated * self.readout(C, h, u, scratch=g)
            yield "z", torch.ops.aten.silu_backward(dy_dgate, gate)
        for tile in (start, a, h):
            tile.conj_physical_()
        yield "C", C.gradient(h, dreadout, scratch=g)
        C.conj().outer(dreadout, g)
        _recur_back(arriving[chunk.rows], a, g, resets)
        # From here on a holds a_t g_t, which the step before receives, and then the gradient of log a_t.
        torch.mul(a, g, out=a)
        arriving[chunk.rows] = _cleared(a[:, 0], resets, 0)
        a[:, 1:] *= h[:, :-1]
        a[:, 0] *= start
        for t, rows in resets.items():
            a[:, t].masked_fill_(rows, 0)

        yield "B", B.gradient(g, step * u, scratch=h)
        ddrive = B.conj().contract(g, scratch=h).real
        du = ddrive * step
        if self.D is not None:
            du.addcmul_(dy, self.D)
            yield "D", (dy * u).sum((0, 1))
        yield "u", du
        draw = self.A.conj().contract(a, scratch=h).real.addcmul(ddrive, u)
        yield "A", self.A.gradient(a, step, scratch=a)
        if self.delta_softplus:
            draw.mul_(torch.sigmoid(raw))
        if self.filling is not None:
            draw.masked_fill_(self.read(self.filling, chunk), 0)
        yield "delta", draw
        yield "delta_bias", draw.sum((0, 1))


def _resets(begins: Tensor) -> Resets:
    """Of (rows, times, 1, 1), the times at which a sequence begins in some row; on a GPU all, not to wait for it."""
    times = range(begins.shape[1])
    some = begins.any(0).flatten().tolist() if begins.device.type == "cpu" else [True for _ in times]
    return {t: begins[:, t] for t in times if some[t]}


def _cleared(state: Tensor, resets: Resets, t: int) -> Tensor:
    """The state on one side of element t as the other side sees it: 0, even for NaN, where a sequence begins at t."""
    return torch.where(resets[t], 0, state) if t in resets else state


def _recur(state: Tensor, a: Tensor, h: Tensor, resets: Resets) -> Tensor:
    """h_t <- a_t h_{t-1} + h_t from ``state``, in place on the tile h; returns the last state."""
    for t, (a_t, h_t) in enumerate(zip(a.unbind(1), h.unbind(1), strict=True)):
        state = torch.addcmul(h_t, a_t, _cleared(state, resets, t), out=h_t)
    return state


def _recur_back(arriving: Tensor, a: Tensor, g: Tensor, resets: Resets) -> None:
    """g_t <- g_t + a_{t+1} g_{t+1}, in place on the tile g, where ``arriving`` is the last a_{t+1} g_{t+1}."""
    a_steps, g_steps = a.unbind(1), g.unbind(1)
    g_steps[-1].add_(arriving)
    for t in range(len(g_steps) - 2, -1, -1):
        torch.addcmul(g_steps[t], a_steps[t + 1], _cleared(g_steps[t + 1], resets, t + 1), out=g_steps[t])
