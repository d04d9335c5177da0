"""Puts our mixers into models that exist: in place of their attention, or of their convolutions.

Letters: B batch, L length, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambakit.backbone import mixer_factory
from mambakit.mixers.base import SequenceMixer
from mambakit.mixers.bidirectional import Bidirectional
from mambakit.mixers.s4nd import S4NDConv

if TYPE_CHECKING:
    from mambakit.backbone import MixerName

Where = str | Callable[[str, nn.Module], bool]


def swap_mixers(
    model: nn.Module,
    mixer: MixerName | Callable[[int], SequenceMixer] = "mamba2",
    where: Where | None = None,
    *,
    bidirectional: bool = True,
) -> dict[str, nn.Module]:
    """Replace the self-attention of a model by a mixer, in place; everything else stays as it is.

    >>> model = timm.create_model("deit_tiny_patch16_224", pretrained=True)
    >>> swap_mixers(model, "mamba2", where="blocks.*[02468].attn")  # every second block

    Found are timm's ``Attention`` (ViT, DeiT and what else is built from it) and torch's ``nn.MultiheadAttention``, in
    ``nn.TransformerEncoderLayer`` and elsewhere, whatever its ``batch_first``. A mixer takes the width, device, dtype
    and mode of the attention whose place it takes, and new weights. Kept are class tokens, positions, norms, MLPs,
    layer scales, dropout behind the attention, padding masks. Attention weights exist no longer: where torch's module
    returns them beside its output, the new one returns None. Call it before the optimiser is made, as in a
    LightningModule's ``__init__``. Where timm asks a model which parameters not to decay (``no_weight_decay``), it is
    told those of the mixers too.

    Args:
        model: holds the attention; it is changed.
        mixer: as of :class:`mambakit.Backbone`: a name, a class, or a callable taking d_model.
        where: which attention: a pattern of module names as in a shell ("blocks.*.attn"), or a function of name and
            module; None for all.
        bidirectional: give a causal mixer both directions (:class:`mambakit.mixers.Bidirectional`), which attention
            without a mask has. False leaves it as it is, for models that attend to the past only; a causal mask is then
            taken as what the mixer does anyway.

    Returns:
        what was replaced, by name.

    Raises:
        ValueError: nothing matches; attention to another sequence (a decoder's), or with another width of keys or
            outputs. A mask other than a padding mask is refused when the model is called.
    """
    attentions = {name: module for name, module in _named(model, where) if _is_attention(module)}
    if not attentions:
        raise ValueError(_nothing("swap_mixers", model, where, "attention", _is_attention))
    make = mixer_factory(mixer)
    for name, module in attentions.items():
        _check_attention(name, module, model)
    made: dict[nn.Module, nn.Module] = {}  # a module that stands in several places stays one
    for name, module in attentions.items():
        if module not in made:
            made[module] = _in_place_of(module, make, bidirectional)
        _put(model, name, made[module])
    new = set(made.values())
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(part in new for part in module.modules()):
            # Else it hands padded batches over as nested tensors, to layers that its fused kernel would serve.
            module.use_nested_tensor = False
        if callable(getattr(module, "no_weight_decay", None)):
            _spare(module, new)
    return attentions


def swap_convolutions(model: nn.Module, where: Where | None = None, **options: Any) -> dict[str, nn.Module]:
    """Replace convolutions of a model by S4ND, which is as large as its input, in place (Nguyen et al. 2022).

    >>> model = timm.create_model("convnext_tiny")
    >>> swap_convolutions(model, d_state=16)  # the depth-wise convolution of every block

    Args:
        model: holds the convolutions; it is changed.
        where: which convolutions, as of :func:`swap_mixers`; None for all depth-wise ones of two or three dimensions. A
            dense one costs a system of states for each pair of channels.
        options: of :class:`mambakit.mixers.S4NDConv`.

    Returns:
        what was replaced, by name.

    Raises:
        ValueError: nothing matches, or a convolution that S4ND cannot stand for (groups, dilation, padding), named.
    """
    wanted = _is_depthwise if where is None else _is_convolution
    convolutions = {name: module for name, module in _named(model, where) if wanted(module)}
    if not convolutions:
        raise ValueError(_nothing("swap_convolutions", model, where, "depth-wise convolution", wanted))
    made: dict[nn.Module, nn.Module] = {}
    for name, module in convolutions.items():
        try:
            made[module] = made.get(module) or S4NDConv.like(module, **options).train(module.training)
        except ValueError as error:
            raise ValueError(f"swap_convolutions: {name} cannot be replaced: {error}") from error
    for name, module in convolutions.items():
        _put(model, name, made[module])
    return convolutions


class InPlaceOfAttention(nn.Module):
    """A mixer where timm's ``Attention`` was: (B, L, D) to (B, L, D), then the dropout that followed it."""

    def __init__(self, mixer: SequenceMixer, proj_drop: nn.Module) -> None:
        super().__init__()
        self.mixer, self.proj_drop = mixer, proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Raises ValueError for a mask, unless it is the causal one and the mixer is causal."""
        hidden = None if attn_mask is None else ~attn_mask if attn_mask.dtype == torch.bool else attn_mask != 0
        _check_mask(self.mixer, hidden, is_causal, x.shape[1])
        return self.proj_drop(self.mixer(x))


class InPlaceOfMultihead(nn.Module):
    """A mixer where an ``nn.MultiheadAttention`` was, called as that is called; returns (output, None)."""

    # What nn.TransformerEncoderLayer looks at to see whether its fused attention may serve: no biases, so it may not.
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, mixer: SequenceMixer, embed_dim: int, num_heads: int, batch_first: bool) -> None:
        super().__init__()
        self.mixer = mixer
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query (B, L, D) or (L, B, D), as ``batch_first`` says, or (L, D); key and value must be the same.

        ``key_padding_mask`` (B, L) or (L,), True or -inf at padding, is the mixer's mask turned round. There are no
        weights, whether asked for or not.

        Raises:
            ValueError: key or value is another sequence; a mask that is not the mixer's own.
        """
        if key is not query or (value is not query and value is not key):
            raise ValueError(
                "swap_mixers: this attention reads keys or values of another sequence, which no mixer does; leave it "
                "out by where"
            )
        x = query if query.dim() == 3 else query.unsqueeze(0)
        turned = query.dim() == 3 and not self.batch_first
        if turned:
            x = x.transpose(0, 1)
        # In torch's masks, unlike timm's, True hides; so does what is added to a score where it is not 0.
        _check_mask(self.mixer, None if attn_mask is None else attn_mask != 0, is_causal, x.shape[1])
        real = None if key_padding_mask is None else (key_padding_mask == 0).view(x.shape[:2])
        y = self.mixer(x, mask=real)
        if turned:
            y = y.transpose(0, 1)
        return (y if query.dim() == 3 else y.squeeze(0)), None


class Spared:
    """What a model's ``no_weight_decay`` gives from now on; a class, so that the model can be copied and saved."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def __call__(self) -> set[str]:
        return set(self.names)


def _is_timm_attention(module: nn.Module) -> bool:
    """Whether it is timm's; where timm has not been imported there can be none."""
    layers = sys.modules.get("timm.layers")
    return layers is not None and type(module) is layers.Attention


def _is_attention(module: nn.Module) -> bool:
    return _is_timm_attention(module) or type(module) is nn.MultiheadAttention


def _is_convolution(module: nn.Module) -> bool:
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels == module.out_channels > 1


def _named(model: nn.Module, where: Where | None) -> list[tuple[str, nn.Module]]:
    """Every place of a module, by name, where ``where`` holds."""

    def holds(name: str, module: nn.Module) -> bool:
        if where is None:
            return True
        return fnmatchcase(name, where) if isinstance(where, str) else where(name, module)

    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if holds(name, module)]


