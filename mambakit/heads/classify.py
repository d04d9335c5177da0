"""Classification: one vector of a sequence, and a label from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from mambakit.backbone import Backbone, SequenceModel
from mambakit.embeddings.token import TokenEmbedding
from mambakit.heads.rc import RCLinear
from mambakit.mixers.base import State

PoolName = Literal["mean", "max", "last", "cls", "flatten"]


def pool(hidden: Tensor, how: Literal["mean", "max", "last", "first"], mask: Tensor | None = None) -> Tensor:
    """One vector a sequence: the mean or maximum over its real elements, its last one or its first one.

    Args:
        hidden: (B, L, D).
        how: mean and max are taken over, last and first chosen among, the real elements.
        mask: (B, L) bool, True at real elements; all are real without it.

    Returns:
        (B, D); the mean in float32 at least.

    Raises:
        ValueError: an unknown ``how``; a mask of another shape; a row without a real element.
    """
    batch, length, _ = hidden.shape
    if mask is None:
        mask = torch.ones(1, length, dtype=torch.bool, device=hidden.device).expand(batch, -1)
    elif mask.shape != hidden.shape[:2]:
        raise ValueError(f"pool: mask has shape {tuple(mask.shape)}, expected (batch, length) = {(batch, length)}")
    if how == "mean":
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return wide.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
    if how == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    if how in ("last", "first"):
        place = length - 1 - mask.flip(1).int().argmax(1) if how == "last" else mask.int().argmax(1)
        return hidden[torch.arange(batch, device=hidden.device), place]
    raise ValueError(f"pool: how={how!r}, expected mean, max, last or first")


def flatten(hidden: Tensor, places: int, mask: Tensor | None = None) -> Tensor:
    """(B, L, D) to (B, places * D), place by place: zeros where there is no real element.

    Raises:
        ValueError: L above ``places``.
    """
    length = hidden.shape[1]
    if length > places:
        raise ValueError(f"flatten: sequences of {length} vectors, expected at most places={places}")
    if mask is not None:
        hidden = hidden.masked_fill(~mask[..., None], 0)
    return nn.functional.pad(hidden, (0, 0, 0, places - length)).flatten(1)


def mask_of(lengths: Tensor, length: int) -> Tensor:
    """(B, L) bool, True at the first ``lengths[b]`` of L = ``length`` elements.

    Raises:
        ValueError: a length below 1 or above ``length``, named with its row.
    """
    wrong = ((lengths < 1) | (lengths > length)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"lengths: {int(lengths[row])} in row {row}, expected 1 to {length}, the length of the batch")
    return torch.arange(length, device=lengths.device) < lengths[:, None]


@dataclass
class ClassifierState(State):
    """What a :class:`SequenceClassifier` knows of the streams so far: the states of its parts, and what it pools.

    ``pooled`` (B, D) is the mean, the maximum or the last of ``count`` (B,) vectors; ``embedding`` is None where each
    element is embedded by itself.
    """

    embedding: Any
    backbone: Any
    pooled: Tensor
    count: Tensor


class SequenceClassifier(nn.Module):
    """logits = W pool(backbone(embed(x))) + b, of a sequence of numbers, vectors or ids of any length.

    An embedding may make fewer vectors than there are elements: it says by ``shorten(mask)`` which of them are real,
    and is given the mask. With a causal backbone a sequence may come piece by piece:

    >>> state = model.init_state(batch_size)
    >>> for piece in pieces:  # (batch, any length, in_chans)
    ...     logits, state = model.extend(piece, state)  # as of all pieces so far in one sequence

    Args:
        backbone: the stack, a Backbone, SaShiMi, WaveNet or Caduceus. Its own embedding is used where it has one; else
            ids go through a TokenEmbedding, numbers through a linear map to d_model. That of both strands (``rcps``)
            gets a head of the same logits for either (:class:`mambakit.heads.RCLinear`).
        num_classes: K.
        in_chans: C, numbers an element, where the embedding is made here and there are no ids.
        vocab_size: V, where elements are ids.
        pool: "mean" or "max" over the real elements, "last" of them, which has seen all in a causal backbone, or
            "cls": a learnt vector before the first element, read off in its place (BERT's), which a causal backbone
            cannot use. "flatten": all of them side by side, so that every place has weights of its own, for windows
            that are all cut at the same place. "mean" or "max" for both strands.
        dropout: of the pooled vector, in training.
        places: for "flatten", the vectors of a sequence, at most.

    Raises:
        ValueError: an unknown pool, "cls" with a causal backbone, "flatten" without ``places`` or these without it,
            fewer than 2 classes; (in a call) more vectors than ``places``.
    """

    def __init__(
        self,
        backbone: SequenceModel,
        num_classes: int,
        in_chans: int = 1,
        vocab_size: int | None = None,
        pool: PoolName = "mean",
        dropout: float = 0.0,
        places: int | None = None,
    ) -> None:
        super().__init__()
        if pool not in get_args(PoolName):
            raise ValueError(f"SequenceClassifier: pool={pool!r}, expected one of {', '.join(get_args(PoolName))}")
        if pool == "cls" and backbone.causal:
            raise ValueError(
                "SequenceClassifier: pool='cls' reads the first place, which has seen nothing in a causal backbone; "
                "take pool='last', or a mixer of both directions such as vim or bidirectional"
            )
        rcps = getattr(backbone, "rcps", False)
        if rcps and pool not in ("mean", "max"):
            raise ValueError(
                f"SequenceClassifier: pool={pool!r} with a backbone of both strands, of which one begins where the "
                "other ends; take pool='mean' or 'max', which are the same for both"
            )
        if (pool == "flatten") != (places is not None) or (places is not None and places < 1):
            raise ValueError(
                f"SequenceClassifier: pool={pool!r} with places={places}; give places, the vectors of a sequence, with "
                "pool='flatten', and with no other"
            )
        if num_classes < 2:
            raise ValueError(f"SequenceClassifier: num_classes={num_classes}, expected at least 2")
        self.pool, self.places = pool, places
        self.embedding: nn.Module
        if backbone.embedding is not None:
            self.embedding, backbone.embedding = backbone.embedding, None
        elif vocab_size is not None:
            self.embedding = TokenEmbedding(vocab_size, backbone.d_model)
        else:
            self.embedding = nn.Linear(in_chans, backbone.d_model)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.d_model)) if pool == "cls" else None
        self.backbone = cast(nn.Module, backbone)
        self.dropout = nn.Dropout(dropout)
        self.head = (RCLinear if rcps else nn.Linear)(backbone.d_model * (places or 1), num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, K).

        Args:
            x: (B, L, in_chans) floats, (B, L) ids, or what the backbone's own embedding takes.
            mask: (B, L) bool, True at real elements.

        Raises:
            ValueError: inputs of another shape than the embedding takes.
        """
        self._check_inputs(x)
        if hasattr(self.embedding, "shorten"):
            hidden = self.embedding(x, mask=mask)
            mask = None if mask is None else self.embedding.shorten(mask)  # type: ignore[operator]
        else:
            hidden = self.embedding(x)
        if self.cls_token is not None:
            hidden = torch.cat((self.cls_token.to(hidden.dtype).expand(len(hidden), -1, -1), hidden), dim=1)
            mask = None if mask is None else torch.cat((mask.new_ones(len(mask), 1), mask), dim=1)
        hidden = self.backbone(hidden, mask=mask)
        if self.places is not None:
            vector = flatten(hidden, self.places, mask)
        else:
            vector = pool(hidden, "first" if self.pool == "cls" else self.pool, mask)  # type: ignore[arg-type]
        return self.head(self.dropout(vector))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> ClassifierState:
        """Before the first element of ``batch_size`` streams. ``device`` and ``dtype`` default to the parameters'.

        Raises:
            ValueError: a backbone that is not causal, or an embedding that takes no pieces.
        """
        if not self.backbone.causal:
            raise ValueError(
                "SequenceClassifier: a stream is to be read piece by piece, but this backbone's outputs see later "
                "elements as well; give it whole sequences, or train one with a causal mixer such as mamba1 or s4d"
            )
        if self.places is not None:
            raise ValueError(
                "SequenceClassifier: a stream is to be read piece by piece, but pool='flatten' needs each vector at "
                "its place; give it whole sequences, or train one with pool='mean'"
            )
        weight = self.head.weight
        device, dtype = weight.device if device is None else device, weight.dtype if dtype is None else dtype
        embedding = None
        if not isinstance(self.embedding, (nn.Linear, TokenEmbedding)):
            if not hasattr(self.embedding, "extend"):
                raise ValueError(
                    f"SequenceClassifier: a stream is to be read piece by piece, but {type(self.embedding).__name__} "
                    "embeds whole inputs only; take mambakit.embeddings.WaveformEmbedding, or none"
                )
            embedding = self.embedding.init_state(batch_size, device=device, dtype=dtype)  # type: ignore[operator]
        pooled = torch.full(
            (batch_size, weight.shape[1]),
            -torch.inf if self.pool == "max" else 0.0,
            device=device,
            dtype=torch.promote_types(dtype, torch.float32),
        )
        count = torch.zeros(batch_size, 1, device=device, dtype=torch.int64)
        backbone = self.backbone.init_state(batch_size, device=device, dtype=dtype)  # type: ignore[operator]
        return ClassifierState(embedding, backbone, pooled, count)

    def extend(self, x: Tensor, state: ClassifierState) -> tuple[Tensor, ClassifierState]:
        """The next piece of each stream: logits (B, K) of all of it so far, and the state after it.

        Equal to ``forward`` of the pieces put together, whatever the cuts, in evaluation mode.

        Args:
            x: (B, k, in_chans) floats or (B, k) ids, k at least 1.
            state: as :meth:`init_state` or the call before gave it; it may be updated in place.

        Raises:
            ValueError: a piece of another shape than the embedding takes.
        """
        self._check_inputs(x)
        if state.embedding is None:
            hidden, embedding = self.embedding(x), None
        else:
            hidden, embedding = self.embedding.extend(x, state.embedding)  # type: ignore[operator]
        backbone, pooled, count = state.backbone, state.pooled, state.count
        if hidden.shape[1]:
            hidden, backbone = self.backbone(hidden, state=backbone, return_state=True)
            wide, count = hidden.to(pooled.dtype), count + hidden.shape[1]
            if self.pool == "mean":
                pooled = pooled + (wide - pooled.unsqueeze(1)).sum(1) / count
            elif self.pool == "max":
                pooled = torch.maximum(pooled, wide.amax(1))
            else:
                pooled = wide[:, -1]
        vector = pooled if self.pool == "mean" else pooled.to(hidden.dtype)
        return self.head(self.dropout(vector)), ClassifierState(embedding, backbone, pooled, count)

    def set_rate(self, rate: float) -> None:
        """Read signals whose sampling interval is ``rate`` times that of training (:meth:`mambakit.Backbone.set_rate`).

        Raises:
            ValueError: a backbone or an embedding that knows time by numbers of samples, which cannot be rescaled.
        """
        if not isinstance(self.backbone, Backbone):
            raise ValueError(
                f"SequenceClassifier: rate={rate}, but {type(self.backbone).__name__} groups samples by number, which "
                "cannot be rescaled; take mambakit.Backbone with a mixer of S4's family, such as s4d"
            )
        own = isinstance(self.embedding, (nn.Linear, TokenEmbedding))
        if not own and getattr(self.embedding, "receptive_field", None) != 1:
            raise ValueError(
                f"SequenceClassifier: rate={rate}, but {type(self.embedding).__name__} sees several samples at once, "
                "and its kernel cannot be rescaled; train a backbone without an embedding of its own, sample by sample"
            )
        self.backbone.set_rate(rate)

    def _check_inputs(self, x: Tensor) -> None:
        if isinstance(self.embedding, nn.Linear) and (x.dim() != 3 or x.shape[2] != self.embedding.in_features):
            raise ValueError(
                f"SequenceClassifier: inputs have shape {tuple(x.shape)}, expected (batch, length, "
                f"{self.embedding.in_features}); for images give the backbone an embedding "
                "(mambakit.embeddings.PatchEmbedding), or take the data's view pixels"
            )
