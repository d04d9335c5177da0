"""The selective scan in vectorised PyTorch, forward and backward written by hand.

Time is cut into chunks of ``CHUNK`` steps. Of one chunk, every tensor with a state axis is a tile
(rows, CHUNK, N, D) in a buffer that is used again for the next chunk, so the large tensors never leave the
processor's cache and memory grows with L only through inputs, gradients and one state a chunk (the checkpoints).
Inside a tile all but the recurrence is a handful of whole-tile operations; the recurrence is one ``addcmul`` a step.

Letters: B batch, L length, D channels, N state size, G groups of B and C, R rows scanned side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.scan.coefficients import Constant, PerStep
from mambakit.kernels.scan.reference import state_dtype

CHUNK = 16
# Elements of one tile: 2 MB of float32, so that the three tiles in use stay in a core's share of the L2 and L3 caches.
TILE = 2**19
# A step of fewer elements than the first number costs more in calls than in arithmetic. Then each sequence is cut into
# lanes scanned side by side, enough of them for steps of the second number; the price is a second pass over time, to
# find the state at which each lane starts.
SMALL_STEP, LANED_STEP = 2**13, 2**15


def checkpoint_shape(batch: int, length: int, channels: int, d_state: int) -> tuple[int, int, int, int]:
    """Shape of the states saved for the backward: (B, chunks, N, D), the state before each chunk."""
    return batch, (length + CHUNK - 1) // CHUNK, d_state, channels


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
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``selective_scan`` without gradients: ``(out (B, L, D), final_state (B, D, N), checkpoints)``."""
    scan = _Scan(u, delta, A, B, C, delta_bias, seq_idx, delta_softplus, reverse)
    y, final_state, checkpoints = scan.forward(scan.state(initial_state))
    y = scan.unfold(y)
    if D is not None:
        y = torch.addcmul(y, scan.u, D.to(scan.real), out=y)
    out = scan.flip(y)
    if z is not None:
        out = out * F.silu(z.to(scan.real))
    return out.to(u.dtype).contiguous(), final_state.transpose(1, 2).contiguous(), checkpoints


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
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``scan_forward``: for u, delta, A, B, C, D, z, delta_bias and initial_state, None where that is."""
    scan = _Scan(u, delta, A, B, C, delta_bias, seq_idx, delta_softplus, reverse)
    dy = dout.to(scan.real)
    if z is not None:
        gate = z.to(scan.real)
        dy = dy * F.silu(gate)
    dy = scan.flip(dy).contiguous()
    y, ddrive, dstep, dstate = scan.backward(dy, scan.state(dfinal_state), checkpoints, need_output=z is not None)

    ddrive, dstep = scan.unfold(ddrive), scan.unfold(dstep)
    du = ddrive * scan.step
    dstep = torch.addcmul(dstep, ddrive, scan.u)
    if delta_softplus:
        dstep = dstep * torch.sigmoid(scan.raw_step)
    dD = dz = None
    if D is not None:
        du = torch.addcmul(du, dy, D.to(scan.real))
        dD = (dy * scan.u).sum((0, 1)).to(D.dtype)
    if z is not None:
        y = scan.unfold(y)
        y = scan.flip(y if D is None else torch.addcmul(y, scan.u, D.to(scan.real)))
        sigmoid = torch.sigmoid(gate)
        dz = (dout * y * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype)
    dB = scan.B.gradient if isinstance(scan.B, Constant) else scan.flip(scan.unfold(scan.B.gradient))
    dC = scan.C.gradient if isinstance(scan.C, Constant) else scan.flip(scan.unfold(scan.C.gradient))
    return (
        scan.flip(du).to(u.dtype).contiguous(),
        scan.flip(dstep).to(delta.dtype).contiguous(),
        _like(scan.A.gradient, A),
        _like(dB, B),
        _like(dC, C),
        dD,
        dz,
        None if delta_bias is None else dstep.sum((0, 1)).to(delta_bias.dtype),
        None if initial_state is None else _like(dstate.transpose(1, 2), initial_state),
    )


def _like(gradient: Tensor, argument: Tensor) -> Tensor:
    """The gradient with its argument's shape and dtype: the real part where the argument is real."""
    if gradient.is_complex() and not argument.is_complex():
        gradient = gradient.real
    return gradient.reshape(argument.shape).to(argument.dtype).contiguous()