def _nothing(
    function: str, model: nn.Module, where: Where | None, kind: str, wanted: Callable[[nn.Module], bool]
) -> str:
    """What to say where nothing matches: what there is of the kind, or what looks like it."""
    kinds = type(model).__name__
    there = [name for name, module in model.named_modules() if wanted(module)]
    if there:
        few = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
        return f"{function}: where={where!r} matches no {kind} of this {kinds}; it has {few}"
    alike = {type(module).__name__ for module in model.modules() if "attention" in type(module).__name__.lower()}
    other = f", only {', '.join(sorted(alike))}, whose windows or positions a mixer would lose" if alike else ""
    return f"{function}: this {kinds} has no {kind} that can be replaced{other}"


def _check_attention(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raise unless a mixer can do what this attention does."""
    if name == "":
        raise ValueError(
            f"swap_mixers: model is itself the attention, a {type(module).__name__}; give the model that holds it"
        )
    parent, _, own = name.rpartition(".")
    if isinstance(model.get_submodule(parent), nn.TransformerDecoderLayer) and own == "multihead_attn":
        raise ValueError(
            f"swap_mixers: {name} attends to another sequence, the encoder's, which no mixer does; leave it out, as by "
            "where='*.self_attn'"
        )
    if isinstance(module, nn.MultiheadAttention):
        sizes = {"embed_dim": module.embed_dim, "kdim": module.kdim, "vdim": module.vdim}
    else:
        sizes = {"dim": module.qkv.in_features, "dim_out": module.proj.out_features}  # type: ignore[union-attr]
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"swap_mixers: {name} has {', '.join(f'{key}={value}' for key, value in sizes.items())}, expected the same "
            "width throughout; leave it out by where"
        )


def _in_place_of(module: nn.Module, make: Callable[[int], SequenceMixer], bidirectional: bool) -> nn.Module:
    """The module to stand where ``module`` stood."""
    multihead = isinstance(module, nn.MultiheadAttention)
    width = module.embed_dim if multihead else module.qkv.in_features  # type: ignore[union-attr]
    mixer = make(width)  # type: ignore[arg-type]
    if bidirectional and mixer.causal:
        mixer = Bidirectional(width, make)  # type: ignore[arg-type]
    mixer = mixer.to(next(module.parameters()))
    if multihead:
        place: nn.Module = InPlaceOfMultihead(mixer, module.embed_dim, module.num_heads, module.batch_first)  # type: ignore[arg-type]
    else:
        place = InPlaceOfAttention(mixer, module.proj_drop)  # type: ignore[arg-type]
    return place.train(module.training)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _spare(model: nn.Module, places: set[nn.Module]) -> None:
    """Let ``model.no_weight_decay`` name the parameters of ``places`` that are not to be decayed as well."""
    spared = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if module in places
        for own, parameter in module.named_parameters()
        if getattr(parameter, "_no_weight_decay", False)
    }
    model.no_weight_decay = Spared(set(model.no_weight_decay()) | spared)  # type: ignore[operator, assignment]


def _check_mask(mixer: SequenceMixer, hidden: Tensor | None, is_causal: bool, length: int) -> None:
    """Raise unless what is hidden, (L, L) bool or None, is nothing, or what comes later and the mixer is causal."""
    if hidden is None and not is_causal:
        return
    kind = type(mixer).__name__
    if not mixer.causal:
        raise ValueError(
            f"swap_mixers: the model gives attn_mask or is_causal, but {kind} sees all elements; leave the mask away, "
            "or swap with bidirectional=False where it is a causal one"
        )
    if hidden is None or is_causal:
        return
    later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    if not bool((hidden == later).all()):
        raise ValueError(
            f"swap_mixers: the model gives an attn_mask other than the causal one, but {kind} sees exactly what came "
            "before; leave the mask away, or leave this attention out by where"
        )
