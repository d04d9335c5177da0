"""VMamba: Liu et al., "VMamba: Visual State Space Model" (2024), arXiv 2401.10166."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mambakit.mixers.ss2d import SS2D
from mambakit.models.pyramid import Block, Pyramid


class VMamba(Pyramid):
    """Four stages of SS2D blocks: the image scanned in four directions, at strides 4, 8, 16 and 32.

        x <- x + SS2D(norm(x)),    x <- x + mlp(norm2(x))    in each block;    logits = head(mean(norm(x)))

    Parameters carry the names and layouts of the released models (``v05_noz``), so their checkpoints load strictly. The
    residual stream is float32 under autocast. Obeys timm's model protocol, see
    :class:`mambakit.models.pyramid.Pyramid`.

    Args:
        dims: width of the stages.
        depths: blocks of the stages.
        expand: width of SS2D over that of the stage (VMamba's ssm_ratio: the number behind "s" in the models' names).
        d_state: N, states a channel.
        mlp_ratio: width of the MLPs over that of the stage.
        in_chans: channels of an image.
        num_classes: outputs of the head; 0 for none, which leaves the pooled features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the map unpooled.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth: a block's two branches are dropped for a sample with this probability in the
            last block, never in the first, linearly between. The paper's are 0.2, 0.3 and 0.6 (tiny, small, base).

    Raises:
        ValueError: dims and depths of different lengths, an unknown pool.
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 8, 2),
        expand: float = 1.0,
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if len(dims) != len(depths):
            raise ValueError(f"VMamba: dims={tuple(dims)} and depths={tuple(depths)}, expected one of each a stage")
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = [
            [Block(dim, SS2D(dim, d_state=d_state, expand=expand), mlp_ratio, next(rates)) for _ in range(depth)]
            for dim, depth in zip(dims, depths, strict=True)
        ]
        super().__init__(dims, stages, in_chans, num_classes, global_pool, drop_rate)
