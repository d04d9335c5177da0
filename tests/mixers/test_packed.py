"""The convolution of packed sequences beside a dense masked one; what it may not hold, and what may not cross."""

import pytest
import torch

from mambakit.kernels.testing import assert_close, random_tensor
from mambakit.mixers import packed
from mambakit.mixers.packed import convolve_packed, count_changes


def dense(x: torch.Tensor, kernel: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """One (L, L) matrix a row and channel: K_{s-t} where t is not after s and of its sequence."""
    times = torch.arange(x.shape[1])
    lags = times.unsqueeze(1) - times
    same = sequence.unsqueeze(2) == sequence.unsqueeze(1)
    matrix = kernel[:, lags.clamp(min=0)] * (same & (lags >= 0)).unsqueeze(1)
    return torch.einsum("bdst,btd->bsd", matrix, x)


def test_changes_are_counted():
    seq_idx = torch.tensor([[3, 3, 1, 1, 3], [0, 0, 0, 0, 0]], dtype=torch.int32)
    assert count_changes(seq_idx).tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 23, 64])
def test_it_is_the_dense_one(monkeypatch, length: int, transformed: bool):
    """Borders of all kinds, one long sequence, single steps; by products alone, and by transforms from halves of 2."""
    if transformed:
        monkeypatch.setattr(packed, "DENSE", 1)
    x, kernel = random_tensor(3, length, 2, seed=0, dtype=torch.float64), random_tensor(2, length, seed=1).double()
    borders = torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < 0.2
    sequence = torch.stack((borders[0].cumsum(0), torch.arange(length) // 7, torch.zeros(length, dtype=torch.int64)))
    leaves, results = [x.requires_grad_(), kernel.requires_grad_()], []
    for convolve in (convolve_packed, dense):
        y = convolve(x, kernel, sequence)
        results.append([y, *torch.autograd.grad(y, leaves, random_tensor(3, length, 2, seed=2, dtype=torch.float64))])
    for got, want in zip(*results, strict=True):
        assert_close("y and gradients", got, want, 1e-12)
    assert results[0][0].is_contiguous()


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_nothing_of_one_sequence_reaches_another(monkeypatch, poison: float):
    """Neither a NaN nor the rounding of large numbers, in either direction, through products or transforms."""
    monkeypatch.setattr(packed, "DENSE", 4)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 13, 20])).unsqueeze(0)
    x, kernel = random_tensor(1, 42, 2, seed=0), random_tensor(2, 42, seed=1)
    want = convolve_packed(x, kernel, sequence)
    spoilt = torch.where((sequence == 1).unsqueeze(2), poison, x).requires_grad_()
    y = convolve_packed(spoilt, kernel, sequence)
    others = (sequence != 1)[0]
    assert torch.equal(y[:, others], want[:, others])
    (dx,) = torch.autograd.grad(y, spoilt, torch.where((sequence == 1).unsqueeze(2), poison, torch.ones_like(y)))
    assert bool((dx[:, others].abs() < 100).all())


@pytest.mark.parametrize("longest", [1, 64])
def test_gradients_of_any_order(monkeypatch, longest: int):
    monkeypatch.setattr(packed, "DENSE", longest)
    x, kernel = (random_tensor(*shape, seed=0, dtype=torch.float64).requires_grad_() for shape in ((2, 7, 2), (2, 7)))
    sequence = torch.tensor([[0] * 5 + [1] * 2, [0] + [1] * 6])
    assert torch.autograd.gradcheck(convolve_packed, (x, kernel, sequence))
    assert torch.autograd.gradgradcheck(convolve_packed, (x, kernel, sequence))


def test_memory_grows_with_the_length_alone():
    """Forward and backward: no tensor is beyond three times x, and only x, the kernel and the numbers are kept."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
            return result

    x, kernel = random_tensor(1, 2048, 2, seed=0).requires_grad_(), random_tensor(2, 2048, seed=1).requires_grad_()
    sequence, kept = (torch.arange(2048) // 700).unsqueeze(0), []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        convolve_packed(x, kernel, sequence).sum().backward()
    assert largest.numbers <= 3 * x.numel()
    assert sum(tensor.numel() for tensor in kept) == x.numel() + kernel.numel() + sequence.numel()
