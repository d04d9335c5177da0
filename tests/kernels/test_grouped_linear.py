"""grouped_linear: its definition, gradients, operator check, bad input."""

import pytest
import torch

from mambakit.kernels.grouped import grouped_linear
from mambakit.kernels.testing import assert_close, poisoned_memory

COUNTS = [[2, 0, 3], [0, 0, 5], [5, 0, 0]]


def tensors(dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_definition(counts):
    x, weight = tensors()
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    want = torch.stack([weight[e] @ row for e, row in zip(owner, x, strict=True)])
    with poisoned_memory():
        assert_close("y", grouped_linear(x, weight, torch.tensor(counts)), want, 1e-12)


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients(counts):
    """Of first and second order, by finite differences; an empty run has zeros."""
    x, weight = tensors(requires_grad=True)

    def function(x, weight):
        return grouped_linear(x, weight, torch.tensor(counts))

    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


def test_no_rows():
    x, weight = tensors(requires_grad=True)
    grouped_linear(x[:0], weight, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_the_operator():
    x, weight = tensors(torch.float32, requires_grad=True)
    torch.library.opcheck(torch.ops.mambakit.grouped_linear.default, (x, weight, torch.tensor(COUNTS[0])))
    dy = torch.randn(5, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.mambakit.grouped_linear_outer.default, (dy, x, torch.tensor(COUNTS[0])))


def test_autocast_decides_the_dtype():
    x, weight = tensors(torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, weight, torch.tensor(COUNTS[0]))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(5, 3)}, ValueError, r"x has shape \(5, 3\).*inputs=4"),
        ({"weight": torch.zeros(2, 4)}, ValueError, "weight"),
        (
            {"weight": torch.zeros(3, 2, 4, dtype=torch.float64)},
            TypeError,
            "weight has dtype float64, expected float32",
        ),
        ({"counts": torch.tensor([5, 0])}, ValueError, "experts=3"),
        ({"counts": torch.tensor([2.0, 0.0, 3.0])}, TypeError, "counts has dtype float32"),
        ({"counts": torch.tensor([2, 0, 2])}, ValueError, r"counts are \[2, 0, 2\].*5 rows"),
        ({"counts": torch.tensor([6, -1, 0])}, ValueError, r"-1.*5 rows"),
    ],
)
def test_bad_input(change, error, words):
    given = {"x": torch.zeros(5, 4), "weight": torch.zeros(3, 2, 4), "counts": torch.tensor([2, 0, 3])}
    with pytest.raises(error, match=words):
        grouped_linear(**(given | change))
