"""Causal softmax attention: the mixer of the Transformer, and the "a" of hybrid stacks such as Jamba."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.kernels import causal_conv1d, causal_conv1d_update
from mambakit.mixers.base import SequenceMixer, State, check_state_kind, last_inputs

ROOM = 64  # places that a full cache grows by at least


@dataclass
class AttentionState(State):
    """The keys and values so far: ``keys`` and ``values`` (B, T, G, P), of which the first ``used`` places count.

    None for ``used`` is all of T. ``real`` (B, T) bool tells entries from gaps where the rows hold unequal numbers of
    them, the newest of each row last; None: all are real. The key at place i is kept as turned by position
    ``start + i``. Scores depend on distances alone, so it does not matter where a row began. ``conv``
    (B, (H + 2 G) P, W - 1): the last inputs of the convolution, where there is one, oldest first.
    """

    keys: Tensor
    values: Tensor
    real: Tensor | None = None
    used: int | None = None
    start: int = 0
    conv: Tensor | None = None

    @property
    def length(self) -> int:
        """How many places count."""
        return self.keys.shape[1] if self.used is None else self.used


class Attention(SequenceMixer):
    """Softmax attention over what came before (Vaswani et al. 2017, arXiv 1706.03762).

    With queries q in H heads and keys k, values v in G heads, each of P channels (H / G query heads share one key
    head: Ainslie et al. 2023, arXiv 2305.13245):

        y_t = sum_{s <= t} softmax_s(q_t R(s - t) k_s / sqrt(P)) v_s,    output = out_proj(y)

    R(m) turns channels i and i + d_rotary / 2 by the angle m * rotary_base ** (-2 i / d_rotary) (Su et al. 2021, arXiv
    2104.09864). Channels from d_rotary up are not turned. With a window w, s > t - w as well.

    The state holds all keys and values, so a step costs time and memory in proportion to the elements read so far, or
    to the window. A step writes its key and value in place; a full cache is copied to one half as large again. Packed
    sequences and ragged states use a mask of (B, L, T + L) bits.

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
        d_conv: W, width of a causal convolution over queries, keys and values before all else, 2 to 4, as in
            mamba_ssm's ``MHA``; 0 for none.

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
        d_conv: int = 0,
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
        if d_conv not in (0, 2, 3, 4):
            raise ValueError(f"Attention: d_conv={d_conv}, expected a width of 2 to 4, or 0 for no convolution")
        width = (n_heads + 2 * self.n_kv_heads) * self.d_head
        self.in_proj = nn.Linear(d_model, width, bias=bias)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width) if d_conv else None
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
        projected = self.in_proj(x)
        queries, keys, values = self._convolve(projected, None if state is None else state.conv, seq_idx)
        real, start, before = None, 0, 0
        if state is not None:
            start, before = state.start, state.length
            real = None if state.real is None else F.pad(state.real[:, :before].bool(), (0, x.shape[1]), value=True)
        positions = torch.arange(start + before, start + before + x.shape[1], device=x.device)
        queries, keys = self._turn(queries, positions), self._turn(keys, positions)
        if state is not None:
            keys = torch.cat([state.keys[:, :before].to(keys.dtype), keys], dim=1)
            values = torch.cat([state.values[:, :before].to(values.dtype), values], dim=1)
        segments = None if seq_idx is None else _segments(seq_idx, keys.shape[1])

        visible = self._visible(x, keys.shape[1], segments, real)
        y = self._attend(queries, keys, values, visible, visible is None and x.shape[1] > 1)
        if not return_state:
            return y, None
        conv = None
        if self.conv1d is not None:
            width = self.conv1d.kernel_size[0] - 1
            conv = last_inputs(projected, lengths, width, None if state is None else state.conv, seq_idx)
        whole = AttentionState(keys, values, real, start=start, conv=conv)
        return y, self._remember(whole, segments, lengths, x.shape[1])

    def step(self, x_t: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """One element; time and memory in proportion to what is kept. Without gradients the cache is written in place.

        The given state then shares its memory with the one returned, and still ends where it did.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x_t, state.keys, self.in_proj.weight)):
            return super().step(x_t, state)
        projected, conv = self.in_proj(x_t), None
        if self.conv1d is not None:
            conv = cast(Tensor, state.conv).clone()
            projected = causal_conv1d_update(projected, conv, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        query, key, value = self._heads(projected.unsqueeze(1))
        state = self._with_room(state, key.dtype)
        place, end = state.length, state.length + 1
        position = torch.full((1,), state.start + place, device=x_t.device)
        state.keys[:, place:end], state.values[:, place:end] = self._turn(key, position), value
        first = 0 if self.window is None else max(0, end - self.window)
        visible = None
        if state.real is not None:
            state.real[:, place] = True
            visible = state.real[:, None, None, first:end].bool()
        y = self._attend(
            self._turn(query, position), state.keys[:, first:end], state.values[:, first:end], visible, False
        )
        return y.squeeze(1), replace(state, used=end, conv=conv)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> AttentionState:
        """An empty cache: keys and values (batch_size, 0, G, P)."""
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        empty = torch.zeros(batch_size, 0, self.n_kv_heads, self.d_head, device=device, dtype=dtype or weight.dtype)
        if self.conv1d is None:
            return AttentionState(empty, empty.clone())
        wide = torch.promote_types(weight.dtype, torch.float32)
        conv = torch.zeros(batch_size, len(weight), self.conv1d.kernel_size[0] - 1, device=device, dtype=dtype or wide)
        return AttentionState(empty, empty.clone(), conv=conv)

    def check_state(self, name: str, state: Any, x: Tensor) -> None:
        check_state_kind(name, state, AttentionState, x)
        if state.keys.shape[2:] != (self.n_kv_heads, self.d_head):
            raise ValueError(
                f"{name}: the state's keys are {tuple(state.keys.shape)}, expected (batch, any, "
                f"n_kv_heads={self.n_kv_heads}, d_head={self.d_head}); make it with this mixer's init_state"
            )
        if (state.conv is None) != (self.conv1d is None):
            raise ValueError(
                f"{name}: the state is of a mixer {'without' if state.conv is None else 'with'} a convolution, unlike "
                "this one; make it with this mixer's init_state"
            )

    def _convolve(self, projected: Tensor, before: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, ...]:
        """Queries (B, L, H, P), keys and values (B, L, G, P) from in_proj's output."""
        if self.conv1d is not None:
            weight = self.conv1d.weight.squeeze(1)
            projected = causal_conv1d(projected, weight, self.conv1d.bias, initial_state=before, seq_idx=seq_idx)
        return self._heads(projected)

    def _heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        heads = projected.unflatten(-1, (self.n_heads + 2 * self.n_kv_heads, self.d_head))
        return heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        """The output (B, L, d_model) of queries (B, L, H, P) over keys and values (B, T, G, P)."""
        y = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=visible,
            is_causal=causal,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return self.out_proj(y.transpose(1, 2).flatten(2))

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

    def _turn(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys (B, L, heads, P) turned by the angles of ``positions`` (L,) or (B, L) integers."""
        if self.d_rotary == 0:
            return heads
        wide = torch.promote_types(heads.dtype, torch.float32)
        half = self.d_rotary // 2
        # Positions of long sequences times the fastest angle: in float32 the rest of 2 pi would be lost.
        rate = self.rotary_base ** (-torch.arange(half, device=heads.device, dtype=torch.float64) / half)
        angle = positions[..., None, None] * rate
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        first, second, rest = heads.split([half, half, self.d_head - self.d_rotary], dim=-1)
        first, second = first.to(wide), second.to(wide)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(heads.dtype), rest], dim=-1)

    def _remember(
        self, state: AttentionState, segments: Tensor | None, lengths: Tensor | None, length: int
    ) -> AttentionState:
        """The cache after ``length`` new elements, of which row b has ``lengths[b]``: the newest of each row last."""
        keys, values, real, total = state.keys, state.values, state.real, state.length
        if segments is not None:
            last = segments == segments[:, -1:]
            real = last if real is None else real & last
        if lengths is not None:
            shift = (length - lengths).unsqueeze(1)
            place = torch.arange(total, device=keys.device) - shift
            inside = place.clamp(min=0)
            keys, values = (t.gather(1, inside[:, :, None, None].expand(-1, -1, *t.shape[2:])) for t in (keys, values))
            keys = self._turn(keys, shift)
            real = (place >= 0) if real is None else (place >= 0) & real.gather(1, inside)
        first = 0 if self.window is None else max(0, total - self.window + 1)
        # Copies: what is kept must not keep the longer tensors alive from which it was cut.
        keys, values = keys[:, first:].clone(), values[:, first:].clone()
        real = None if real is None else real[:, first:]
        return replace(state, keys=keys, values=values, real=real, start=state.start + first)

    def _with_room(self, state: AttentionState, dtype: torch.dtype) -> AttentionState:
        """The state, or a copy of what its window still needs, in ``dtype`` and with room for another element."""
        used = state.length
        if used < state.keys.shape[1] and state.keys.dtype == dtype:
            return state
        kept = used if self.window is None else min(used, self.window - 1)
        room = max(ROOM, kept // 2)

        def grown(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            new = tensor.new_zeros(len(tensor), kept + room, *tensor.shape[2:], dtype=dtype)
            new[:, :kept] = tensor[:, used - kept : used]
            return new

        real = None if state.real is None else grown(state.real, torch.bool)
        keys, values = grown(state.keys, dtype), grown(state.values, dtype)
        return AttentionState(keys, values, real, kept, state.start + used - kept, state.conv)


def _segments(seq_idx: Tensor, total: int) -> Tensor:
    """The number of changes of seq_idx (B, L) up to each element, after zeros for cached ones: (B, total).

    A value that comes back after another is another sequence. What is cached belongs to a row's first sequence.
    """
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1)
    return F.pad(changes, (total - changes.shape[1], 0))
