"""SS2D, the selective scan of an image in four directions, of Liu et al., "VMamba" (2024), arXiv 2401.10166.

Letters: B batch, H height, W width, L = H W points, D channels (expand * d_model), N state size, K = 4 directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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
    multiplied by SiLU(z), z a second half of in_proj. One call of the scan runs all four directions, the backward ones
    from the end, so that nothing is flipped; each point's results are added up where it lies in the image.

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
        y = self.out_norm(self._scan(x, real))
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

    def _scan(self, x: Tensor, real: Tensor | None) -> Tensor:
        """The sum over the four directions, (B, H, W, D) to the same shape.

        One call scans them all, so that a GPU has four times the sequences at once: channels lie by direction, rows and
        columns in the half that runs forwards, then the same in the half that runs backwards.
        """
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        by_order = [
            F.linear(one, self.x_proj_weight[first::2].flatten(0, 1)).unflatten(-1, (2, -1))
            for first, one in enumerate((rows, columns))
        ]
        projected = torch.stack(by_order, dim=-2).flatten(2, 3)  # (B, L, K, R + 2 N)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # One product with many zeros: the ranks are small, and four products would have to be joined by a copy.
        delta = F.linear(dt.flatten(2), torch.block_diag(*self.dt_projs_weight))
        if real is not None:
            skip = ~torch.stack((real.flatten(1, 2), real.transpose(1, 2).flatten(1, 2)), dim=-1)
            delta = delta.unflatten(-1, (2, 2, -1)).masked_fill(skip[:, :, None, :, None], NO_STEP).flatten(2)
        u = torch.cat((rows, columns, rows, columns), dim=-1)
        bias = self.dt_projs_bias.flatten()
        y = selective_scan(u, delta, self._A(), B, C, self.Ds, None, bias, True, reverse="half")
        by_rows, by_columns = y.unflatten(-1, (2, 2, -1)).sum(dim=2).unbind(2)
        height, width = x.shape[1:3]
        return by_rows.unflatten(1, (height, width)) + by_columns.unflatten(1, (width, height)).transpose(1, 2)

    def _A(self) -> Tensor:
        """A (K D, N), negative; float32 at least, since exp(delta A) magnifies rounding."""
        return -torch.exp(self.A_logs if self.A_logs.dtype == torch.float64 else self.A_logs.float())
