"""What the kernels of ``ssd`` share: tiles of rows, decays inside a tile, states, and the launch's choices.

Time is cut into tiles of Q steps. Inside a tile the recurrence is attention, matrices on the tensor cores; from tile to
tile travels the state (P, N) of a head, in registers. Decays are kept as base-2 logarithms summed up inside each tile
(``logs``), so that the decay between two steps of a tile is the exponential of a difference that is never positive.

``owners`` (B, 1 + L padded) numbers the sequences of a row: that of the element before the first, then of each. A decay
across a border is exactly 0, and what a decay of 0 multiplies is selected away, since it may be infinite.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels import dispatch
from mambakit.kernels.launch import launch

LOG2E = tl.constexpr(1.4426950408889634)
# exp(-120) is 0 in float32; a sum of 64 such logs still has its third place after the point.
LEAST_LOG = tl.constexpr(-120.0)


@triton.jit
def load_rows(pointer, t0, stride, i, c, length, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows t0 + i and BLOCK adjacent columns c of a matrix, 0 behind its length and its COUNT columns."""
    mask = (t0 + i < length)[:, None]
    if COUNT % BLOCK != 0:
        mask = mask & (c < COUNT)[None, :]
    start = pointer + tl.cast(t0, tl.int64) * stride
    return tl.load(start + i[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, value, t0, stride, i, c, length, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The opposite of ``load_rows``, rounded to the tensor's dtype."""
    mask = (t0 + i < length)[:, None]
    if COUNT % BLOCK != 0:
        mask = mask & (c < COUNT)[None, :]
    start = pointer + tl.cast(t0, tl.int64) * stride
    tl.store(start + i[:, None] * stride + c[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_decays(weights, logs, owners, t0, i, Q: tl.constexpr):
    """Of the tile at t0: its logs (Q,), weights (Q,), the decay from before the tile to each step (Q,), that from each
    step to the tile's end (Q,), and that through the tile.
    """
    log = tl.load(logs + t0 + i)
    end = tl.load(logs + t0 + Q - 1)
    carry, to_end, through = tl.exp2(log), tl.exp2(end - log), tl.exp2(end)
    if owners is not None:
        owner = tl.load(owners + t0 + 1 + i)
        before = tl.load(owners + t0)
        last = tl.load(owners + t0 + Q)
        carry = tl.where(owner == before, carry, 0.0)
        to_end = tl.where(owner == last, to_end, 0.0)
        through = tl.where(before == last, through, 0.0)
    return log, tl.load(weights + t0 + i), carry, to_end, through


@triton.jit
def decay_matrix(log, owners, t0, i, TURNED: tl.constexpr = False):
    """(Q, Q): the decay from step j (second axis) to step i, 0 where j is later or in another sequence.

    TURNED: from step i (first axis) to step j.
    """
    if TURNED:
        mask = i[:, None] <= i[None, :]
        difference = log[None, :] - log[:, None]
    else:
        mask = i[:, None] >= i[None, :]
        difference = log[:, None] - log[None, :]
    if owners is not None:
        owner = tl.load(owners + t0 + 1 + i)
        mask = mask & (owner[:, None] == owner[None, :])
    return tl.exp2(tl.where(mask, difference, float("-inf")))


@triton.jit
def scale(product, decay):
    """product * decay, and 0 where decay is: the product may be infinite there, or NaN."""
    return tl.where(decay != 0.0, product * decay, 0.0)


@triton.jit(do_not_specialize=["length", "tiles"])
def prepare_kernel(
    weights, log_decays, rows, logs, length, heads, tiles,
    w_b, w_l, w_h, a_b, a_l, a_h,
    Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """weights and log_decays (B, L, H), a head's steps side by side: rows, logs (B, H, tiles Q). Grid (B * tiles,)."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t0 = (tl.program_id(0) % tiles) * Q
    i = tl.arange(0, Q)[:, None]
    inside = t0 + i < length
    start = tl.cast(t0, tl.int64)
    for first in tl.range(0, heads, BH):
        h = first + tl.arange(0, BH)[None, :]
        mask = inside & (h < heads)
        weight = tl.load(weights + b * w_b + (start + i) * w_l + h * w_h, mask=mask, other=0.0).to(tl.float32)
        log = tl.load(log_decays + b * a_b + (start + i) * a_l + h * a_h, mask=mask, other=0.0).to(tl.float32)
        log = tl.cumsum(tl.where(log < LEAST_LOG, LEAST_LOG, log) * LOG2E, axis=0)
        place = (b * heads + h) * tiles * Q + start + i
        tl.store(rows + place, weight, mask=h < heads)
        tl.store(logs + place, log, mask=h < heads)


def ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, which outside a kernel takes as long as a small launch."""
    return -(-a // b)


class Prepared(NamedTuple):
    """What the kernels read of weights, decays and sequences: rows and logs (B, H, T Q), owners (B, 1 + T Q)."""

    weights: Tensor
    logs: Tensor
    owners: Tensor | None


def prepare(weights: Tensor, log_decays: Tensor, seq_idx: Tensor | None, Q: int) -> Prepared:
    batch, length, heads = weights.shape
    tiles = ceil_div(length, Q)
    rows, logs = (torch.empty(batch, heads, tiles * Q, dtype=torch.float32, device=weights.device) for _ in range(2))
    launch(
        prepare_kernel, (batch * tiles,), weights, log_decays, rows, logs, length, heads, tiles,
        *weights.stride(), *log_decays.stride(), Q=Q, BH=32, num_warps=4,
    )  # fmt: skip
    if seq_idx is None:
        return Prepared(rows, logs, None)
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1, dtype=torch.int32)
    owners = F.pad(changes, (2, tiles * Q - length))
    owners[:, 1 + length :] = owners[:, length, None]  # what is behind the end belongs to the last sequence
    return Prepared(rows, logs, owners)


class Tiling(NamedTuple):
    """Sizes a launch is compiled for. BP and BN: the powers of two that hold P and N."""

    Q: int
    BP: int
    BN: int
    operand: Any  # tl.dtype that the tensor cores multiply
    precision: str  # how they multiply float32

    @property
    def sizes(self) -> dict[str, Any]:
        """As the kernels name them."""
        return {"Q": self.Q, "BP": self.BP, "BN": self.BN, "OPERAND": self.operand, "PRECISION": self.precision}


def tiling(x: Tensor, B: Tensor, C: Tensor) -> Tiling:
    """bfloat16 is multiplied as it is. float16 goes as tf32: as many places, and room for states beyond 65,504.
    float32, and whatever is mixed, as three products of tf32. The interpreter has no product of bfloat16.
    """
    BP, BN = (max(16, 1 << (size - 1).bit_length()) for size in (x.shape[3], B.shape[3]))
    dtypes = {x.dtype, B.dtype, C.dtype}
    if dtypes == {torch.bfloat16} and not dispatch.INTERPRETED:
        return Tiling(64, BP, BN, tl.bfloat16, "tf32")
    return Tiling(32, BP, BN, tl.float32, "tf32" if dtypes == {torch.float16} else "tf32x3")


def unit_stride(tensor: Tensor | None) -> Any:
    """The tensor with adjacent elements along its last axis: itself where that holds already."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def row_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """(batch, time, head) strides of a (B, L, H, ...) tensor."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]  # type: ignore[return-value]


def skip_strides(D: Tensor | None) -> tuple[int, int]:
    """(head, channel) strides of D (H,) or (H, P)."""
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
