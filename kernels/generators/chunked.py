"""The generators as matrix products over blocks, in vectorised PyTorch, and their gradients.

Letters: R rows (channels), N states, one of each conjugate pair, L length, M nodes, K sets of numerators.

**Exponentials.** With l = S i + j and S about sqrt(L), exp(x l) = exp(x S i) exp(x j). A row's sums are then the
product of an (L/S, N) and an (N, S) matrix, and neither R N L exponentials are taken nor as many numbers held.

**Poles.** A conjugate pair of poles w = c + i e with numerators v, v* is one real rational function,
``2 (a z + b) / ((z - c)^2 + e^2)`` with a = Re v, b = -Re(v w*): one complex division a pair and node, whatever K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CPU_BLOCK, BLOCK = 2**17, 2**23  # complex numbers held at once: what the caches hold, or what fills a GPU


def _blocks(count: int, each: int, device: torch.device) -> Iterator[slice]:
    """``count`` things of ``each`` numbers, as many at once as a block holds."""
    step = max(1, (CPU_BLOCK if device.type == "cpu" else BLOCK) // each)
    for first in range(0, count, step):
        yield slice(first, first + step)


def powers(x: Tensor, times: Tensor) -> Tensor:
    """exp(x t), x (R, N) complex, times (T,) float64 to (R, T, N) in x's dtype.

    Im(x) t may be 1e4 radians and more, where float32 has lost the phase: whole turns are taken off in float64.
    """
    turns = times.unsqueeze(1) * (x.imag.double() / (2 * math.pi)).unsqueeze(1)
    angle = (turns - turns.round()) * (2 * math.pi)
    magnitude = torch.exp(times.to(x.real.dtype).unsqueeze(1) * x.real.unsqueeze(1))
    return torch.polar(magnitude, angle.to(magnitude.dtype))


def _grid(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Times S i and j, float64, whose sums run from 0 to at least L-1."""
    fine = math.isqrt(length - 1) + 1
    numbers = torch.arange(fine, dtype=torch.float64, device=x.device)
    return fine * numbers[: -(-length // fine)], numbers


def log_vandermonde(v: Tensor, x: Tensor, length: int) -> Tensor:
    """2 Re sum_n v_n exp(x_n l): v, x (R, N) complex to (R, L) real."""
    out = torch.empty(x.shape[0], length, dtype=x.real.dtype, device=x.device)
    coarse, fine = _grid(x, length)
    for rows in _blocks(x.shape[0], len(fine) * x.shape[1], x.device):
        left = 2 * v[rows].unsqueeze(1) * powers(x[rows], coarse)
        right = powers(x[rows], fine)
        product = torch.cat((left.real, -left.imag), 2) @ torch.cat((right.real, right.imag), 2).mT
        out[rows] = product.flatten(1)[:, :length]
    return out


def log_vandermonde_moments(u: Tensor, x: Tensor, first: bool) -> tuple[Tensor, Tensor | None]:
    """sum_l u_l exp(x_n l), and where ``first`` is set sum_l l u_l exp(x_n l): u (R, L), x (R, N) to (R, N) each."""
    zeroth, moment = torch.empty_like(x), torch.empty_like(x) if first else None
    coarse, fine = _grid(x, u.shape[1])
    padding = len(coarse) * len(fine) - u.shape[1]
    for rows in _blocks(x.shape[0], len(fine) * x.shape[1], x.device):
        folded = torch.nn.functional.pad(u[rows], (0, padding)).unflatten(1, (len(coarse), len(fine)))
        left = powers(x[rows], coarse)
        right = torch.view_as_real(powers(x[rows], fine)).flatten(2)
        inner = torch.view_as_complex((folded @ right).unflatten(2, (-1, 2)))
        zeroth[rows] = (left * inner).sum(1)
        if moment is not None:
            weighted = folded @ (fine.to(u.dtype).unsqueeze(1) * right)
            inner = coarse.to(u.dtype).unsqueeze(1) * inner + torch.view_as_complex(weighted.unflatten(2, (-1, 2)))
            moment[rows] = (left * inner).sum(1)
    return zeroth, moment


def _pair(poles: Tensor, z: Tensor) -> Tensor:
    """1 / ((z - c)^2 + e^2), poles (R, N, 2) real as (c, e), z (M,) complex to (R, N, M) complex.

    The real part of the denominator is taken from factors: next to a pole a difference of squares would cancel.
    """
    c, e = poles.unsqueeze(-2).unbind(-1)
    x = z.real - c
    return torch.complex(x * x + (e - z.imag) * (e + z.imag), 2 * x * z.imag).reciprocal()


def _tiles(residues: Tensor, z: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and nodes, blocks of both, for (rows, N, nodes) complex numbers at once."""
    rows, states = residues.shape[1:3]
    for nodes in _blocks(len(z), states, z.device):
        for some in _blocks(rows, states * (min(nodes.stop, len(z)) - nodes.start), z.device):
            yield some, nodes


def cauchy(residues: Tensor, poles: Tensor, z: Tensor) -> Tensor:
    """sum_n 2 (a z_m + b) / ((z_m - c)^2 + e^2): residues (K, R, N, 2) as (a, b), poles (R, N, 2) as (c, e), z (M, 2)
    to (K, R, M, 2); complex numbers as pairs of real ones.
    """
    out = torch.empty(*residues.shape[:2], len(z), 2, dtype=residues.dtype, device=residues.device)
    a, b = (2 * residues).transpose(0, 1).unbind(-1)  # (R, K, N)
    for rows, nodes in _tiles(residues, z):
        at = torch.view_as_complex(z[nodes])
        q = _pair(poles[rows], at)
        part = a[rows] @ torch.view_as_real(q * at).flatten(2) + b[rows] @ torch.view_as_real(q).flatten(2)
        out[:, rows, nodes] = part.unflatten(2, (-1, 2)).transpose(0, 1)
    return out


def cauchy_backward(dout: Tensor, residues: Tensor, poles: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of residues and poles. With q = 1 / ((z - c)^2 + e^2) and P = sum_k dout_k* (a_k z + b_k):

    da_k = 2 Re sum_m dout_k* z q,   db_k = 2 Re sum_m dout_k* q,   dc = 4 Re sum_m P (z - c) q^2,
    de = -4 e Re sum_m P q^2.
    """
    dresidues, dpoles = torch.zeros_like(residues), torch.zeros_like(poles)
    a, b = residues.permute(1, 2, 0, 3).unbind(-1)  # (R, N, K)
    for rows, nodes in _tiles(residues, z):
        at = torch.view_as_complex(z[nodes])
        q = _pair(poles[rows], at)
        flat = dout[:, rows, nodes].flatten(2).transpose(0, 1)  # (R, K, 2M)
        slopes = [2 * flat @ torch.view_as_real(factor).flatten(2).mT for factor in (q * at, q)]
        dresidues[:, rows] += torch.stack(slopes, -1).transpose(0, 1)
        # Conjugates in memory: below autograd in a compiled graph, torch 2.14 forgets those that are only marked.
        on_a, on_b = (torch.view_as_complex((x[rows] @ flat).unflatten(2, (-1, 2))).conj_physical() for x in (a, b))
        common = (on_a * at + on_b) * q * q
        dpoles[rows, :, 0] += 4 * (common * (at - poles[rows, :, :1])).real.sum(-1)
        dpoles[rows, :, 1] -= 4 * poles[rows, :, 1] * common.real.sum(-1)
    return dresidues, dpoles
