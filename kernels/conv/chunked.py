"""The causal convolution as W shifted multiply-adds over channels-last memory, and its gradient.

On a CPU this is far quicker than the framework's depthwise convolution, whose weight gradient is not vectorised for
this shape. The work goes block by block, a block small enough for the cache, since every block is read W times.
Letters: B batch, L length, D channels, W width.

Both directions are one computation: the W-1 columns of state stand before the sequence (behind it when reversed), and
output t is a weighted sum of W neighbours in that longer sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_BLOCK = 2**18  # elements: 1 MB of float32


class _Convolution:
    """What forward and backward share: the taps, the state laid along time, the numbers of packed sequences."""

    def __init__(
        self, x: Tensor, weight: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None, reverse: bool
    ) -> None:
        self.x, self.reverse = x, reverse
        self.exact = torch.promote_types(x.dtype, torch.float32)
        self.width, self.past = weight.shape[1], weight.shape[1] - 1
        self.now = 0 if reverse else self.past  # the neighbour that is the present input
        self.taps = (weight.flip(1) if reverse else weight).t().to(self.exact).contiguous()  # (W, D)
        self.others = [k for k in range(self.width) if k != self.now]
        batch, _, channels = x.shape
        if initial_state is None:
            self.state = x.new_zeros(1, 1, 1, dtype=self.exact).expand(batch, self.past, channels)
        else:
            self.state = self.state_along_time(initial_state.to(self.exact))  # (B, W-1, D)
        self.sequence: Tensor | None = None
        if seq_idx is not None:  # a value may come back, so number the sequences by their changes
            changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            sides = (0, self.past) if reverse else (self.past, 0)
            self.sequence = F.pad(changes.cumsum(1).double()[:, None], sides, mode="replicate")[:, 0]

    def state_along_time(self, state: Tensor) -> Tensor:
        """(B, D, W-1), oldest first, to (B, W-1, D) in the order of time; its own inverse but for the axes."""
        return (state.flip(2) if self.reverse else state).transpose(1, 2)

    def blocks(self) -> Iterator[_Block]:
        batch, length, channels = self.x.shape
        if self.x.device.type != "cpu":
            yield _Block(self, slice(0, batch), 0, length)
            return
        steps = min(length, max(64, CPU_BLOCK // channels))
        rows = max(1, CPU_BLOCK // (length * channels))
        for row in range(0, batch, rows):
            for start in range(0, length, steps):
                yield _Block(self, slice(row, row + rows), start, min(start + steps, length))


class _Block:
    """Some rows, some stretch of time, and the W-1 neighbours beyond it."""

    def __init__(self, whole: _Convolution, rows: slice, start: int, stop: int) -> None:
        self.whole, self.rows, self.length = whole, rows, stop - start
        self.outputs = (rows, slice(start, stop))
        low, high = (start, stop + whole.past) if whole.reverse else (start - whole.past, stop)
        inside = slice(max(low, 0), min(high, whole.x.shape[1]))
        self.inputs = (rows, inside)  # what of x it reads
        self.from_state = slice(whole.past + min(low, 0), whole.past)  # what of the state, before x or behind it
        self.offset = inside.start - low
        padded = whole.x[self.inputs].to(whole.exact)
        if whole.reverse:
            self.from_state = slice(0, high - inside.stop)
        if self.from_state.stop > self.from_state.start:
            edge = whole.state[rows, self.from_state]
            padded = torch.cat([padded, edge] if whole.reverse else [edge, padded], dim=1)
        self.padded = padded
        self.sequence = None if whole.sequence is None else whole.sequence[rows, start : stop + whole.past]

    def neighbour(self, tensor: Tensor, k: int) -> Tensor:
        return tensor[:, k : k + self.length]

    def foreign(self, k: int) -> Tensor | None:
        """(B, L, 1), whether neighbour k lies in another sequence than the present input; None where none does."""
        if self.sequence is None or k == self.whole.now:
            return None
        return (self.neighbour(self.sequence, k) != self.neighbour(self.sequence, self.whole.now)).unsqueeze(-1)

    def convolve(self, bias: Tensor | None) -> Tensor:
        """The value before the activation."""
        now, taps = self.whole.now, self.whole.taps
        if bias is None:
            out = self.neighbour(self.padded, now) * taps[now]
        else:
            out = torch.addcmul(bias.to(self.whole.exact), self.neighbour(self.padded, now), taps[now])
        for k in self.whole.others:
            out.addcmul_(self.neighbour(self.padded, k), taps[k])
        if self.sequence is not None:
            self._mend_starts(out, bias, self.sequence)
        return out

    def _mend_starts(self, out: Tensor, bias: Tensor | None, sequence: Tensor) -> None:
        """Compute again the few outputs that saw another sequence. Masking every neighbour would cost far more, and
        subtracting what does not belong would let a NaN through.
        """
        present = self.neighbour(sequence, self.whole.now)
        same = torch.stack([self.neighbour(sequence, k) == present for k in range(self.whole.width)], dim=-1)
        row, time = (~same.all(-1)).nonzero(as_tuple=True)
        windows = self.padded[row[:, None], time[:, None] + torch.arange(self.whole.width, device=out.device)]
        values = (windows.masked_fill(~same[row, time].unsqueeze(-1), 0) * self.whole.taps).sum(1)
        out[row, time] = values if bias is None else values + bias


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """y (B, L, D) in x's dtype."""
    whole = _Convolution(x, weight, initial_state, seq_idx, reverse)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for block in whole.blocks():
        pre = block.convolve(bias)
        out[block.outputs] = F.silu(pre, inplace=True) if silu else pre
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; the value before the activation is computed again.

    That of x is written into ``dx`` where given: x's shape and dtype, its channels side by side, its rows anywhere.
    """
    whole = _Convolution(x, weight, initial_state, seq_idx, reverse)
    sums = torch.zeros(x.shape, dtype=whole.exact, device=x.device)
    dstate = torch.zeros(whole.state.shape, dtype=whole.exact, device=x.device)
    dtaps = torch.zeros_like(whole.taps)
    dbias = torch.zeros_like(whole.taps[0])
    for block in whole.blocks():
        dpre = dout[block.outputs].to(whole.exact)
        if silu:
            dpre = torch.ops.aten.silu_backward(dpre, block.convolve(bias))
        dpadded = torch.zeros_like(block.padded)
        for k in range(whole.width):
            foreign = block.foreign(k)
            into = dpre if foreign is None else dpre.masked_fill(foreign, 0)  # a product would let a NaN through
            block.neighbour(dpadded, k).addcmul_(into, whole.taps[k])
            dtaps[k] += (block.neighbour(block.padded, k) * into).sum(dim=(0, 1))
        if bias is not None:
            dbias += dpre.sum(dim=(0, 1))
        inside = sums[block.inputs]
        inside += dpadded[:, block.offset : block.offset + inside.shape[1]]
        if block.from_state.stop > block.from_state.start:
            edge = dstate[block.rows, block.from_state]
            edge += dpadded[:, inside.shape[1] :] if reverse else dpadded[:, : block.offset]
    dweight = dtaps.t().flip(1) if reverse else dtaps.t()
    dinitial_state = None
    if initial_state is not None:
        dinitial_state = dstate.flip(1) if reverse else dstate
        dinitial_state = dinitial_state.transpose(1, 2).to(initial_state.dtype).contiguous()
    return (
        sums.to(x.dtype) if dx is None else dx.copy_(sums),
        dweight.to(weight.dtype).contiguous(),
        None if bias is None else dbias.to(bias.dtype),
        dinitial_state,
    )


def forward_both(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool) -> Tensor:
    """One x by two filters, weight (2, D, W) and bias (2, D): forwards, and from the end, side by side (B, L, 2D)."""
    biases = (None, None) if bias is None else bias
    return torch.cat([forward(x, weight[i], biases[i], None, seq_idx, silu, bool(i)) for i in range(2)], dim=-1)


def backward_both(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, dx: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias of ``forward_both``; that of x is written into ``dx``, as by ``backward``."""
    sides = [
        backward(half, x, weight[i], None if bias is None else bias[i], None, seq_idx, silu, bool(i))
        for i, half in enumerate(dout.chunk(2, -1))
    ]
    torch.add(sides[0][0], sides[1][0], out=dx)
    dbiases = [dbias for _, _, dbias, _ in sides if dbias is not None]
    return torch.stack([dweight for _, dweight, _, _ in sides]), torch.stack(dbiases) if dbiases else None
