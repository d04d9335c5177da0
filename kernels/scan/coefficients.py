"""A, B and C of the selective scan as three products with tiles (rows, times, N, D), whatever their form.

The scan multiplies each of them into a tile, sums a tile over states with it, and collects its gradient: the same three
methods serve coefficients constant in time (always A, sometimes B and C) and coefficients that change each step.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """Coefficients (D, N) that hold at every step."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.t().contiguous()
        self.conjugated = self.values.conj().resolve_conj()
        self.total = torch.zeros_like(self.values)

    def outer(
        self, rows: slice, times: slice, v: Tensor, out: Tensor, offset: Tensor | None = None, conjugate: bool = False
    ) -> Tensor:
        """out[n, d] = values[d, n] v[d], plus an offset broadcast to the tile; v is (rows, times, D)."""
        values = self.conjugated if conjugate else self.values
        if offset is None:
            return torch.mul(v.unsqueeze(2), values, out=out)
        return torch.addcmul(offset, v.unsqueeze(2), values, out=out)

    def contract(self, rows: slice, times: slice, h: Tensor, scratch: Tensor, conjugate: bool = False) -> Tensor:
        """sum over n of values[d, n] h[n, d]: (rows, times, D). ``scratch`` is a tile to overwrite."""
        return torch.mul(h, self.conjugated if conjugate else self.values, out=scratch).sum(2)

    def add_gradient(self, rows: slice, times: slice, h: Tensor, v: Tensor, scratch: Tensor) -> None:
        """Adds the gradient when that of ``outer(v)`` is h, or that of ``contract(h)`` is v."""
        self.total += torch.mul(h, v.unsqueeze(2), out=scratch).sum((0, 1))

    @property
    def gradient(self) -> Tensor:
        return self.total.t()


class PerStep:
    """Coefficients (R, S, G, N) of every step: group g serves the g-th of G equal runs of channels."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.conjugated = values.conj().resolve_conj()
        self.groups = values.shape[2]
        self.gradient = torch.zeros_like(values, memory_format=torch.contiguous_format)

    def outer(self, rows: slice, times: slice, v: Tensor, out: Tensor, conjugate: bool = False) -> Tensor:
        """out[n, d] = values[n] v[d]; v is (rows, times, D)."""
        values = (self.conjugated if conjugate else self.values)[rows, times].transpose(2, 3).unsqueeze(-1)
        torch.mul(v.unflatten(-1, (1, self.groups, -1)), values, out=out.unflatten(-1, (self.groups, -1)))
        return out

    def contract(self, rows: slice, times: slice, h: Tensor, scratch: Tensor, conjugate: bool = False) -> Tensor:
        """sum over n of values[n] h[n, d]: (rows, times, D). ``scratch`` is not needed here."""
        values = (self.conjugated if conjugate else self.values)[rows, times].flatten(0, 1)
        parts = [torch.bmm(values[:, None, g], part) for g, part in enumerate(self._by_group(h))]
        return torch.cat(parts, dim=-1).view(*h.shape[:2], h.shape[3])

    def add_gradient(self, rows: slice, times: slice, h: Tensor, v: Tensor, scratch: Tensor) -> None:
        """Sets these steps' gradient when that of ``outer(v)`` is h, or that of ``contract(h)`` is v."""
        v = v.to(h.dtype).flatten(0, 1).unsqueeze(1)
        for g, (h_part, v_part) in enumerate(zip(self._by_group(h), v.chunk(self.groups, dim=-1), strict=True)):
            # A row times a transposed matrix: the same product as a column is ten times slower in MKL.
            gradient = torch.bmm(v_part, h_part.transpose(1, 2))
            self.gradient[rows, times, g] = gradient.view(*h.shape[:2], h.shape[2])

    def _by_group(self, h: Tensor) -> tuple[Tensor, ...]:
        return h.flatten(0, 1).chunk(self.groups, dim=-1)
