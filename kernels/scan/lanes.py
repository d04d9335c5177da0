"""How the vectorised scan lays sequences out: cut into lanes, lanes into chunks, read and written in either direction.

Letters: B batch, L length, D channels, N state size, R = B * lanes rows scanned side by side, S elements of a lane.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16
# Elements of one tile: 2 MB of float32, so that the three tiles in use stay in a core's share of the L2 and L3 caches.
TILE = 2**19
# A step of fewer elements than the first number costs more in calls than in arithmetic. Then each sequence is cut into
# lanes scanned side by side, enough of them for steps of the second number; the price is a second pass over time, to
# find the state at which each lane starts.
SMALL_STEP, LANED_STEP = 2**13, 2**15


class Chunk(NamedTuple):
    """Some rows, and at most ``CHUNK`` of their elements in the order of the scan."""

    rows: slice
    times: slice


class Lanes:
    """Each of B sequences of L elements as ``count`` lanes of S elements, a multiple of ``CHUNK`` if there are several.

    Series are (R, S, ...), states (R, N, D). Chunks are counted in the scan's direction: only this class knows in
    which direction that lies in memory.
    """

    def __init__(self, batch: int, length: int, channels: int, d_state: int, reverse: bool) -> None:
        self.batch, self.length, self.channels, self.d_state = batch, length, channels, d_state
        self.reverse = reverse
        step = batch * channels * d_state
        chunks = -(-length // CHUNK)
        self.count, self.lane_length = 1, length
        if step < SMALL_STEP:
            chunks_a_lane = -(-chunks // -(-LANED_STEP // step))
            if chunks_a_lane < chunks:
                self.count, self.lane_length = -(-chunks // chunks_a_lane), chunks_a_lane * CHUNK
        self.rows = batch * self.count
        self.missing = self.count * self.lane_length - length

    def fold(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (R, S, ...), with zeros behind the last element of the last lane."""
        if self.missing:
            zeros = x.new_zeros(self.batch, self.missing, *x.shape[2:])
            x = torch.cat((zeros, x) if self.reverse else (x, zeros), dim=1)
        return x.reshape(self.rows, self.lane_length, *x.shape[2:])

    def unfold(self, x: Tensor) -> Tensor:
        """(R, S, ...) to (B, L, ...)."""
        x = x.view(self.batch, self.count * self.lane_length, *x.shape[2:])
        return x[:, self.missing :] if self.reverse else x[:, : self.length]

    def by_lane(self, state: Tensor) -> Tensor:
        """(R, N, D) to (B, lanes, N, D), lanes in the order of the scan."""
        state = state.view(-1, self.count, *state.shape[1:])
        return state.flip(1) if self.reverse else state

    def by_row(self, state: Tensor) -> Tensor:
        """The inverse of ``by_lane``."""
        return (state.flip(1) if self.reverse else state).flatten(0, 1)

    def read(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Elements (rows, times, ...) of an (R, S, ...), in the order of the scan."""
        return x[chunk.rows, self._where(chunk.times)].flip(1) if self.reverse else x[chunk]

    def write(self, x: Tensor, chunk: Chunk, value: Tensor) -> None:
        """The inverse of ``read``; a complex value for a real tensor gives its real part."""
        if value.is_complex() and not x.is_complex():
            value = value.real
        x[chunk.rows, self._where(chunk.times)] = value.flip(1) if self.reverse else value

    def _where(self, times: slice) -> slice:
        return slice(self.lane_length - times.stop, self.lane_length - times.start) if self.reverse else times

    def row_groups(self) -> list[slice]:
        """Rows go through time together, as many as a tile holds; lanes are few enough to go all at once."""
        if self.count > 1:
            return [slice(0, self.rows)]
        rows = max(1, min(self.rows, TILE // (CHUNK * self.d_state * self.channels)))
        return [slice(first, min(first + rows, self.rows)) for first in range(0, self.rows, rows)]

    def chunks(self, rows: slice, backwards: bool = False) -> Iterator[Chunk]:
        """The chunks of some rows, first to last in the scan's direction, or last to first."""
        starts = range(0, self.lane_length, CHUNK)
        for start in reversed(starts) if backwards else starts:
            yield Chunk(rows, slice(start, min(start + CHUNK, self.lane_length)))

    def buffers(self, rows: slice, count: int, like: Tensor) -> list[Tensor]:
        """Memory for ``count`` tiles, of the dtype and on the device of ``like``."""
        elements = (rows.stop - rows.start) * min(CHUNK, self.lane_length) * self.d_state * self.channels
        return [like.new_empty(elements) for _ in range(count)]

    def tiles(self, buffers: list[Tensor], chunk: Chunk) -> list[Tensor]:
        """The front of each buffer as a tile (rows, times, N, D)."""
        rows, times = (part.stop - part.start for part in chunk)
        shape = rows, times, self.d_state, self.channels
        return [buffer[: math.prod(shape)].view(shape) for buffer in buffers]

    def slots(self, checkpoints: Tensor, chunk: Chunk) -> Tensor:
        """The checkpoints of one chunk of each lane, (B, lanes, N, D); the last lane may have run out of them."""
        return checkpoints[chunk.rows, chunk.times.start // CHUNK :: -(-self.lane_length // CHUNK)]
