"""Attention without a direction: Vaswani et al. (2017), arXiv 1706.03762."""

from __future__ import annotations

import torch
from torch import Tensor

from mambakit.mixers.attention import Attention
from mambakit.mixers.base import NonCausal


class FullAttention(NonCausal, Attention):
    """Softmax attention of every element to every element of its sequence, before and behind it alike.

        y_t = sum_s softmax_s(q_t R(s - t) k_s / sqrt(P)) v_s,    output = out_proj(y)

    with heads and rotary positions R as of :class:`mambakit.mixers.Attention`. Not causal: there is no state, and
    :meth:`step` is refused. Packed and padded batches use a mask of (B, L, L) bits.

    Args:
        d_model: width of input and output.
        n_heads: H, query heads; by default the most that divide d_model into even heads of 64 channels or more.
        n_kv_heads: G, heads of keys and values, a divisor of H; H by default.
        d_head: P, channels a head; d_model / H by default.
        d_rotary: rotated channels a head, even; all by default, 0 for none: the order of elements is then not seen.
        rotary_base: ratio of the slowest to the fastest rotation.
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
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, d_rotary, rotary_base, bias=bias)

    def mix_all(self, x: Tensor, *, seq_idx: Tensor | None, lengths: Tensor | None) -> Tensor:
        queries, keys, values = self._heads(self.in_proj(x))
        places = torch.arange(x.shape[1], device=x.device)
        queries, keys = self._turn(queries, places), self._turn(keys, places)
        visible = None
        if seq_idx is not None:
            # A value that comes back after another is another sequence.
            sequence = torch.zeros_like(seq_idx)
            sequence[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1)
            visible = sequence[:, None, :, None] == sequence[:, None, None, :]
        if lengths is not None:
            real = (places < lengths.unsqueeze(1))[:, None, None, :]
            # An element always sees itself, so that no row of scores is empty.
            real = real | (places == places.unsqueeze(1))
            visible = real if visible is None else visible & real
        return self._attend(queries, keys, values, visible, False)
