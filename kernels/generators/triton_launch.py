"""Launches the generators' Triton kernels: tiles, and the sums of what each tile leaves.

Functions and arguments as in chunked.py, whose letters these are; every tensor is contiguous.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.kernels.generators.triton_cauchy import cauchy_backward_kernel, cauchy_kernel
from mambakit.kernels.generators.triton_vandermonde import vandermonde_kernel, vandermonde_moments_kernel
from mambakit.kernels.launch import launch

PROGRAMS = 1024  # that keep a GPU busy: fewer rows are cut along the nodes


def _real(numbers: Tensor) -> Tensor:
    return torch.view_as_real(numbers.contiguous())


def log_vandermonde(v: Tensor, x: Tensor, length: int) -> Tensor:
    """2 Re sum_n v_n exp(x_n l): v, x (R, N) complex64 to (R, L)."""
    rows, states = x.shape
    out = torch.empty(rows, length, dtype=torch.float32, device=x.device)
    BI, BJ, BN = _tile(length, states, 128)
    grid = rows, triton.cdiv(length, BI * BJ)
    launch(
        vandermonde_kernel,
        grid,
        _real(v),
        _real(x),
        out,
        length,
        states,
        BI=BI,
        BJ=BJ,
        BN=BN,
        num_warps=4,
        num_stages=1,
    )
    return out


def log_vandermonde_moments(u: Tensor, x: Tensor, first: bool) -> tuple[Tensor, Tensor | None]:
    """sum_l u_l exp(x_n l), and where ``first`` is set sum_l l u_l exp(x_n l): u (R, L), x (R, N) to (R, N) each."""
    rows, states = x.shape
    length = u.shape[1]
    BI, BJ, BN = _tile(length, states, 64)
    tiles = triton.cdiv(length, BI * BJ)
    shares = [torch.empty(tiles, rows, states, 2, dtype=torch.float32, device=x.device) for _ in range(1 + first)]
    launch(
        vandermonde_moments_kernel,
        (rows, tiles, triton.cdiv(states, BN)),
        u.contiguous(),
        _real(x),
        shares[0],
        shares[1] if first else None,
        length,
        states,
        BI=BI,
        BJ=BJ,
        BN=BN,
        num_warps=4,
    )
    zeroth, *rest = (torch.view_as_complex(_total(share)) for share in shares)
    return zeroth, rest[0] if rest else None


def cauchy(residues: Tensor, poles: Tensor, z: Tensor) -> Tensor:
    """residues (K, R, N, 2), poles (R, N, 2), z (M, 2) to (K, R, M, 2)."""
    sets, rows, states, _ = residues.shape
    nodes = z.shape[0]
    out = torch.empty(sets, rows, nodes, 2, dtype=torch.float32, device=z.device)
    together = _sets_together(sets)
    BM = min(512, max(32, triton.next_power_of_2(nodes)))
    launch(
        cauchy_kernel,
        (rows, triton.cdiv(nodes, BM), sets // together),
        residues.contiguous(),
        poles.contiguous(),
        z.contiguous(),
        out,
        rows,
        nodes,
        states,
        SETS=together,
        BM=BM,
        num_warps=max(1, BM // 128),
    )
    return out


def cauchy_backward(dout: Tensor, residues: Tensor, poles: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of residues and poles."""
    sets, rows, states, _ = residues.shape
    nodes = z.shape[0]
    together = _sets_together(sets)
    BN, BM = 32 if states > 16 else 16, 32
    groups, tiles = sets // together, triton.cdiv(states, BN)
    segments = min(triton.cdiv(PROGRAMS, rows * tiles * groups), triton.cdiv(nodes, 8 * BM))
    segment = triton.cdiv(triton.cdiv(nodes, segments), BM) * BM
    segments = triton.cdiv(nodes, segment)
    dresidues = torch.empty(segments, *residues.shape, dtype=torch.float32, device=z.device)
    dpoles = torch.empty(segments * groups, *poles.shape, dtype=torch.float32, device=z.device)
    launch(
        cauchy_backward_kernel,
        (rows, tiles, segments * groups),
        dout.contiguous(),
        residues.contiguous(),
        poles.contiguous(),
        z.contiguous(),
        dresidues,
        dpoles,
        rows,
        nodes,
        states,
        segment,
        SETS=together,
        BN=BN,
        BM=BM,
        num_warps=8,
    )
    return _total(dresidues), _total(dpoles)


def _tile(length: int, states: int, widest: int) -> tuple[int, int, int]:
    """BI, BJ and BN: small tiles, several of which share a multiprocessor, beat large ones."""
    return 32, min(widest, max(16, triton.next_power_of_2(triton.cdiv(length, 32)))), 16 if states <= 16 else 32


def _sets_together(sets: int) -> int:
    """How many sets of numerators a program takes: what they share is computed once, each costs registers."""
    return next(count for count in (4, 3, 2, 1) if sets % count == 0)


def _total(shares: Tensor) -> Tensor:
    """Added up in fixed order."""
    return shares[0] if len(shares) == 1 else shares.sum(0)
