"""HiPPO-LegS against its definition, the memory it was derived for, and the identities of its low-rank form."""

import math

import pytest
import torch

from mambakit.kernels.testing import assert_close
from mambakit.mixers.hippo import legs, legs_low_rank, legs_spectrum


def test_legs_is_its_definition():
    A, B = legs(7)
    for n in range(7):
        assert B[n].item() == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(7):
            below, on = -math.sqrt((2 * n + 1) * (2 * k + 1)), -(n + 1)
            assert A[n, k].item() == pytest.approx(below if n > k else on if n == k else 0.0)


def test_legs_remembers_by_legendre_polynomials():
    """exp(A t) B are the shifted Legendre polynomials of exp(-t), by Rodrigues, times sqrt(2n+1) exp(-t)."""
    A, B = legs(6)
    for t in (0.0, 0.3, 2.0):
        z, got = math.exp(-t), torch.linalg.matrix_exp(t * A) @ B
        for n in range(6):
            legendre = sum(math.comb(n, k) * math.comb(n + k, k) * (z - 1) ** k for k in range(n + 1))
            assert got[n].item() == pytest.approx(math.sqrt(2 * n + 1) * z * legendre, abs=1e-9)


@pytest.mark.parametrize("n", [2, 6, 64])
def test_low_rank_form_is_legs(n: int):
    A, B = legs(n)
    skew, P = legs_low_rank(n)
    assert_close("A", skew - torch.eye(n, dtype=torch.float64) / 2 - torch.outer(P, P), A, 1e-12)
    assert torch.equal(skew, -skew.T)
    assert_close("P", math.sqrt(2) * P, B, 1e-12)


@pytest.mark.parametrize("n", [2, 6, 64])
def test_spectrum_is_unitarily_alike(n: int):
    """Same norm, and same transfer function B^* (s - A)^-1 B, which no unitary change of basis alters."""
    A, B = legs(n)
    half, P_half = legs_spectrum(n)
    assert bool((half.imag > 0).all()) and bool((half.imag.diff() > 0).all())
    P = torch.cat((P_half, P_half)).to(torch.complex128)
    alike, B_alike = torch.diag(torch.cat((half, half.conj()))) - torch.outer(P, P), math.sqrt(2) * P
    assert alike.norm().item() == pytest.approx(A.norm().item(), rel=1e-10)
    unit = torch.eye(n, dtype=torch.complex128)
    for s in (0.0, 0.5 + 2j, 1.0 - 30j):
        got, want = (b @ torch.linalg.solve(s * unit - a, b) for a, b in ((alike, B_alike), (A.to(P), B.to(P))))
        assert_close("transfer function", got, want, 1e-9)
