"""Classification: one vector of a sequence, and a label from it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mambakit.backbone import Backbone
from mambakit.embeddings.token import TokenEmbedding

PoolName = Literal["mean", "max", "last", "cls"]


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


class SequenceClassifier(nn.Module):
    """logits = W pool(backbone(embed(x))) + b, of a sequence of numbers, vectors or ids of any length.

    Args:
        backbone: the stack. Its own embedding is used where it has one; else ids go through a TokenEmbedding, numbers
            through a linear map to d_model.
        num_classes: K.
        in_chans: C, numbers an element, where the embedding is made here and there are no ids.
        vocab_size: V, where elements are ids.
        pool: "mean" or "max" over the real elements, "last" of them, which has seen all in a causal backbone, or
            "cls": a learnt vector before the first element, read off in its place (BERT's), which a causal backbone
            cannot use.
        dropout: of the pooled vector, in training.

    Raises:
        ValueError: an unknown pool, "cls" with a causal backbone, fewer than 2 classes.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        in_chans: int = 1,
        vocab_size: int | None = None,
        pool: PoolName = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in get_args(PoolName):
            raise ValueError(f"SequenceClassifier: pool={pool!r}, expected one of {', '.join(get_args(PoolName))}")
        if pool == "cls" and backbone.causal:
            raise ValueError(
                "SequenceClassifier: pool='cls' reads the first place, which has seen nothing in a causal backbone; "
                "take pool='last', or a mixer of both directions such as vim or bidirectional"
            )
        if num_classes < 2:
            raise ValueError(f"SequenceClassifier: num_classes={num_classes}, expected at least 2")
        self.pool = pool
        self.embedding: nn.Module
        if backbone.embedding is not None:
            self.embedding, backbone.embedding = backbone.embedding, None
        elif vocab_size is not None:
            self.embedding = TokenEmbedding(vocab_size, backbone.d_model)
        else:
            self.embedding = nn.Linear(in_chans, backbone.d_model)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.d_model)) if pool == "cls" else None
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.d_model, num_classes)
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
        if isinstance(self.embedding, nn.Linear) and (x.dim() != 3 or x.shape[2] != self.embedding.in_features):
            raise ValueError(
                f"SequenceClassifier: inputs have shape {tuple(x.shape)}, expected (batch, length, "
                f"{self.embedding.in_features}); for images give the backbone an embedding "
                "(mambakit.embeddings.PatchEmbedding), or take the data's view pixels"
            )
        hidden = self.embedding(x)
        if self.cls_token is not None:
            hidden = torch.cat((self.cls_token.to(hidden.dtype).expand(len(hidden), -1, -1), hidden), dim=1)
            mask = None if mask is None else torch.cat((mask.new_ones(len(mask), 1), mask), dim=1)
        vector = pool(self.backbone(hidden, mask=mask), "first" if self.pool == "cls" else self.pool, mask)
        return self.head(self.dropout(vector))
