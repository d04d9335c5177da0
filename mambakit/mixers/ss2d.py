"""SS2D, the selective scan of an image in four directions, of Liu et al., "VMamba" (2024), arXiv 2401.10166.

Letters: B batch, H height, W width, L = H W points, D channels (expand * d_model), N state size, K = 4 directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.kernels import selective_scan
from mambakit.kernels.inner.reference import NO_STEP
from mambakit.mixers.base import NonCausal

DIRECTIONS = 4


class SS2D(NonCausal):
    """Selective scans of an image along its rows and its columns, both from the front and from the back, added up.

    With x = SiLU(conv2d(in_proj(input))) of width D and, for each direction k (0: row by row, 1: column by column, 2,
    3: the same from the end), delta_k, B_k and C_k projected from x by ``x_proj_weight[k]`` (K, R + 2 N, D) and
    ``dt_projs_weight[k]`` (K, D, R):

        y = sum_k scan_k(x; delta_k, A_k, B_k, C_k, D_k),    output = out_proj(LayerNorm(y))

    where scan_k is :func:`mambakit.kernels.selective_scan` in the order of k; with ``gate``, the LayerNorm's output is
    multiplied by SiLU(z), z a second half of in_proj. No direction makes copies but one: columns need x in their order.
    The backward directions run the scan in reverse, and each point's results are added up where it lies in the image.

    Parameters carry VMamba's names and layouts. The defaults are those of its released models (``v05_noz``): one state
    a channel and no gate; its first version is ``d_state=16, gate=True, conv_bias=True``.

    The sequence is the image row by row. Not causal: there is no state, and :meth:`step` is refused. Packed sequences
    (``seq_idx``) are refused too, since a row of the batch is one image, and so is a ``mask`` where the sizes of the
    image are fixed, since what is masked is taken out and everything behind it would change its place.

    Args:
        d_model: width of input and output.
        grid: (height, width), their product the length. The height may be None: as many rows as the length needs, the
            last of them filled up with points that no scan sees. None for a square image, of whatever square number the
            length is.
        d_state: N, states a channel.
        d_conv: width of the convolution, odd.
        expand: D / d_model (VMamba's ssm_ratio).
        dt_rank: R, rank of the projections to delta; "auto" is ceil(d_model / 16).
        dt_min: smallest step delta at initialisation (drawn log-uniformly up to ``dt_max``).
        dt_max: largest step delta at initialisation.
        dt_init_floor: lower bound of the initial step.
        conv_bias: the convolution has a bias.
        bias: in_proj and out_proj have biases.
        gate: multiply by SiLU(z).

    Raises:
        ValueError: a grid that is none, an even d_conv, a width of no whole number of channels.
    """

    def __init__(
        self,
        d_model: int,
        grid: Sequence[int | None] | None = None,
        d_state: int = 1,
        d_conv: int = 3,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = False,
        bias: bool = False,
        gate: bool = False,
    ) -> None:
        super().__init__()
        if grid is not None and (
            len(grid) != 2 or grid[1] is None or any(size is not None and size < 1 for size in grid)
        ):
            raise ValueError(f"SS2D: grid={grid}, expected (height, width) from 1 on, of which the height may be None")
        if d_conv % 2 == 0:
            raise ValueError(f"SS2D: d_conv={d_conv}, expected an odd width, which keeps the size of the image")
        self.d_inner = int(expand * d_model)
        if self.d_inner != expand * d_model:
            raise ValueError(f"SS2D: expand={expand} times d_model={d_model} is no whole number of channels")
        self.d_model, self.d_state = d_model, d_state
        self.grid = None if grid is None else tuple(grid)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.dt_range = (dt_min, dt_max, dt_init_floor)

        channels = DIRECTIONS * self.d_inner
        self.gate = gate
        self.in_proj = nn.Linear(d_model, (1 + gate) * self.d_inner, bias=bias)
        self.conv2d = nn.Conv2d(
            self.d_inner, self.d_inner, d_conv, padding=d_conv // 2, groups=self.d_inner, bias=conv_bias
        )
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, self.dt_rank + 2 * d_state, self.d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, self.d_inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, self.d_inner))
        self.A_logs = nn.Parameter(torch.empty(channels, d_state))
        self.Ds = nn.Parameter(torch.empty(channels))
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        for parameter in (self.A_logs, self.Ds, self.dt_projs_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_projs_bias._no_reinit = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what the scans read: projections as linear layers', steps from dt_min to dt_max, A = -(1..N), D = 1."""
        dt_min, dt_max, floor = self.dt_range
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_projs_bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
        dt = dt.exp().clamp(min=floor)
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_logs.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float32).log().expand_as(self.A_logs))
        self.Ds.fill_(1.0)

    def mix_all(self, x: Tensor, *, seq_idx: Tensor | None, lengths: Tensor | None) -> Tensor:
        if seq_idx is not None:
            raise ValueError("SS2D: seq_idx is given, but a row of the batch is one image; give each image its own row")
        length = x.shape[1]
        height, width = self.sizes(length)
        points = height * width
        if lengths is not None and (self.grid is None or self.grid[0] is not None):
            raise ValueError(
                f"SS2D: mask is given, but with grid={self.grid} a row has points in every place; leave it away, or "
                "leave the height open, as in grid=(None, width)"
            )
        if lengths is None and points == length:
            return self.mix_image(x.unflatten(1, (height, width))).flatten(1, 2)
        ends = torch.full((1,), length, device=x.device) if lengths is None else lengths
        real = (torch.arange(points, device=x.device) < ends.unsqueeze(1)).unflatten(1, (height, width))
        image = F.pad(x, (0, 0, 0, points - length)).unflatten(1, (height, width))
        return self.mix_image(image, real).flatten(1, 2)[:, :length]

    def mix_image(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Images (B, H, W, d_model), of any size, to the same shape.

        ``real`` (B or 1, H, W) bool, True at points that count: the others are zeros to the convolution, and the scans
        pass over them.
        """
        x = self.in_proj(x)
        gate = None
        if self.gate:
            x, gate = x.chunk(2, dim=-1)
        if real is not None:
            x = x.masked_fill(~real.unsqueeze(-1), 0)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        by_rows = self._both_ways(x, 0, real)
        by_columns = self._both_ways(x.transpose(1, 2), 1, None if real is None else real.transpose(1, 2))
        y = self.out_norm(by_rows + by_columns.transpose(1, 2))
        return self.out_proj(y if gate is None else y * F.silu(gate))

    def sizes(self, length: int) -> tuple[int, int]:
        """Height and width of the image that ``length`` points are; raise where they are none."""
        if self.grid is None:
            side = math.isqrt(length)
            if side**2 != length:
                raise ValueError(
                    f"SS2D: the length is {length}, which is no square image; give its sizes, as in "
                    "grid=(height, width)"
                )
            return side, side
        height, width = self.grid
        assert width is not None
        if height is not None and height * width != length:
            raise ValueError(
                f"SS2D: the length is {length}, expected {height * width} points for grid={self.grid}; give the sizes "
                "of this image, or None for the height to leave it open"
            )
        return -(-length // width) if height is None else height, width

    def _both_ways(self, x: Tensor, first: int, real: Tensor | None) -> Tensor:
        """The sum of directions ``first`` and ``first + 2``, the scans along x's second axis, line by line.

        Two scans of one u: in one call (``reverse="half"``) it would have to lie in memory twice.
        """
        u = x.flatten(1, 2)
        projected = F.linear(u, self.x_proj_weight[first::2].flatten(0, 1))
        skip = None if real is None else ~real.flatten(1, 2).unsqueeze(-1)
        summed = None
        for k, values in zip((first, first + DIRECTIONS // 2), projected.chunk(2, dim=-1), strict=True):
            dt, B, C = values.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            delta = F.linear(dt, self.dt_projs_weight[k])
            if skip is not None:
                delta = delta.masked_fill(skip, NO_STEP)
            channels = slice(k * self.d_inner, (k + 1) * self.d_inner)
            A, D, bias = self._A(channels), self.Ds[channels], self.dt_projs_bias[k]
            y = selective_scan(u, delta, A, B, C, D, None, bias, True, reverse=k != first)
            summed = y if summed is None else summed + y
        return cast(Tensor, summed).unflatten(1, x.shape[1:3])

    def _A(self, channels: slice) -> Tensor:
        """Rows of A (K D, N), negative; float32 at least, since exp(delta A) magnifies rounding."""
        A_logs = self.A_logs[channels]
        return -torch.exp(A_logs if A_logs.dtype == torch.float64 else A_logs.float())
