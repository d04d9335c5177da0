"""What the vision models with stages share: stem, stages at strides 4, 8, 16 and 32, head, and timm's model protocol.

Letters: B batch, H height, W width, D channels. Inside, images are channels-last: (B, H, W, D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambakit.mixers.base import SequenceMixer
from mambakit.mixers.ss2d import SS2D
from mambakit.mlp import MLP
from mambakit.optim import SPARED_NAMES

# The linear layers whose weights begin as VMamba's do; those that set a mixer's steps keep their own beginning.
REDRAWN = ("in_proj", "out_proj", "fc1", "fc2", "head")


class Permute(nn.Module):
    """Other axes' order; it also keeps VMamba's numbers of the layers around it."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Block(nn.Module):
    """x + op(norm(x)), then x + mlp(norm2(x)), on (B, H, W, D).

    ``op`` is any sequence mixer: it reads the image row by row, SS2D as the image it is.
    """

    def __init__(self, dim: int, op: SequenceMixer, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = op
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        if isinstance(self.op, SS2D):
            mixed = self.op.mix_image(normed)
        else:
            mixed = self.op(normed.flatten(1, 2)).unflatten(1, x.shape[1:3])
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks of one width, then, but for the last stage, a convolution to half the resolution and the next width."""

    def __init__(self, blocks: Sequence[nn.Module], dim: int, next_dim: int | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if next_dim is not None:
            self.downsample = nn.Sequential(
                Permute(0, 3, 1, 2),
                nn.Conv2d(dim, next_dim, 3, stride=2, padding=1),
                Permute(0, 2, 3, 1),
                nn.LayerNorm(next_dim),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim), before the downsampling. Under autocast what the blocks add to is kept in float32."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Pyramid(nn.Module):
    """A stem of two convolutions, four stages, norm, pooling and a linear head, under VMamba's names.

    Images may have any size: each stride rounds up. Obeys timm's model protocol, TorchScript and FX tracing excepted;
    ``features_only=True`` gives maps at strides 4, 8, 16 and 32.

    Args:
        dims: D of the stages.
        stages: their blocks, each (B, H, W, D) to the same shape.
        in_chans: channels of an image.
        num_classes: outputs of the head; 0 for none, which leaves the pooled features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the normalised map unpooled.
        drop_rate: dropout before the head.
    """

    def __init__(
        self,
        dims: Sequence[int],
        stages: Sequence[Sequence[nn.Module]],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_chans, dims[0] // 2, 3, stride=2, padding=1),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(dims[0] // 2),
            Permute(0, 3, 1, 2),
            nn.GELU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, stride=2, padding=1),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(dims[0]),
        )
        following = [*dims[1:], None]
        self.layers = nn.ModuleList(
            Stage(blocks, dim, after) for blocks, dim, after in zip(stages, dims, following, strict=True)
        )
        self.classifier = nn.ModuleDict(
            {"norm": nn.LayerNorm(dims[-1]), "drop": nn.Dropout(drop_rate), "head": nn.Identity()}
        )
        self.reset_classifier(num_classes, global_pool)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": dim, "reduction": 4 * 2**i} for i, dim in enumerate(dims)
        ]
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in REDRAWN:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(check_checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the normalised map (B, D, H / 32, W / 32)."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = cast(Stage, stage).downsample(stage(x))
        return self.classifier["norm"](x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The normalised map to logits (B, num_classes); with ``pre_logits`` to what the head would read."""
        x = self.classifier["drop"](self.classifier["pool"](x))
        return x if pre_logits else self.classifier["head"](x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps that chosen stages end with, before the downsampling.

        Args:
            x: (B, in_chans, H, W).
            indices: which stages: None for all, n for the last n, or a list, negative ones from the end.
            norm: normalise the last stage's map.
            stop_early: run no further than the last chosen stage.
            output_fmt: "NCHW": (B, D, H, W); "NHWC": (B, H, W, D).
            intermediates_only: give the list alone.

        Returns:
            ``(map, intermediates)``, the map as of :meth:`forward_features`, or the intermediates.

        Raises:
            ValueError: another output_fmt.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"{type(self).__name__}: output_fmt={output_fmt!r}, expected 'NCHW' or 'NHWC'")
        taken, last = feature_take_indices(len(self.layers), indices)
        end = last if stop_early else len(self.layers) - 1
        x, found = self.patch_embed(x), []
        for i, stage in enumerate(self.layers[: end + 1]):
            y = stage(x)
            final = i == len(self.layers) - 1
            if i in taken:
                kept = self.classifier["norm"](y) if norm and final else y
                found.append(kept.permute(0, 3, 1, 2) if output_fmt == "NCHW" else kept)
            x = y if i == end else cast(Stage, stage).downsample(y)
        if intermediates_only:
            return found
        return (self.classifier["norm"](x) if end == len(self.layers) - 1 else x).permute(0, 3, 1, 2), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` does not need for these stages; returns their indices."""
        taken, last = feature_take_indices(len(self.layers), indices)
        shortened = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        cast(Stage, self.layers[-1]).downsample = nn.Identity()
        if prune_norm or shortened:
            self.classifier["norm"] = nn.Identity()
        if prune_head or shortened:
            self.num_features = self.feature_info[last]["num_chs"]  # type: ignore[assignment]
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.classifier["head"]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of ``num_classes`` outputs, or none for 0; ``global_pool`` as of the class, None to keep it."""
        if global_pool is not None:
            if global_pool not in ("avg", "max", "avgmax", "catavgmax", ""):
                raise ValueError(
                    f"{type(self).__name__}: global_pool={global_pool!r}, expected 'avg', 'max', 'avgmax', "
                    "'catavgmax' or ''"
                )
            self.global_pool = global_pool
            pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True) if global_pool else nn.Identity()
            self.classifier["pool"] = pool
            self.head_hidden_size = self.num_features * (2 if global_pool == "catavgmax" else 1)
        self.num_classes = num_classes
        self.classifier["head"] = nn.Identity()
        if num_classes > 0:
            like = next(self.parameters())
            head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.classifier["head"] = head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what it stored."""
        for stage in self.layers:
            cast(Stage, stage).grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to one depth, for layer-wise rates: the stem, then each block, or each stage."""
        blocks: Any = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),
            (r"^classifier\.norm", (99999,)),
        ]
        if coarse:
            blocks = [(r"^layers\.(\d+)", None), (r"^classifier\.norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """What decides the memory of the mixers: matrices among it, which timm would decay."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in SPARED_NAMES}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a file as ``model`` takes them.

    VMamba's lie under "model"; a linear layer that was a convolution of one point has its weights (out, in, 1, 1).
    """
    weights, own = dict(state_dict.get("model", state_dict)), model.state_dict()
    for name, value in weights.items():
        if name in own and value.dim() == own[name].dim() + 2 and value.shape[-2:] == (1, 1):
            weights[name] = value.flatten(-3)
    return weights


def check_checkpoint(model: Pyramid, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise ValueError, in words, where a state dictionary is of other depths or another width."""
    norm, own = state_dict.get(f"{prefix}classifier.norm.weight"), model.classifier["norm"]
    if norm is not None and isinstance(own, nn.LayerNorm) and len(norm) != own.normalized_shape[0]:
        raise ValueError(
            f"checkpoint: its last stage is {len(norm)} wide, and this model's {own.normalized_shape[0]}; make the "
            "model of that size to load it"
        )
    start = f"{prefix}layers."
    keys = [key.removeprefix(start).split(".") for key in state_dict if key.startswith(start)]
    pairs = {(int(key[0]), int(key[2])) for key in keys if key[1] == "blocks"}
    depths = tuple(sum(stage == i for stage, _ in pairs) for i in range(len(model.layers)))
    wanted = tuple(len(cast(Stage, stage).blocks) for stage in model.layers)
    if pairs and depths != wanted:
        raise ValueError(
            f"checkpoint: its stages have {depths} blocks, and this model's {wanted}; make the model with "
            f"depths={depths} to load it"
        )
