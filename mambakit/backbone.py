"""The backbone: norm, mix, add; layer on layer. (B, L, d_model) in and out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambakit.layer import Layer, RMSNorm
from mambakit.mixers.base import RightPadded, SequenceMixer, State, check_rate, check_sequence, check_state_kind
from mambakit.mlp import Experts, MixtureOfExperts, MLPName, mlp_factory
from mambakit.spelling import did_you_mean

MixerName = Literal[
    "mamba1", "mamba2", "mamba3", "s4", "s4d", "dss", "s4nd", "s5", "hyena", "attention", "bidirectional", "vim", "ss2d"
]
MIXER_HOMES = {
    "mamba1": "mambakit.mixers.mamba1:Mamba1",
    "mamba2": "mambakit.mixers.mamba2:Mamba2",
    "mamba3": "mambakit.mixers.mamba3:Mamba3",
    "s4": "mambakit.mixers.s4:S4",
    "s4d": "mambakit.mixers.s4d:S4D",
    "dss": "mambakit.mixers.s4d:DSS",
    "s4nd": "mambakit.mixers.s4nd:S4ND",
    "s5": "mambakit.mixers.s5:S5",
    "hyena": "mambakit.mixers.hyena:Hyena",
    "attention": "mambakit.mixers.attention:Attention",
    "bidirectional": "mambakit.mixers.bidirectional:Bidirectional",
    "vim": "mambakit.mixers.vim:VimMixer",
    "ss2d": "mambakit.mixers.ss2d:SS2D",
}
LETTERS = {
    "a": "attention",
    "2": "mamba2",
    "3": "mamba3",
    "4": "s4",
    "5": "s5",
    "d": "s4d",
    "n": "s4nd",
    "h": "hyena",
    "b": "bidirectional",
    "v": "vim",
}


@dataclass
class BackboneState(State):
    """One mixer state a layer."""

    layers: tuple[Any, ...]


class SequenceModel(Protocol):
    """What a head or a task may be put around: a :class:`Backbone`, SaShiMi, WaveNet, or one like them.

    A module from (B, L, d_model) to the same. ``causal``: no output sees later elements, so that there is a state and
    a step. ``embedding``: the module that gives (B, L, d_model), which heads and models take over; None without one.
    """

    d_model: int
    embedding: nn.Module | None

    @property
    def causal(self) -> bool: ...

    def __call__(
        self, x: Tensor, *, state: Any = None, mask: Tensor | None = None, return_state: bool = False
    ) -> Any: ...

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> Any: ...

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]: ...


def is_sequence_model(value: Any) -> TypeGuard[SequenceModel]:
    """Whether a module has what a :class:`SequenceModel` has.

    Not by ``isinstance``: from Python 3.12 on that does not see what a module keeps among its submodules.
    """
    names = ("d_model", "embedding", "causal", "init_state", "step")
    return isinstance(value, nn.Module) and all(hasattr(value, name) for name in names)


class Backbone(nn.Module):
    """A stack of residual layers around any sequence mixer, or around several.

    >>> encoder = Backbone(d_model=256, n_layers=8, mixer="mamba1")
    >>> y = encoder(x)  # (batch, length, 256) to (batch, length, 256)

    Attention in one layer of eight, an MLP after every mixer, in every second layer a mixture of experts: Jamba
    (Lieber et al. 2024, arXiv 2403.19887). Attention and SwiGLU alone: the usual Transformer.

    >>> jamba = Backbone(d_model=256, n_layers=8, pattern="mmmmammm", mlp="swiglu", experts="moe")
    >>> transformer = Backbone(d_model=256, n_layers=8, mixer="attention", mlp="swiglu")

    Parameters are named as in mamba_ssm's ``MixerModel``: ``layers.{i}.mixer.*``, ``layers.{i}.norm.weight``, with
    an MLP ``layers.{i}.mlp.*`` and ``layers.{i}.norm2.weight``, ``norm_f.weight``, and ``embedding.*`` where an
    embedding is given.

    Args:
        d_model: width of input and output.
        n_layers: number of layers.
        mixer: a name, a SequenceMixer class, or a callable taking d_model, such as ``partial(Mamba1, d_state=32)``.
        dropout: probability of dropping an element of the input and of each mixer's output, in training.
        norm_eps: epsilon of the norms.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping what it stored.
        embedding: turns the raw input into (B, L, d_model) first; heads and models set it.
        pattern: kinds of mixer, a letter a layer, repeated to n_layers: "m" is ``mixer``, "a" attention,
            "2" Mamba-2, "3" Mamba-3, "4" S4, "5" S5, "d" S4D, "n" S4ND, "h" Hyena, "b" bidirectional Mamba-1,
            "v" Vim's.
        letters: further letters of the pattern, or other meanings: mixers as ``mixer`` takes them.
        mlp: after each mixer, with its own norm and addition: "mlp", "swiglu", "moe" (a mixture of experts), a class,
            or a callable taking d_model; None for mixers alone.
        experts: in place of ``mlp`` in every ``experts_every``-th layer; None for ``mlp`` throughout.
        experts_every: 2 gives experts to the second, fourth, ... layer.

    Raises:
        ValueError, TypeError: an unknown name or letter, a pattern whose length does not divide n_layers, named.
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
        pattern: str | None = None,
        letters: dict[str, MixerName | Callable[[int], SequenceMixer]] | None = None,
        mlp: MLPName | Callable[[int], nn.Module] | None = None,
        experts: MLPName | Callable[[int], nn.Module] | None = None,
        experts_every: int = 2,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"Backbone: n_layers={n_layers}, expected at least 1")
        self.d_model = d_model
        self.gradient_checkpointing = gradient_checkpointing
        self.embedding = embedding
        makers = layer_mixers(n_layers, mixer, pattern, letters or {})
        mlps = layer_mlps(n_layers, mlp, experts, experts_every)
        self.layers = nn.ModuleList(
            Layer(make_mixer(d_model), d_model, norm_eps, None if make_mlp is None else make_mlp(d_model), dropout)
            for make_mixer, make_mlp in zip(makers, mlps, strict=True)
        )
        self.norm_f = RMSNorm(d_model, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self._scale_residual_outputs()

    @torch.no_grad()
    def _scale_residual_outputs(self) -> None:
        """The stream is a sum of n addends: shrink each by sqrt(n) at the start (GPT-2, mamba_ssm)."""
        addends = sum(1 if layer.mlp is None else 2 for layer in self.layers)
        for module in self.layers.modules():
            if isinstance(module, Experts):
                module.reset_parameters(addends**-0.5)
        for name, weight in self.layers.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight.div_(math.sqrt(addends))
            elif name.endswith(("in_proj.bias", "out_proj.bias", "fc1.bias", "fc2.bias")):
                nn.init.zeros_(weight)

    def forward(
        self,
        x: Tensor,
        *,
        state: BackboneState | None = None,
        seq_idx: Tensor | None = None,
        mask: Tensor | None = None,
        return_state: bool = False,
        return_balance: bool = False,
    ) -> Any:
        """Map a batch of sequences; arguments and law as of :meth:`SequenceMixer.forward`.

        Args:
            x: (B, L, d_model), or what ``embedding`` takes.
            state: continue from here instead of from an empty memory.
            seq_idx: (B, L) int32; a change of value begins another sequence.
            mask: (B, L) bool, True at real elements.
            return_state: also return the state after the last real element.
            return_balance: also return how evenly the experts are used, a scalar to add to a loss with a small
                weight: the mean over the layers that have experts of what :class:`mambakit.mlp.MixtureOfExperts` gives.

        Returns:
            y (B, L, d_model), or a tuple of y and what else was asked for: ``(y, state)``, ``(y, balance)`` or
            ``(y, state, balance)``.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or state; ``return_balance`` where no layer has experts.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        check_sequence("Backbone", x, self.d_model, seq_idx, mask)
        if state is not None:
            self._check_state(state, x)
        padded = None if mask is None else RightPadded(mask)
        if padded is not None:
            x = padded.pack(x)
            seq_idx = None if seq_idx is None else padded.pack_seq_idx(seq_idx)
        lengths = None if padded is None else padded.lengths

        hidden, residual, states, balances = self.dropout(x), None, [], []
        for i, layer in enumerate(self.layers):
            rest = (None if state is None else state.layers[i], seq_idx, lengths, return_state)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                wide = torch.promote_types(hidden.dtype, torch.float32)
                residual = hidden.to(wide) if residual is None else residual + hidden
                from_stream = cast(Layer, layer).from_stream
                grown = checkpoint(from_stream, residual, hidden.dtype, *rest, use_reentrant=False)
            else:
                grown = layer(hidden, residual, *rest)
            hidden, residual, new_state, balance = grown
            hidden = self.dropout(hidden)
            states.append(new_state)
            if balance is not None:
                balances.append(balance)
        y, _ = self.norm_f(hidden, residual)
        if padded is not None:
            y = padded.unpack(y)
        if not (return_state or return_balance):
            return y
        if return_balance and not self.has_experts:
            raise ValueError("Backbone: return_balance=True, but no layer has experts; give mlp='moe' or experts='moe'")
        asked = (BackboneState(tuple(states)),) if return_state else ()
        return (y, *asked, torch.stack(balances).mean()) if return_balance else (y, *asked)

    @property
    def causal(self) -> bool:
        """Whether no output sees later elements, in any layer: then there is a state, and a step."""
        return all(cast(Layer, layer).mixer.causal for layer in self.layers)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has a mixture of experts, whose balance a training loss should mind."""
        return any(isinstance(layer.mlp, MixtureOfExperts) for layer in self.layers)

    def set_rate(self, rate: float) -> None:
        """Read signals whose sampling interval is ``rate`` times that of training, in ``forward`` and ``step`` alike.

        What has learnt sound at 16 kHz reads it at 8 kHz with 2.0, without further training; 1.0 is as trained. It
        rescales the time constants of mixers of S4's family (Gu, Goel and Ré 2022, arXiv 2111.00396).

        Raises:
            ValueError: a rate that is no positive number; a layer without time constants of its own.
        """
        check_rate("Backbone", rate)
        mixers = [cast(Layer, layer).mixer for layer in self.layers]
        for i, mixer in enumerate(mixers):
            if not mixer.rescales:
                raise ValueError(
                    f"Backbone: rate={rate}, but layer {i}, {type(mixer).__name__}, has no time constant to rescale; "
                    "take s4, s4d, dss, s4nd or s5, or give it signals at the sampling rate of training"
                )
        for mixer in mixers:
            mixer.set_rate(rate)

    def step(self, x_t: Tensor, state: BackboneState) -> tuple[Tensor, BackboneState]:
        """One element: x_t (B, d_model), or what ``embedding`` takes without the length axis, to (y_t, state).

        Constant time and memory, but for attention; the given state may be updated in place.
        """
        hidden = self.embedding(x_t.unsqueeze(1)).squeeze(1) if self.embedding is not None else x_t
        residual, states = None, []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            hidden, residual, layer_state = cast(Layer, layer).step(hidden, residual, layer_state)
            states.append(layer_state)
        y, _ = self.norm_f(hidden, residual)
        return y, BackboneState(tuple(states))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> BackboneState:
        """An empty memory for ``batch_size`` sequences."""
        return BackboneState(
            tuple(layer.mixer.init_state(batch_size, device=device, dtype=dtype) for layer in self.layers)  # type: ignore
        )

    def _check_state(self, state: Any, x: Tensor) -> None:
        """Raise unless ``state`` has the state of each layer's mixer, with x's rows, on x's device."""
        check_state_kind("Backbone", state, BackboneState, x)
        if len(state.layers) != len(self.layers):
            raise ValueError(
                f"Backbone: the state is of {len(state.layers)} layers, expected {len(self.layers)}; make it with "
                "init_state of this backbone"
            )
        for i, (layer, layer_state) in enumerate(zip(self.layers, state.layers, strict=True)):
            mixer = cast(Layer, layer).mixer
            mixer.check_state(f"Backbone: layer {i}, {type(mixer).__name__}", layer_state, x)


def layer_mixers(
    n_layers: int,
    mixer: str | Callable[[int], SequenceMixer],
    pattern: str | None,
    letters: Mapping[str, str | Callable[[int], SequenceMixer]],
) -> list[Callable[[int], SequenceMixer]]:
    """What makes each layer's mixer, by pattern and letters as :class:`Backbone` takes them.

    Raises:
        ValueError: a letter without a meaning, or a pattern whose length does not divide n_layers.
    """
    if pattern is None:
        if letters:
            raise ValueError(
                "Backbone: letters are given without a pattern that uses them; give pattern, such as 'mma'"
            )
        return [mixer_factory(mixer)] * n_layers
    if not pattern or n_layers % len(pattern):
        raise ValueError(
            f"Backbone: pattern={pattern!r} has {len(pattern)} letters, expected a number that divides "
            f"n_layers={n_layers}; the pattern is repeated whole"
        )
    kinds = {"m": mixer, **LETTERS, **letters}
    for place, letter in enumerate(pattern):
        if letter not in kinds:
            raise ValueError(
                f"Backbone: pattern={pattern!r} has {letter!r} at place {place}; expected one of "
                f"{', '.join(sorted(kinds))}, or give its meaning in letters"
            )
    return [mixer_factory(kinds[letter]) for letter in pattern] * (n_layers // len(pattern))


def layer_mlps(
    n_layers: int,
    mlp: str | Callable[[int], nn.Module] | None,
    experts: str | Callable[[int], nn.Module] | None,
    experts_every: int,
) -> list[Callable[[int], nn.Module] | None]:
    """What makes each layer's MLP, or None: ``experts`` in every ``experts_every``-th layer, ``mlp`` in the others.

    Raises:
        ValueError: ``experts_every`` below 1, or above n_layers, which no layer reaches.
    """
    make_mlp = None if mlp is None else mlp_factory(mlp)
    if experts is None:
        return [make_mlp] * n_layers
    if not 1 <= experts_every <= n_layers:
        raise ValueError(f"Backbone: experts_every={experts_every}, expected 1 to n_layers={n_layers}")
    make_experts = mlp_factory(experts)
    return [make_mlp if (i + 1) % experts_every else make_experts for i in range(n_layers)]


def mixer_factory(mixer: str | Callable[[int], SequenceMixer]) -> Callable[[int], SequenceMixer]:
    """The callable that a mixer's name, class or callable stands for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor something callable.
    """
    if isinstance(mixer, str):
        if mixer not in MIXER_HOMES:
            hint = did_you_mean(mixer, MIXER_HOMES)
            raise ValueError(f"mixer={mixer!r} is unknown{hint}; expected one of {', '.join(MIXER_HOMES)}, or a class")
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
