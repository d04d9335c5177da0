"""HiPPO-LegS: the state matrix that remembers a signal by its Legendre coefficients, and its forms for computing.

Gu, Dao, Ermon, Rudra and Ré (2020), arXiv 2008.07669; the low-rank form: Gu, Goel and Ré (2022), arXiv 2111.00396.
Letters: N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def legs(d_state: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,), float64, of HiPPO-LegS as a time-invariant system dh/dt = A h + B x.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k; B_n = sqrt(2n+1). n and k count from 0.
    """
    n = torch.arange(d_state, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    return -torch.outer(B, B).tril(-1) - torch.diag(n + 1), B


def legs_low_rank(d_state: int) -> tuple[Tensor, Tensor]:
    """S (N, N) and P (N,), float64, with A = -1/2 I + S - P P^T for the A of :func:`legs`: S is skew, P = B / sqrt(2).

    A itself is far from normal: its eigenvectors are useless in any float. -1/2 I + S is normal.
    """
    root = (torch.arange(d_state, dtype=torch.float64) + 0.5).sqrt()
    upper = torch.outer(root, root).triu(1)
    return upper - upper.T, root


def legs_spectrum(d_state: int) -> tuple[Tensor, Tensor]:
    """Lambda (N/2,) complex128 and P (N/2,) float64: the upper half of A = V (diag(Lambda) - P P^*) V^*, V unitary.

    Lambda are the eigenvalues of the normal part with positive imaginary part, in ascending order; the other half are
    their conjugates. Eigenvectors are turned so that P is real and positive; B is sqrt(2) P then. ``d_state`` is even.
    """
    skew, root = legs_low_rank(d_state)
    imaginary, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    upper = slice(d_state // 2, None)
    P = (vectors.mH @ root.to(vectors)).abs()
    return torch.complex(torch.full_like(root, -0.5), imaginary)[upper], P[upper]
