"""Vision Mamba: Zhu et al., "Vision Mamba" (2024), arXiv 2401.09417."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers import DropPath, resample_abs_pos_embed, resample_patch_embed
from timm.models import load_state_dict
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambakit.backbone import Backbone, Layer, MixerName
from mambakit.embeddings.patch import PatchEmbedding
from mambakit.mixers.base import SequenceMixer
from mambakit.optim import SPARED_NAMES

POOLS = ("token", "avg", "max", "avgmax", "")
SIZES = {192: "vim_tiny", 384: "vim_small", 768: "vim_base"}


class VisionMamba(nn.Module):
    """Patches, a class token in their middle, positions, layers of bidirectional Mamba, a linear head.

    With M patches x_1 ... x_M of an image, W their projection, E the positions and c the class token:

        T = [W x_1, ..., W x_{M/2}, c, W x_{M/2+1}, ..., W x_M] + E
        T <- T + mixer(norm(T)), layer after layer;    logits = head(norm_f(T)[M/2])

    The class token stands in the middle before positions are added, so E has M + 1 rows and its middle one is the class
    token's. The residual stream T is kept in float32 whatever the layers compute in. Parameters carry the original's
    names and layouts, so its checkpoints load strictly. They begin as the original's, but for the backward direction's
    steps: there its initialisation erases the bias of dt_proj_b, so that steps begin at softplus(0) = 0.69, and here
    both directions begin with steps of 0.001 to 0.1. Obeys timm's model protocol, TorchScript and FX tracing excepted.

    Args:
        img_size: height and width of an image, or one number for both.
        patch_size: height and width of a patch, or one number for both.
        stride: pixels from one patch to the next; the patch size by default.
        in_chans: channels of an image.
        num_classes: outputs of the head; 0 for none, which leaves the pooled features.
        global_pool: what the head reads: "token" the class token, "avg" and "max" the mean and the maximum of the
            patches, "avgmax" the mean of these two, "" every token unpooled.
        embed_dim: D, width of the layers.
        depth: number of layers.
        mixer: as of :class:`mambakit.Backbone`; a mixer that sees both ways.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the positions.
        drop_path_rate: stochastic depth: the last layer's output is dropped for a sample with this probability, the
            first layer's never, those between linearly.
        norm_eps: epsilon of the norms.
        dynamic_img_size: take images of any size that patches cover, resampling the positions for each.

    Raises:
        ValueError: a size that patches do not cover, an unknown pool or mixer, named.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        mixer: MixerName | Callable[[int], SequenceMixer] = "vim",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.num_features = self.head_hidden_size = embed_dim
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbedding(
            embed_dim, img_size, patch_size, stride, in_chans, strict_img_size=not dynamic_img_size
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        stack = Backbone(embed_dim, depth, mixer, norm_eps=norm_eps)
        self.layers = stack.layers
        self.drop_paths = nn.ModuleList(DropPath(drop_path_rate * i / max(1, depth - 1)) for i in range(depth))
        self.norm_f: nn.Module = stack.norm_f
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        reduction = max(self.patch_embed.stride)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.register_load_state_dict_pre_hook(check_checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalised tokens (B, M + 1, D), the class token in their middle."""
        hidden, residual = self._embed(x), None
        for i in range(len(self.layers)):
            hidden, residual = self._layer(i, hidden, residual)
        return self.norm_f(hidden, residual)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, M + 1, D) to logits (B, num_classes); with ``pre_logits`` to what the head would read."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, M + 1, D) to (B, D) as ``global_pool`` says; unchanged where it is ""."""
        if not self.global_pool:
            return x
        if self.global_pool == "token":
            return x[:, (x.shape[1] - 1) // 2]
        patches = split_tokens(x)[1]
        if self.global_pool == "avg":
            return patches.mean(dim=1)
        if self.global_pool == "max":
            return patches.amax(dim=1)
        return 0.5 * (patches.mean(dim=1) + patches.amax(dim=1))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The residual stream after chosen layers.

        Args:
            x: (B, in_chans, H, W).
            indices: which layers: None for all, n for the last n, or a list, negative ones from the end.
            return_prefix_tokens: give pairs of patches and class token (B, 1, D).
            norm: apply ``norm_f`` to each.
            stop_early: run no further than the last chosen layer.
            output_fmt: "NCHW": (B, D, rows, columns); "NLC": (B, M, D).
            intermediates_only: give the list alone.

        Returns:
            ``(tokens, intermediates)``, the tokens as of :meth:`forward_features`, or the intermediates.

        Raises:
            ValueError: another output_fmt.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"VisionMamba: output_fmt={output_fmt!r}, expected 'NCHW' or 'NLC'")
        taken, last = feature_take_indices(len(self.layers), indices)
        grid = self.patch_embed.grid_of(*x.shape[2:])
        hidden, residual, intermediates = self._embed(x), None, []
        for i in range(last + 1 if stop_early else len(self.layers)):
            hidden, residual = self._layer(i, hidden, residual)
            if i in taken:
                token, patches = split_tokens(self.norm_f(hidden, residual)[0] if norm else residual + hidden)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                intermediates.append((patches, token) if return_prefix_tokens else patches)
        return intermediates if intermediates_only else (self.norm_f(hidden, residual)[0], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` does not need for these layers; returns their indices."""
        taken, last = feature_take_indices(len(self.layers), indices)
        self.layers, self.drop_paths = self.layers[: last + 1], self.drop_paths[: last + 1]
        if prune_norm:
            self.norm_f = PlainSum()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of ``num_classes`` outputs, or none for 0; ``global_pool`` as of the class, None to keep it."""
        if global_pool is not None:
            if global_pool not in POOLS:
                raise ValueError(
                    f"VisionMamba: global_pool={global_pool!r}, expected one of {', '.join(map(repr, POOLS))}"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping what it stored."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Expect images of another size from now on: the positions are resampled."""
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        with torch.no_grad():
            resampled = resample_positions(self.pos_embed, old, self.patch_embed.grid_size)
        if resampled is not self.pos_embed:
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to one depth, for layer-wise rates: the stem, then each layer."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Positions, class token, and what decides the memory: A_log is a matrix, which timm would decay."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in SPARED_NAMES}

    def load_pretrained(self, checkpoint_path: str | Path) -> None:
        """Load a file of the original or of timm, resampling positions where its image size or stride is another.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a checkpoint of another width or depth.
            RuntimeError: other keys or sizes, as of ``load_state_dict``.
        """
        if not Path(checkpoint_path).is_file():
            raise FileNotFoundError(f"VisionMamba: there is no file {checkpoint_path}; give a checkpoint's path")
        self.load_state_dict(checkpoint_filter_fn(load_state_dict(str(checkpoint_path), use_ema=False), self))

    def _embed(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens with positions (B, M + 1, D)."""
        patches = self.patch_embed(x)
        middle = patches.shape[1] // 2
        token = self.cls_token.expand(len(x), -1, -1).to(patches.dtype)
        tokens = torch.cat((patches[:, :middle], token, patches[:, middle:]), dim=1)
        positions: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = self.patch_embed.grid_of(*x.shape[2:])
            positions = resample_positions(positions, self.patch_embed.grid_size, grid)
        return self.pos_drop(tokens + positions)

    def _layer(self, i: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Layer i: from the last output and the stream before it to its own output and the stream before that."""
        layer, rest = cast(Layer, self.layers[i]), (None, None, None, False)
        if self.grad_checkpointing and torch.is_grad_enabled():
            wide = torch.promote_types(hidden.dtype, torch.float32)
            stream = hidden.to(wide) if residual is None else residual + hidden
            grown = checkpoint(layer.from_stream, stream, hidden.dtype, *rest, use_reentrant=False)
        else:
            grown = layer(hidden, residual, *rest)
        return self.drop_paths[i](grown[0]), grown[1]


class PlainSum(nn.Module):
    """Stands where a norm was: the sum of output and stream, as the pair that a norm gives."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, total


def split_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Class token (B, 1, D) and patches (B, M, D) of tokens (B, M + 1, D), the class token at M // 2."""
    middle = (x.shape[1] - 1) // 2
    return x[:, middle : middle + 1], torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)


def resample_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions (1, M + 1, D) of a grid of patches for another: bicubic, the class token's put into the new middle."""
    if old == new:
        return pos_embed
    token, patches = split_tokens(pos_embed)
    patches = resample_abs_pos_embed(patches, list(new), list(old), num_prefix_tokens=0)
    middle = patches.shape[1] // 2
    return torch.cat((patches[:, :middle], token, patches[:, middle:]), dim=1)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VisionMamba) -> dict[str, Tensor]:
    """The weights of a file as ``model`` takes them.

    The original's lie under "model". Positions of another image size or stride are resampled from the square grid they
    must then be of, and patches of another size too (Beyer et al. 2023, arXiv 2212.08013).

    Raises:
        ValueError: positions that are not of a square grid.
    """
    weights = dict(state_dict.get("model", state_dict))
    kernel, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if kernel is not None and tuple(kernel.shape[2:]) != model.patch_embed.patch_size:
        weights["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(model.patch_embed.patch_size))
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(positions.shape[1] - 1)
        if side**2 != positions.shape[1] - 1:
            raise ValueError(
                f"checkpoint: pos_embed is of {positions.shape[1] - 1} patches, no square grid, and this model of "
                f"{model.patch_embed.num_patches}; load it into a model of its own img_size, then call set_input_size"
            )
        weights["pos_embed"] = resample_positions(positions, (side, side), model.patch_embed.grid_size)
    return weights


def check_checkpoint(model: VisionMamba, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise ValueError, in words, where a state dictionary is of another width, depth, number of patches or classes."""
    token, positions, head = (state_dict.get(prefix + key) for key in ("cls_token", "pos_embed", "head.weight"))
    if token is not None and token.shape[-1] != model.embed_dim:
        name = SIZES.get(token.shape[-1], "a model")
        raise ValueError(
            f"checkpoint: it is of a Vim {token.shape[-1]} wide, and this one is {model.embed_dim} wide; "
            f"make {name} with embed_dim={token.shape[-1]} to load it"
        )
    start = f"{prefix}layers."
    depth = len({key.removeprefix(start).split(".")[0] for key in state_dict if key.startswith(start)})
    if depth not in (0, len(model.layers)):
        raise ValueError(
            f"checkpoint: it is of a Vim of {depth} layers, and this one has {len(model.layers)}; make a model with "
            f"depth={depth} to load it"
        )
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        raise ValueError(
            f"checkpoint: it is of {positions.shape[1] - 1} patches, and this model of {model.pos_embed.shape[1] - 1}; "
            "load it by load_pretrained, which resamples the positions"
        )
    if head is not None and model.num_classes not in (0, len(head)):
        raise ValueError(
            f"checkpoint: it tells {len(head)} classes apart, and this model {model.num_classes}; call "
            f"reset_classifier({len(head)}) before loading it, and reset_classifier({model.num_classes}) after"
        )
