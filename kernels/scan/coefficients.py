"""A, B and C of the selective scan as three products with tiles (rows, times, N, D), whatever their form.

The scan multiplies each of them into a tile, sums a tile over its states with each, and collects each one's gradient.
The same three methods serve coefficients constant in time (always A, sometimes B and C) and coefficients of every step.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """Coefficients (N, D) that hold at every step."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def conj(self) -> Constant:
        return Constant(self.values.conj().resolve_conj())

    def outer(self, v: Tensor, out: Tensor) -> Tensor:
        """out[n, d] = values[n, d] v[d]; v is (rows, times, D)."""
        return torch.mul(v.unsqueeze(2), self.values, out=out)

    def contract(self, h: Tensor, scratch: Tensor) -> Tensor:
        """sum over n of values[n, d] h[n, d]: (rows, times, D). ``scratch`` is a tile to overwrite."""
        return torch.mul(h, self.values, out=scratch).sum(2)

    def gradient(self, h: Tensor, v: Tensor, scratch: Tensor) -> Tensor:
        """This tile's part (N, D) of the gradient, where that of ``outer(v)`` is h, or that of ``contract(h)`` is v."""
        return torch.mul(h, v.unsqueeze(2), out=scratch).sum((0, 1))


class PerStep:
    """Coefficients (rows, times, G, N) of a tile's steps: group g serves the g-th of G equal runs of channels."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def conj(self) -> PerStep:
        return PerStep(self.values.conj().resolve_conj())

    def outer(self, v: Tensor, out: Tensor) -> Tensor:
        """out[n, d] = values[n] v[d]; v is (rows, times, D)."""
        groups = self.values.shape[2]
        values = self.values.transpose(2, 3).unsqueeze(-1)
        torch.mul(v.unflatten(-1, (1, groups, -1)), values, out=out.unflatten(-1, (groups, -1)))
        return out

    def contract(self, h: Tensor, scratch: Tensor) -> Tensor:
        """sum over n of values[n] h[n, d]: (rows, times, D). ``scratch`` is for ``Constant``."""
        values = self.values.flatten(0, 1).unsqueeze(1).unbind(2)
        parts = [torch.bmm(value, part) for value, part in zip(values, self._by_group(h), strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).view(*h.shape[:2], -1)

    def gradient(self, h: Tensor, v: Tensor, scratch: Tensor) -> Tensor:
        """The gradient (rows, times, G, N), where that of ``outer(v)`` is h, or that of ``contract(h)`` is v."""
        v = v.to(h.dtype).flatten(0, 1).unsqueeze(1)
        # A row times a transposed matrix: the same product as matrix times column is ten times slower in MKL.
        pairs = zip(v.chunk(self.values.shape[2], dim=-1), self._by_group(h), strict=True)
        parts = [torch.bmm(v_part, h_part.transpose(1, 2)) for v_part, h_part in pairs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(self.values.shape)

    def _by_group(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.flatten(0, 1).chunk(self.values.shape[2], dim=-1)
