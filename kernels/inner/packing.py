"""The weights of both directions laid out for ``bimamba.py``, and their gradients taken apart again, in PyTorch;
``triton_packing.py`` does each in one launch.

Of each direction the rows of x_proj are padded in front by zeros, so that B and C begin at multiples of 16 numbers,
as wide loads want them:

    x_proj (2K, 2D)  = [pad dt B C of forwards | 0]      dt_proj (2D, 2K) = [pad dt 0 0 | 0        ] forwards
                       [0 | pad dt B C of backwards]                        [0          | pad dt 0 0] backwards

Letters: D channels of a direction, N state size, R rank of dt, W convolution width, M d_model, K = padded R + 2N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALIGNED = 16


class Direction(NamedTuple):
    """The weights that one direction has to itself."""

    conv_weight: Tensor  # (D, 1, W)
    conv_bias: Tensor | None  # (D,)
    x_proj_weight: Tensor  # (R + 2N, D)
    dt_proj_weight: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A_log: Tensor  # (D, N)
    D: Tensor  # (D,)


class Weights(NamedTuple):
    """The packed weights. The matrices are in the dtype of the products, the others in float32 at least."""

    x_proj: Tensor  # (2K, 2D)
    dt_proj: Tensor  # (2D, 2K)
    out_proj: Tensor  # (M, D)
    A: Tensor  # (2D, N), -exp(A_log)
    conv_weight: Tensor  # (2, D, W)
    conv_bias: Tensor | None  # (2, D)
    D: Tensor  # (2D,)
    dt_bias: Tensor  # (2D,)


class Layout(NamedTuple):
    """The sizes, and where each weight lies in the two flat tensors that hold the matrices and the rest."""

    channels: int
    d_state: int
    width: int
    rank: int
    d_model: int

    @property
    def dt_rows(self) -> int:
        """Rows of x_proj before those of B, of which the last R are dt's."""
        return -(-self.rank // ALIGNED) * ALIGNED

    @property
    def rows(self) -> int:
        """K."""
        return self.dt_rows + 2 * self.d_state

    @property
    def sizes(self) -> tuple[tuple[int, int, int], tuple[int, int, int, int, int]]:
        """Numbers of x_proj, dt_proj and out_proj; of A, conv_weight, conv_bias, D and dt_bias."""
        twice, joined = 2 * self.channels, 4 * self.rows * self.channels
        return (joined, joined, self.d_model * self.channels), (
            twice * self.d_state, twice * self.width, twice, twice, twice,
        )  # fmt: skip

    @property
    def apart(self) -> tuple[int, int, int, int, int, int]:
        """Numbers of x_proj, dt_proj and A_log as a direction has them, of both directions in turn."""
        own, ranks, states = (self.rank + 2 * self.d_state, self.rank, self.d_state)
        return tuple(self.channels * rows for rows in (own, own, ranks, ranks, states, states))  # type: ignore[return-value]

    def split(self, matrices: Tensor, vectors: Tensor, conv_bias: bool) -> Weights:
        """Views of the two flat tensors."""
        of_matrices, of_vectors = self.sizes
        x_proj, dt_proj, out_proj = matrices.split_with_sizes(of_matrices)
        A, conv_weight, bias, D, dt_bias = vectors.split_with_sizes(of_vectors)
        return Weights(
            x_proj.view(-1, 2 * self.channels),
            dt_proj.view(-1, 2 * self.rows),
            out_proj.view(-1, self.channels),
            A.view(-1, self.d_state),
            conv_weight.view(2, -1, self.width),
            bias.view(2, -1) if conv_bias else None,
            D,
            dt_bias,
        )


def exact(dtype: torch.dtype, one: Direction) -> torch.dtype:
    """That of the weights which are not products' and of the scan's states: float32, or float64 where one is."""
    return torch.promote_types(torch.promote_types(dtype, one.A_log.dtype), torch.float32)


def pack(
    cut: Layout, dtype: torch.dtype, forwards: Direction, backwards: Direction, out_proj_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The flat tensors: matrices in ``dtype``, vectors in float32 at least."""
    matrices = out_proj_weight.new_zeros(sum(cut.sizes[0]), dtype=dtype)
    vectors = out_proj_weight.new_zeros(sum(cut.sizes[1]), dtype=exact(dtype, forwards))
    own = cut.split(matrices, vectors, True)
    own.out_proj.copy_(out_proj_weight)
    for i, one in enumerate((forwards, backwards)):
        channels = slice(i * cut.channels, (i + 1) * cut.channels)
        first, last = i * cut.rows + cut.dt_rows - cut.rank, (i + 1) * cut.rows
        own.x_proj[first:last, channels] = one.x_proj_weight.to(dtype)
        own.dt_proj[channels, first : first + cut.rank] = one.dt_proj_weight.to(dtype)
        own.A[channels] = -one.A_log.to(vectors.dtype).exp()
        own.conv_weight[i] = one.conv_weight.squeeze(1)
        own.D[channels], own.dt_bias[channels] = one.D, one.dt_bias
        if one.conv_bias is not None and own.conv_bias is not None:
            own.conv_bias[i] = one.conv_bias
    return matrices, vectors


def unpack(cut: Layout, dx_proj: Tensor, ddt_proj: Tensor, dA: Tensor, A: Tensor) -> Tensor:
    """The gradients of x_proj, dt_proj and A_log, those of each direction contiguous, as ``Layout.apart`` cuts them.

    Returns one flat tensor in dA's dtype. dx_proj, ddt_proj, dA: gradients of the packed ones. A: the packed one.
    """
    pad, pieces = cut.dt_rows - cut.rank, []
    for i in range(2):
        channels = slice(i * cut.channels, (i + 1) * cut.channels)
        pieces.append(dx_proj[i * cut.rows + pad : (i + 1) * cut.rows, channels])
    for i in range(2):
        channels = slice(i * cut.channels, (i + 1) * cut.channels)
        pieces.append(ddt_proj[channels, i * cut.rows + pad : i * cut.rows + cut.dt_rows])
    return torch.cat([piece.to(dA.dtype).reshape(-1) for piece in (*pieces, dA * A)])
