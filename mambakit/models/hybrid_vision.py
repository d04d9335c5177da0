"""A vision hybrid: convolutions first, then mixers, then attention, after Hatamizadeh and Kautz, arXiv 2407.08083."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mambakit.backbone import MixerName, mixer_factory
from mambakit.mixers.base import SequenceMixer
from mambakit.mixers.full_attention import FullAttention
from mambakit.models.pyramid import Block, Pyramid


class ConvBlock(nn.Module):
    """x + norm2(conv2(gelu(norm1(conv1(x))))) on (B, H, W, D), with convolutions of 3 by 3 and batch norms."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 3, 1, 2)
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(y)))))
        return x + self.drop_path(y.permute(0, 2, 3, 1))


class HybridVision(Pyramid):
    """Stages of convolutions at strides 4 and 8; at strides 16 and 32 mixers, and attention in the last half of blocks.

    Where images are large, convolutions are cheap and enough; where they have become few points, the mixers carry what
    is seen across the image and attention looks all of it up: the arrangement of MambaVision. The blocks are our own:
    any mixer of this package, by default Vim's, reads the points row by row, and attention, without positions
    (:class:`mambakit.mixers.FullAttention`), is over the whole map, no windows. MambaVision's checkpoints do not load.
    Obeys timm's model protocol, see :class:`mambakit.models.pyramid.Pyramid`.

    Args:
        dims: width of the stages.
        depths: blocks of the stages; of n blocks in the last two stages, the last n // 2 have attention.
        num_heads: heads of the attention in the last two stages.
        mixer: of the other blocks there, as of :class:`mambakit.Backbone`; one that sees both ways.
        mlp_ratio: width of the MLPs over that of the stage.
        in_chans: channels of an image.
        num_classes: outputs of the head; 0 for none, which leaves the pooled features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the map unpooled.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth: linearly from 0 in the first block to this probability in the last.

    Raises:
        ValueError: other than four stages and two numbers of heads, heads that do not divide a width, an unknown mixer
            or pool.
    """

    def __init__(
        self,
        dims: Sequence[int] = (80, 160, 320, 640),
        depths: Sequence[int] = (1, 3, 8, 4),
        num_heads: Sequence[int] = (8, 16),
        mixer: MixerName | Callable[[int], SequenceMixer] = "vim",
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if len(dims) != 4 or len(depths) != 4 or len(num_heads) != 2:
            raise ValueError(
                f"HybridVision: dims={tuple(dims)}, depths={tuple(depths)}, num_heads={tuple(num_heads)}, expected "
                "four widths, four depths, and heads for the last two stages"
            )
        make = mixer_factory(mixer)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages: list[list[nn.Module]] = [
            [ConvBlock(dim, next(rates)) for _ in range(depth)] for dim, depth in zip(dims[:2], depths[:2], strict=True)
        ]
        for dim, depth, heads in zip(dims[2:], depths[2:], num_heads, strict=True):
            mixers = [
                make(dim) if i < depth - depth // 2 else FullAttention(dim, heads, d_rotary=0, bias=True)
                for i in range(depth)
            ]
            stages.append([Block(dim, one, mlp_ratio, next(rates)) for one in mixers])
        super().__init__(dims, stages, in_chans, num_classes, global_pool, drop_rate)