class _Scan:
    """One call's inputs in the recurrence's dtype, in time order, with each sequence cut into lanes.

    A lane's tensors are (R, S, ...): R = B * lanes rows of S steps. States are (R, N, D): the channels, by far the
    longest axis, are contiguous for vector instructions, and B and C are scalars along it.
    """

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        delta_bias: Tensor | None,
        seq_idx: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
    ) -> None:
        self.batch, self.length, self.channels = u.shape
        self.d_state, self.reverse = A.shape[1], reverse
        self.dtype = state_dtype(u, delta, A, B, C)
        self.real = torch.empty((), dtype=self.dtype).real.dtype
        self._cut_into_lanes()

        self.u = self.flip(u.to(self.real))
        self.raw_step = self.flip(delta.to(self.real))
        if delta_bias is not None:
            self.raw_step = self.raw_step + delta_bias.to(self.real)
        self.step = F.softplus(self.raw_step) if delta_softplus else self.raw_step
        self.lane_step = self.fold(self.step)
        self.lane_drive = self.fold(self.step * self.u)
        self.log_reset: Tensor | None = None
        if seq_idx is not None:
            # Where a sequence begins, -inf on top of the log decay makes the decay exactly 0.
            seq_idx = self.flip(seq_idx)
            begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            zero = torch.zeros(begins.shape, dtype=self.dtype, device=u.device)
            self.log_reset = self.fold(zero.masked_fill_(begins, -torch.inf))[:, :, None, None]
        self.A = Constant(A)
        self.B, self.C = self._coefficients(B), self._coefficients(C)

    def _cut_into_lanes(self) -> None:
        step = self.batch * self.channels * self.d_state
        chunks = (self.length + CHUNK - 1) // CHUNK
        self.lanes, self.lane_length = 1, self.length
        if step < SMALL_STEP:
            chunks_a_lane = -(-chunks // -(-LANED_STEP // step))
            if chunks_a_lane < chunks:
                self.lanes, self.lane_length = -(-chunks // chunks_a_lane), chunks_a_lane * CHUNK
        self.rows = self.batch * self.lanes

    def _coefficients(self, values: Tensor) -> Constant | PerStep:
        values = values.to(self.dtype)
        if values.dim() == 2:
            return Constant(values)
        return PerStep(self.fold(self.flip(values if values.dim() == 4 else values.unsqueeze(2))))

    def flip(self, x: Tensor) -> Tensor:
        """Turns (B, L, ...) from the caller's order to the scan's, and back."""
        return x.flip(1) if self.reverse else x

    def fold(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (R, S, ...). Zeros fill the last lane: steps of size 0, which leave the state alone."""
        missing = self.lanes * self.lane_length - self.length
        if missing:
            x = torch.cat((x, x.new_zeros(self.batch, missing, *x.shape[2:])), dim=1)
        return x.reshape(self.rows, self.lane_length, *x.shape[2:])

    def unfold(self, x: Tensor) -> Tensor:
        """(R, S, ...) to (B, L, ...)."""
        return x.reshape(self.batch, self.lanes * self.lane_length, *x.shape[2:])[:, : self.length]

    def state(self, state: Tensor | None) -> Tensor:
        """A caller's (B, D, N), or None for zeros, as (B, N, D)."""
        if state is None:
            return self.lane_step.new_zeros(self.batch, self.d_state, self.channels, dtype=self.dtype)
        return state.to(self.dtype).transpose(1, 2).contiguous()

    def row_groups(self) -> list[slice]:
        """Rows go through time together, as many as a tile holds; lanes are few enough to go all at once."""
        if self.lanes > 1:
            return [slice(0, self.rows)]
        rows = max(1, min(self.rows, TILE // (CHUNK * self.d_state * self.channels)))
        return [slice(first, min(first + rows, self.rows)) for first in range(0, self.rows, rows)]

    def times(self, backwards: bool = False) -> Iterator[slice]:
        starts = range(0, self.lane_length, CHUNK)
        for start in reversed(starts) if backwards else starts:
            yield slice(start, min(start + CHUNK, self.lane_length))

    def tile_buffers(self, rows: slice, count: int) -> list[Tensor]:
        elements = (rows.stop - rows.start) * min(CHUNK, self.lane_length) * self.d_state * self.channels
        return [torch.empty(elements, dtype=self.dtype, device=self.u.device) for _ in range(count)]

    def view(self, buffer: Tensor, rows: slice, times: slice) -> Tensor:
        """The front of a buffer as a tile (rows, times, N, D)."""
        shape = rows.stop - rows.start, times.stop - times.start, self.d_state, self.channels
        return buffer[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

    def decay(self, rows: slice, times: slice, out: Tensor) -> Tensor:
        """a_t = exp(delta_t A), 0 where a sequence begins."""
        offset = None if self.log_reset is None else self.log_reset[rows, times]
        return self.A.outer(rows, times, self.lane_step[rows, times], out, offset).exp_()

    def states(self, rows: slice, times: slice, state: Tensor, a: Tensor, h: Tensor) -> Tensor:
        """h_t = a_t h_{t-1} + delta_t B_t u_t from ``state``: fills the tiles a and h, returns the last state."""
        self.decay(rows, times, a)
        self.B.outer(rows, times, self.lane_drive[rows, times], h)
        for a_t, h_t in zip(a.unbind(1), h.unbind(1), strict=True):
            state = torch.addcmul(h_t, a_t, state, out=h_t)
        return state

    def adjoints(self, rows: slice, times: slice, arriving: Tensor, dy: Tensor, a: Tensor, g: Tensor) -> None:
        """g_t = C_t dy_t + a_{t+1} g_{t+1}, where ``arriving`` is the last a_{t+1} g_{t+1}: fills the tile g."""
        self.C.outer(rows, times, dy[rows, times], g, conjugate=True)
        g[:, -1] += arriving
        a_steps, g_steps = a.unbind(1), g.unbind(1)
        for t in range(len(g_steps) - 2, -1, -1):
            torch.addcmul(g_steps[t], a_steps[t + 1], g_steps[t + 1], out=g_steps[t])

    def lane_decay(self) -> Tensor:
        """The product of a whole lane's decays, (B, lanes, N, D): the exponential of a sum, never a quotient."""
        offset = None if self.log_reset is None else self.log_reset.sum(1, keepdim=True)
        total = self.lane_step.sum(1, keepdim=True)
        out = torch.empty(self.rows, 1, self.d_state, self.channels, dtype=self.dtype, device=total.device)
        rows, times = slice(0, self.rows), slice(0, 1)
        return self.A.outer(rows, times, total, out, offset).exp_().view(self.batch, self.lanes, *out.shape[2:])

    def lane_starts(self, initial: Tensor) -> Tensor:
        """The state at which each lane starts, (R, N, D): scan every lane from zero, then join them one by one."""
        if self.lanes == 1:
            return initial
        ends = torch.zeros(self.rows, *initial.shape[1:], dtype=self.dtype, device=initial.device)
        for rows in self.row_groups():
            a, h = self.tile_buffers(rows, 2)
            for times in self.times():
                tile = self.view(a, rows, times), self.view(h, rows, times)
                ends[rows] = self.states(rows, times, ends[rows], *tile)
        ends = ends.view(self.batch, self.lanes, *initial.shape[1:])
        starts, decay = torch.empty_like(ends), self.lane_decay()
        state = initial
        for lane in range(self.lanes):
            starts[:, lane] = state
            state = torch.addcmul(ends[:, lane], decay[:, lane], state)
        return starts.view(self.rows, *initial.shape[1:])

    def lane_arrivals(self, dfinal: Tensor, dy: Tensor) -> Tensor:
        """What reaches each lane's end from the lanes after it, (R, N, D): as ``lane_starts``, from the other side."""
        if self.lanes == 1:
            return dfinal
        leaving = torch.zeros(self.rows, *dfinal.shape[1:], dtype=self.dtype, device=dfinal.device)
        for rows in self.row_groups():
            a, g = self.tile_buffers(rows, 2)
            for times in self.times(backwards=True):
                a_tile, g_tile = self.view(a, rows, times), self.view(g, rows, times)
                self.decay(rows, times, a_tile).conj_physical_()
                self.adjoints(rows, times, leaving[rows], dy, a_tile, g_tile)
                torch.mul(a_tile[:, 0], g_tile[:, 0], out=leaving[rows])
        leaving = leaving.view(self.batch, self.lanes, *dfinal.shape[1:])
        arriving, decay = torch.empty_like(leaving), self.lane_decay().conj_physical_()
        arrives = dfinal
        for lane in range(self.lanes - 1, -1, -1):
            arriving[:, lane] = arrives
            arrives = torch.addcmul(leaving[:, lane], decay[:, lane], arrives)
        return arriving.view(self.rows, *dfinal.shape[1:])

    def forward(self, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C h (R, S, D), the last state (B, N, D), and the checkpoints."""
        y = torch.empty(self.rows, self.lane_length, self.channels, dtype=self.real, device=initial.device)
        shape = checkpoint_shape(self.batch, self.length, self.channels, self.d_state)
        checkpoints = torch.empty(shape, dtype=self.dtype, device=initial.device)
        state = self.lane_starts(initial).clone()
        for rows in self.row_groups():
            a, h = self.tile_buffers(rows, 2)
            for times in self.times():
                slots = self.slots(checkpoints, rows, times)
                slots.copy_(state[rows].view(-1, self.lanes, *state.shape[1:])[:, : slots.shape[1]])
                tile = self.view(h, rows, times)
                state[rows] = self.states(rows, times, state[rows], self.view(a, rows, times), tile)
                y[rows, times] = self.readout(rows, times, tile, scratch=self.view(a, rows, times))
        return y, state.view(self.batch, self.lanes, *state.shape[1:])[:, -1], checkpoints

    def backward(
        self, dy: Tensor, dfinal: Tensor, checkpoints: Tensor, need_output: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Gradients of the drive delta u and of the step's decay, both (R, S, D), and of the first state (B, N, D).

        Before them C h again where asked for; the gradients of A, B and C stay with them.
        """
        dy = self.fold(2 * dy if self.dtype.is_complex else dy)
        y = torch.empty_like(dy) if need_output else None
        ddrive, dstep = torch.empty_like(dy), torch.empty_like(dy)
        arriving = self.lane_arrivals(dfinal, dy).clone()
        for rows in self.row_groups():
            buffers = self.tile_buffers(rows, 3)
            for times in self.times(backwards=True):
                here = rows, times
                a, h, g = (self.view(buffer, *here) for buffer in buffers)
                slots = self.slots(checkpoints, *here)
                start = arriving.new_zeros(slots.shape[0], self.lanes, *slots.shape[2:])
                start[:, : slots.shape[1]] = slots
                start = start.flatten(0, 1)
                self.states(*here, start, a, h)
                if y is not None:
                    y[here] = self.readout(*here, h, scratch=g)
                for tile in (start, a, h):
                    tile.conj_physical_()
                self.C.add_gradient(*here, h, dy[here], scratch=g)
                self.adjoints(*here, arriving[rows], dy, a, g)
                # From here on a holds a_t g_t, which the step before receives, then the gradient of log a_t.
                torch.mul(a, g, out=a)
                arriving[rows] = a[:, 0]
                a[:, 1:] *= h[:, :-1]
                a[:, 0] *= start
                ddrive[here] = self.B.contract(*here, g, scratch=h, conjugate=True).real
                self.B.add_gradient(*here, g, self.lane_drive[here], scratch=h)
                dstep[here] = self.A.contract(*here, a, scratch=h, conjugate=True).real
                self.A.add_gradient(*here, a, self.lane_step[here], scratch=h)
        return y, ddrive, dstep, arriving.view(self.batch, self.lanes, *arriving.shape[1:])[:, 0]

    def slots(self, checkpoints: Tensor, rows: slice, times: slice) -> Tensor:
        """The checkpoints of one chunk of each lane, (B, lanes, N, D); the last lane may have run out of them."""
        return checkpoints[rows, times.start // CHUNK :: -(-self.lane_length // CHUNK)]

    def readout(self, rows: slice, times: slice, h: Tensor, scratch: Tensor) -> Tensor:
        """C h, (rows, times, D). Complex states stand for conjugate pairs, whose sum is twice the real part."""
        y = self.C.contract(rows, times, h, scratch)
        return 2 * y.real if self.dtype.is_complex else y
