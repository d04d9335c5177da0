"""What a call of ``selective_scan`` may hold, which backend serves it, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from mambakit.kernels import use_backend
from mambakit.kernels.dispatch import TRITON_INSTALLED
from mambakit.kernels.scan import selective_scan
from mambakit.kernels.scan.op import _is_usual, _not_in_triton, _scan
from mambakit.kernels.testing import assert_close, random_tensor, scan_arguments

DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(2, 0, 6)}, ValueError, r"u has shape \(2, 0, 6\).*at least one element"),
        ({"u": torch.zeros(2, 6)}, ValueError, r"u has shape \(2, 6\), expected \(batch, length, channels\)"),
        ({"delta": torch.zeros(2, 20, 6)}, ValueError, r"delta has shape \(2, 20, 6\), expected .*length=21"),
        ({"delta": None}, TypeError, "delta must be a tensor, got NoneType"),
        ({"C": [1.0]}, TypeError, "C must be a tensor, got list"),
        ({"A": torch.zeros(5, 3)}, ValueError, r"A has shape \(5, 3\), expected \(channels=6"),
        ({"A": torch.zeros(6, 3, dtype=torch.int64)}, TypeError, "A has dtype int64"),
        ({"B": torch.zeros(2, 21, 4)}, ValueError, r"B has shape .*d_state=3"),
        ({"B": torch.zeros(2, 21, 4, 3)}, ValueError, "B has 4 groups, expected a divisor of the 6 channels"),
        ({"C": torch.zeros(6, 3, dtype=torch.complex64)}, TypeError, "C has dtype complex64, expected one of float16"),
        ({"C": torch.zeros(6, 3, device="meta")}, ValueError, "C is on meta, u is on cpu"),
        ({"z": torch.zeros(1)}, ValueError, r"z has shape \(1,\)"),
        ({"D": torch.zeros(7)}, ValueError, r"D has shape \(7,\), expected \(channels=6\)"),
        ({"delta_bias": torch.zeros(6, dtype=torch.bool)}, TypeError, "delta_bias has dtype bool"),
        ({"initial_state": torch.zeros(2, 3, 6)}, ValueError, r"initial_state has shape \(2, 3, 6\)"),
        ({"initial_state": torch.zeros(2, 6, 3, device="meta")}, ValueError, "initial_state is on meta, u is on cpu"),
        ({"seq_idx": torch.zeros(2, 20, dtype=torch.int32)}, ValueError, "seq_idx has shape"),
        ({"seq_idx": torch.zeros(2, 21)}, TypeError, "seq_idx has dtype float32, expected one of int32, int64"),
        ({"reverse": "both"}, ValueError, "reverse is 'both', expected False, True or \"half\""),
        (scan_arguments(channels=5, reverse="half"), ValueError, "u has 5 channels, expected an even number of them"),
        ({"C": torch.zeros(2, 21, 3, 3), "reverse": "half"}, ValueError, "C has 3 groups, expected one or an even"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="selective_scan: .*" + message):
        selective_scan(**scan_arguments() | change)


@pytest.mark.parametrize("optional", [False, True])
def test_a_plain_call_is_checked_the_short_way(optional: bool) -> None:
    """What the short check accepts wrongly, the test above finds; here, that it accepts anything."""
    given = scan_arguments(optional=optional)
    tensors = [given.get(name) for name in (*DIFFERENTIABLE, "seq_idx")]
    assert _is_usual(*tensors)
    assert not _is_usual(*tensors[:-1], torch.zeros(2, 21, dtype=torch.int32))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """By name where it would be needed, not silently left out of a sum."""
    given = scan_arguments()
    u = given["u"].requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan(**given, backend="torch")[0].sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="for gradients of gradients use backend='reference'"):
        (gradient.square().sum() + u.sum()).backward()


@pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("optional", [False, True])
def test_the_operator_serves_by_triton(optional: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's, which runs only without a GPU
    given = scan_arguments(1, 5, 2, 2, optional=optional, packed=optional, dtype=torch.float32, device=device)
    leaves = [given[name].requires_grad_() for name in DIFFERENTIABLE if name in given]
    found = {}
    for backend in ("triton", "reference"):
        results = selective_scan(**given, backend=backend)
        weights = [random_tensor(*y.shape, seed=50 + i, device=device) for i, y in enumerate(results)]
        found[backend] = *results, *torch.autograd.grad(results, leaves, weights)
    names = ("out", "final_state", *(name for name in DIFFERENTIABLE if name in given))
    for name, got, want in zip(names, found["triton"], found["reference"], strict=True):
        assert_close(name, got, want)
    tensors = [given.get(name) for name in DIFFERENTIABLE]
    shapes = torch.library.opcheck(
        _scan, (*tensors, given.get("seq_idx"), True, 0, "triton"), test_utils="test_faketensor"
    )
    assert shapes == {"test_faketensor": "SUCCESS"}


def test_backends() -> None:
    given = scan_arguments(complex_A=True, device="cuda" if torch.cuda.is_available() else "cpu")
    assert "complex" in _not_in_triton(*(given[name] for name in DIFFERENTIABLE[:5]))
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: A is complex"):
        selective_scan(**given, backend="triton")
    with use_backend("reference"):
        out, _ = selective_scan(**given | {"u": given["u"].requires_grad_()})
    assert "Mul" in type(out.grad_fn).__name__  # plain autograd, not the operator's node
