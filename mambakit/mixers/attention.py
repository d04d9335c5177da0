"""Causal softmax attention: the mixer of the Transformer, and the "a" of hybrid stacks such as Jamba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.mixers.base import SequenceMixer, State


@dataclass
class AttentionState(State):
    """The keys and values so far, the newest last: ``keys`` and ``values`` (B, T, G, P), as projected.

    ``real`` (B, T) bool tells entries from gaps where the rows hold unequal numbers of them; None: all are real. Keys
    are kept before their rotation. Rotary scores depend on distances alone, and those are read off the places in the
    cache, so it needs no positions and may be cut, padded and reordered.
    """

    keys: Tensor
    values: Tensor
    real: Tensor | None = None


class Attention(SequenceMixer):
    """Softmax attention over what came before (Vaswani et al. 2017, arXiv 1706.03762).

    With queries q in H heads and keys k, values v in G heads, each of P channels (H / G query heads share one key
    head: Ainslie et al. 2023, arXiv 2305.13245):

        y_t = sum_{s <= t} softmax_s(q_t R(s - t) k_s / sqrt(P)) v_s,    output = out_proj(y)

    R(m) turns channels i and i + d_rotary / 2 by the angle m * rotary_base ** (-2 i / d_rotary) (Su et al. 2021, arXiv
    2104.09864). Channels from d_rotary up are not turned. With a window w, s > t - w as well.

    The state holds all keys and values, so a step costs time and memory in proportion to the elements read so far, or
    to the window. Packed sequences and ragged states use a mask of (B, L, T + L) bits.

    Args:
        d_model: width of input and output.
        n_heads: H, query heads; by default the most that divide d_model into even heads of 64 channels or more (one
            head below that).
        n_kv_heads: G, heads of keys and values, a divisor of H; H by default.
        d_head: P, channels a head; d_model / H by default.
        d_rotary: rotated channels a head, even; all by default (less one of an odd head), 0 for none.
        rotary_base: ratio of the slowest to the fastest rotation.
        window: how many elements back a query sees, itself included; all by default.
        bias: in_proj and out_proj have biases.

    Raises:
        ValueError: sizes that do not divide or are out of range, named.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        d_rotary: int | None = None,
        rotary_base: float = 10000.0,
        window: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_heads is None:
            n_heads = next((n for n in range(d_model // 64, 1, -1) if d_model % (2 * n) == 0), 1)
        if n_heads < 1:
            raise ValueError(f"Attention: n_heads={n_heads}, expected at least 1")
        if d_head is None and d_model % n_heads:
            raise ValueError(
                f"Attention: d_model={d_model} is not divisible by n_heads={n_heads}; choose a divisor, or give d_head"
            )
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.d_head = d_model // n_heads if d_head is None else d_head
        self.d_rotary = self.d_head - self.d_head % 2 if d_rotary is None else d_rotary
        self.rotary_base = rotary_base
        self.window = window
        if self.n_kv_heads < 1 or n_heads % self.n_kv_heads:
            raise ValueError(f"Attention: n_kv_heads={n_kv_heads}, expected a divisor of n_heads={n_heads}")
        if self.d_rotary % 2 or not 0 <= self.d_rotary <= self.d_head:
            raise ValueError(f"Attention: d_rotary={d_rotary}, expected an even number up to d_head={self.d_head}")
        if window is not None and window < 1:
            raise ValueError(f"Attention: window={window}, expected at least 1 (an element sees itself), or None")
        self.in_proj = nn.Linear(d_model, (n_heads + 2 * self.n_kv_heads) * self.d_head, bias=bias)
        self.out_proj = nn.Linear(n_heads * self.d_head, d_model, bias=bias)

    def mix(
        self,
        x: Tensor,
        *,
        state: AttentionState | None = None,
        seq_idx: Tensor | None = None,
        lengths: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, AttentionState | None]:
        heads = self.in_proj(x).unflatten(-1, (self.n_heads + 2 * self.n_kv_heads, self.d_head))
        queries, keys, values = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        real = None
        if state is not None:
            self._check_state(state, keys)
            keys = torch.cat([state.keys.to(keys.dtype), keys], dim=1)
            values = torch.cat([state.values.to(values.dtype), values], dim=1)
            real = None if state.real is None else F.pad(state.real.bool(), (0, x.shape[1]), value=True)
        segments = None if seq_idx is None else _segments(seq_idx, keys.shape[1])

        visible = self._visible(x, keys.shape[1], segments, real)
        y = F.scaled_dot_product_attention(
            self._rotate(queries, keys.shape[1] - x.shape[1]).transpose(1, 2),
            self._rotate(keys, 0).transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=visible,
            is_causal=visible is None and x.shape[1] > 1,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y, self._remember(keys, values, real, segments, lengths, x.shape[1]) if return_state else None

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> AttentionState:
        """An empty cache: keys and values (batch_size, 0, G, P)."""
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        empty = torch.zeros(batch_size, 0, self.n_kv_heads, self.d_head, device=device, dtype=dtype or weight.dtype)
        return AttentionState(empty, empty.clone())

    def _visible(self, x: Tensor, total: int, segments: Tensor | None, real: Tensor | None) -> Tensor | None:
        """Which of ``total`` keys each query of x (B, L, D) sees, (1 or B, 1, L, total) bool.

        None stands for all of them where there is one query, and else for the plain causal rule: then no mask is made,
        and torch may choose its fastest kernel. Padding, being on the right, is behind every real query.
        """
        length = x.shape[1]
        windowed = self.window is not None and self.window < total
        plain = length in (1, total) and not windowed
        if plain and segments is None and real is None:
            return None
        key = torch.arange(total, device=x.device)
        query = key[total - length :].unsqueeze(1)
        visible = key <= query
        if self.window is not None:
            visible = visible & (key > query - self.window)
        visible = visible[None, None]
        if segments is not None:
            visible = visible & (segments[:, None, total - length :, None] == segments[:, None, None, :])
        if real is not None:
            # A query always sees itself, so that no row of scores is empty.
            visible = visible & (real[:, None, None, :] | (key == query))
        return visible

    def _rotate(self, heads: Tensor, start: int) -> Tensor:
        """Queries or keys (B, L, heads, P) turned by the angles of the positions from ``start`` on, in float32."""
        if self.d_rotary == 0:
            return heads
        wide = torch.promote_types(heads.dtype, torch.float32)
        half = self.d_rotary // 2
        channel = torch.arange(half, device=heads.device, dtype=wide)
        position = torch.arange(start, start + heads.shape[1], device=heads.device, dtype=wide)
        angle = position[:, None, None] * self.rotary_base ** (-channel / half)
        cos, sin = angle.cos(), angle.sin()
        first, second, rest = heads.split([half, half, self.d_head - self.d_rotary], dim=-1)
        first, second = first.to(wide), second.to(wide)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(heads.dtype), rest], dim=-1)

    def _remember(
        self,
        keys: Tensor,
        values: Tensor,
        real: Tensor | None,
        segments: Tensor | None,
        lengths: Tensor | None,
        length: int,
    ) -> AttentionState:
        """The cache after ``length`` new elements, of which row b has ``lengths[b]``: the newest of each row last."""
        total = keys.shape[1]
        if segments is not None:
            last = segments == segments[:, -1:]
            real = last if real is None else real & last
        if lengths is not None:
            place = torch.arange(total, device=keys.device) + (lengths - length).unsqueeze(1)
            inside = place.clamp(min=0)
            keys, values = (t.gather(1, inside[:, :, None, None].expand(-1, -1, *t.shape[2:])) for t in (keys, values))
            real = (place >= 0) if real is None else (place >= 0) & real.gather(1, inside)
        first = 0 if self.window is None else max(0, total - self.window + 1)
        # Copies: what is kept must not keep the longer tensors alive from which it was cut.
        keys, values = keys[:, first:].clone(), values[:, first:].clone()
        return AttentionState(keys, values, None if real is None else real[:, first:])

    def _check_state(self, state: Any, keys: Tensor) -> None:
        """Raise unless ``state`` is one of this mixer's, for the batch and on the device of keys (B, L, G, P)."""
        if not isinstance(state, AttentionState):
            raise TypeError(
                f"Attention: state is a {type(state).__name__}, expected the AttentionState of init_state or "
                "return_state=True"
            )
        got, want = state.keys.shape, keys.shape
        if (got[0], *got[2:]) != (want[0], *want[2:]):
            raise ValueError(
                f"Attention: the state's keys are {tuple(got)}, expected (batch={want[0]}, any, n_kv_heads={want[2]}, "
                f"d_head={want[3]}); make it with init_state({want[0]})"
            )
        if state.keys.device != keys.device:
            raise ValueError(
                f"Attention: the state is on {state.keys.device}, x on {keys.device}; move it by state.to(x.device)"
            )


def _segments(seq_idx: Tensor, total: int) -> Tensor:
    """The number of changes of seq_idx (B, L) up to each element, after zeros for cached ones: (B, total).

    A value that comes back after another is another sequence. What is cached belongs to a row's first sequence.
    """
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1)
    return F.pad(changes, (total - changes.shape[1], 0))
