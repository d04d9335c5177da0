"""The backbone: norm, mix, add; layer on layer. (B, L, d_model) in and out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambakit.kernels import rms_norm
from mambakit.mixers.base import RightPadded, SequenceMixer, State, check_sequence

MixerName = Literal["mamba1", "attention"]
MIXER_HOMES = {
    "mamba1": "mambakit.mixers.mamba1:Mamba1",
    "attention": "mambakit.mixers.attention:Attention",
}


@dataclass
class BackboneState(State):
    """One mixer state a layer."""

    layers: tuple[Any, ...]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019), with the residual addition in the same pass."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(norm(x + residual), x + residual)``; the sum is kept in float32 whatever x is."""
        return rms_norm(x, self.weight, residual=residual, eps=self.eps, prenorm=True, residual_in_fp32=True)


class Layer(nn.Module):
    """One residual layer: the stream x grows by mixer(norm(x)).

    The addition is made by the next layer's norm, which reads the sum anyway: a layer takes and gives the pair
    (last mixer's output, stream before it).
    """

    def __init__(self, mixer: SequenceMixer, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        state: Any,
        seq_idx: Tensor | None,
        lengths: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        hidden, residual = self.norm(hidden, residual)
        hidden, state = self.mixer.mix(hidden, state=state, seq_idx=seq_idx, lengths=lengths, return_state=return_state)
        return hidden, residual, state

    def from_stream(self, stream: Tensor, dtype: torch.dtype, *rest: Any) -> tuple[Tensor, Any]:
        """The mixer's output in ``dtype`` and its state, from the sum of the pair: one tensor to keep, not two."""
        hidden, _ = self.norm(stream)
        state, seq_idx, lengths, return_state = rest
        return self.mixer.mix(
            hidden.to(dtype), state=state, seq_idx=seq_idx, lengths=lengths, return_state=return_state
        )


class Backbone(nn.Module):
    """A stack of residual layers around any sequence mixer.

    >>> encoder = Backbone(d_model=256, n_layers=8, mixer="mamba1")
    >>> y = encoder(x)  # (batch, length, 256) to (batch, length, 256)

    Parameters are named as in mamba_ssm's ``MixerModel``: ``layers.{i}.mixer.*``, ``layers.{i}.norm.weight``,
    ``norm_f.weight``, and ``embedding.*`` where an embedding is given.

    Args:
        d_model: width of input and output.
        n_layers: number of layers.
        mixer: a name, a SequenceMixer class, or a callable taking d_model, such as ``partial(Mamba1, d_state=32)``.
        dropout: probability of dropping an element of the input and of each mixer's output, in training.
        norm_eps: epsilon of the norms.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping what it stored.
        embedding: turns the raw input into (B, L, d_model) first; heads and models set it.
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int,
        mixer: MixerName | Callable[[int], SequenceMixer] = "mamba1",
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        gradient_checkpointing: bool = False,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"Backbone: n_layers={n_layers}, expected at least 1")
        self.d_model = d_model
        self.gradient_checkpointing = gradient_checkpointing
        self.embedding = embedding
        make_mixer = mixer_factory(mixer)
        self.layers = nn.ModuleList(Layer(make_mixer(d_model), d_model, norm_eps) for _ in range(n_layers))
        self.norm_f = RMSNorm(d_model, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self._scale_residual_outputs()

    @torch.no_grad()
    def _scale_residual_outputs(self) -> None:
        """The stream is a sum over layers: shrink each addend by sqrt(n_layers) at the start (GPT-2, mamba_ssm)."""
        for name, weight in self.layers.named_parameters():
            if name.endswith("mixer.out_proj.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight.div_(math.sqrt(len(self.layers)))
            elif name.endswith(("in_proj.bias", "out_proj.bias")):
                nn.init.zeros_(weight)

    def forward(
        self,
        x: Tensor,
        *,
        state: BackboneState | None = None,
        seq_idx: Tensor | None = None,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Map a batch of sequences; arguments and law as of :meth:`SequenceMixer.forward`.

        Args:
            x: (B, L, d_model), or what ``embedding`` takes.
            state: continue from here instead of from an empty memory.
            seq_idx: (B, L) int32; a change of value begins another sequence.
            mask: (B, L) bool, True at real elements.
            return_state: also return the state after the last real element.

        Returns:
            y (B, L, d_model), or ``(y, state)``.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        check_sequence("Backbone", x, self.d_model, seq_idx, mask)
        padded = None if mask is None else RightPadded(mask)
        if padded is not None:
            x = padded.pack(x)
            seq_idx = None if seq_idx is None else padded.pack_seq_idx(seq_idx)
        lengths = None if padded is None else padded.lengths

        hidden, residual, states = self.dropout(x), None, []
        for i, layer in enumerate(self.layers):
            rest = (None if state is None else state.layers[i], seq_idx, lengths, return_state)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                wide = torch.promote_types(hidden.dtype, torch.float32)
                residual = hidden.to(wide) if residual is None else residual + hidden
                from_stream = cast(Layer, layer).from_stream
                hidden, new_state = checkpoint(from_stream, residual, hidden.dtype, *rest, use_reentrant=False)
            else:
                hidden, residual, new_state = layer(hidden, residual, *rest)
            hidden = self.dropout(hidden)
            states.append(new_state)
        y, _ = self.norm_f(hidden, residual)
        if padded is not None:
            y = padded.unpack(y)
        return (y, BackboneState(tuple(states))) if return_state else y

    def step(self, x_t: Tensor, state: BackboneState) -> tuple[Tensor, BackboneState]:
        """One element: x_t (B, d_model), or what ``embedding`` takes without the length axis, to (y_t, state).

        Constant time and memory; the given state may be updated in place.
        """
        hidden = self.embedding(x_t.unsqueeze(1)).squeeze(1) if self.embedding is not None else x_t
        residual, states = None, []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            hidden, residual = layer.norm(hidden, residual)  # type: ignore[operator]
            hidden, layer_state = layer.mixer.step(hidden, layer_state)  # type: ignore[union-attr, operator]
            states.append(layer_state)
        y, _ = self.norm_f(hidden, residual)
        return y, BackboneState(tuple(states))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> BackboneState:
        """An empty memory for ``batch_size`` sequences."""
        return BackboneState(
            tuple(layer.mixer.init_state(batch_size, device=device, dtype=dtype) for layer in self.layers)  # type: ignore
        )


def mixer_factory(mixer: str | Callable[[int], SequenceMixer]) -> Callable[[int], SequenceMixer]:
    """The callable that a mixer's name, class or callable stands for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor something callable.
    """
    if isinstance(mixer, str):
        if mixer not in MIXER_HOMES:
            raise ValueError(f"mixer={mixer!r} is unknown; expected one of {', '.join(MIXER_HOMES)}, or a class")
        module, name = MIXER_HOMES[mixer].split(":")
        return getattr(importlib.import_module(module), name)
    if not callable(mixer):
        raise TypeError(f"mixer is a {type(mixer).__name__}; expected a name, a SequenceMixer class or a callable")
    return partial(_made_by, mixer)


def _made_by(mixer: Callable[[int], SequenceMixer], d_model: int) -> SequenceMixer:
    made = mixer(d_model)
    if not isinstance(made, SequenceMixer):
        raise TypeError(
            f"mixer gave a {type(made).__name__}; expected a SequenceMixer (mambakit.mixers.SequenceMixer, "
            "with mix and init_state)"
        )
    return made
