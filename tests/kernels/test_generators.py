"""The kernel generators against their definitions, closed forms, gradients by difference, and the longest kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambakit.kernels import cauchy, log_vandermonde, log_vandermonde_transpose
from mambakit.kernels.generators import chunked
from mambakit.kernels.generators.op import (
    _cauchy,
    _cauchy_backward,
    _log_vandermonde,
    _log_vandermonde_moments,
    _log_vandermonde_transpose,
)
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# (backend, dtype, relative RMS error): Triton computes in float32, on the GPU or in the interpreter.
PATHS = [("torch", torch.complex128, 1e-10), ("torch", torch.complex64, 3e-6), ("triton", torch.complex64, 3e-6)]


def logarithms(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128, fastest: float = 3.0) -> Tensor:
    """Decaying and turning, up to ``fastest`` radians a step."""
    x = random_tensor(*shape, seed=seed, dtype=torch.complex128)
    return torch.complex(-x.real.abs() / 100, fastest * torch.tanh(x.imag)).to(DEVICE, dtype)


def poles(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    w = random_tensor(*shape, seed=3, dtype=torch.complex128)
    return torch.complex(-w.real.abs() - 0.1, w.imag).to(DEVICE, dtype)


def nodes(count: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Around the imaginary axis; the first is 0, as at S4's zero frequency."""
    z = torch.complex(0.05 * random_tensor(count, seed=4), 3 * random_tensor(count, seed=5))
    z[0] = 0
    return z.to(DEVICE, dtype)


def with_gradients(function: object, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out, leaves, random_tensor(*out.shape, seed=9, dtype=out.dtype, device=DEVICE))]


def compare(function: object, backend: str, tolerance: float, *tensors: Tensor) -> None:
    """A backend with its gradients beside the definition, which computes in complex128 from the same numbers."""
    with poisoned_memory():
        got = with_gradients(lambda *x: function(*x, backend=backend), *tensors)  # type: ignore[operator]
    want = with_gradients(lambda *x: function(*x, backend="reference"), *tensors)  # type: ignore[operator]
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == other.dtype
        assert_close("out" if i == 0 else f"gradient {i}", one, other, tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PATHS)
@pytest.mark.parametrize(("length", "states"), [(1, 1), (2, 3), (7, 4), (50, 16), (1100, 5), (70, 40)])
def test_triton_and_torch_sum_exponentials(
    length: int, states: int, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    v, x = random_tensor(2, states, seed=1, dtype=dtype, device=DEVICE), logarithms(2, states, dtype=dtype)
    compare(lambda v, x, backend: log_vandermonde(v, x, length, backend=backend), backend, tolerance, v, x)
    u = random_tensor(2, length, seed=2, dtype=dtype.to_real(), device=DEVICE)
    compare(log_vandermonde_transpose, backend, tolerance, u, x)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PATHS)
@pytest.mark.parametrize(("sets", "states", "count"), [((), 1, 1), ((4,), 3, 33), ((2, 3), 18, 70), ((5,), 2, 300)])
def test_triton_and_torch_sum_poles(
    sets: tuple[int, ...], states: int, count: int, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    v = random_tensor(*sets, 2, states, seed=1, dtype=dtype, device=DEVICE)
    z = nodes(count, dtype)
    compare(
        lambda v, w, backend: cauchy(v, z, w, backend=backend), backend, tolerance, v, poles(2, states, dtype=dtype)
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_triton_and_torch_keep_the_phase_of_the_longest_kernels(backend: str) -> None:
    """Length 16,384 in float32, up to 5e4 radians, hardly a decay: errors of its beginning and of its end."""
    length = 16384 if GPU or backend == "torch" else 8192
    x = logarithms(2, 16, dtype=torch.complex64)
    x = torch.complex(x.real / 1000, x.imag)
    v = random_tensor(2, 16, seed=1, dtype=torch.complex64, device=DEVICE)
    got, want = (log_vandermonde(v, x, length, backend=name) for name in (backend, "reference"))
    for part in (slice(0, 100), slice(-100, None)):
        assert_close(f"K[{part.start}]", got[:, part], want[:, part], 3e-6)
    u = random_tensor(2, length, seed=2, device=DEVICE)
    got, want = (log_vandermonde_transpose(u, x, backend=name) for name in (backend, "reference"))
    assert_close("transpose", got, want, 1e-5)


def test_closed_forms() -> None:
    x = torch.tensor([[-0.1 + 0j]], dtype=torch.complex128)
    times = torch.arange(9, dtype=torch.float64)
    assert_close("decay", log_vandermonde(torch.ones_like(x), x, 9)[0], 2 * torch.exp(-0.1 * times))
    turn = torch.tensor([2j * math.pi / 8], dtype=torch.complex128)
    assert_close("cosine", log_vandermonde(torch.ones_like(turn) / 2, turn, 9), torch.cos(math.pi / 4 * times))
    series = log_vandermonde_transpose(torch.ones(5, dtype=torch.float64), x[0])
    assert_close("series", series, (1 - torch.exp(5 * x[0])) / (1 - torch.exp(x[0])))
    z = nodes(7).cpu()
    i = torch.tensor([1j], dtype=torch.complex128)
    assert_close("1 / (z^2 + 1)", cauchy(1 / (2 * i), z, i), 1 / (z * z + 1))
    assert_close("2 z / (z^2 + 1)", cauchy(torch.ones_like(i), z, i), 2 * z / (z * z + 1))


def test_next_to_a_pole_nothing_cancels() -> None:
    """A weakly damped pole of 1,000 radians: (z - w)(z - w*) by squares would lose all but three digits here."""
    w = torch.tensor([-0.01 + 1000j], dtype=torch.complex64)
    z = torch.tensor([1000j, 1000.01j, 999.5j], dtype=torch.complex64)
    v = random_tensor(1, seed=1, dtype=torch.complex64)
    for backend in ("torch", "triton"):
        got, want = (cauchy(v.to(DEVICE), z.to(DEVICE), w.to(DEVICE), backend=b) for b in (backend, "reference"))
        assert_close(backend, got, want, 1e-6)


def test_gradients_by_difference() -> None:
    v, x = random_tensor(2, 3, seed=1, dtype=torch.complex128, device=DEVICE), logarithms(2, 3)
    u, z, w = random_tensor(2, 6, seed=2, dtype=torch.float64, device=DEVICE), nodes(5), poles(2, 3)
    for function, tensors in (
        (lambda v, x: log_vandermonde(v, x, 6, backend="torch"), (v, x)),
        (lambda u, x: log_vandermonde_transpose(u, x, backend="torch"), (u, x)),
        (lambda v, w: cauchy(torch.stack((v, v * w)), z, w, backend="torch"), (v, w)),
    ):
        assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in tensors])


def test_leading_axes_broadcast_and_strides_do_not_matter() -> None:
    v, x = random_tensor(4, 2, 3, seed=1, dtype=torch.complex128), logarithms(3, 2).cpu().T.conj()
    u = random_tensor(5, 4, 2, seed=2, dtype=torch.float64).permute(1, 2, 0)
    assert log_vandermonde(v, x, 5).shape == (4, 2, 5)
    compare(lambda v, x, backend: log_vandermonde(v, x, 5, backend=backend), "torch", 1e-10, v.to(DEVICE), x.to(DEVICE))
    compare(log_vandermonde_transpose, "torch", 1e-10, u.to(DEVICE), x.to(DEVICE))
    many = random_tensor(4, 3, 2, 3, seed=1, dtype=torch.complex128, device=DEVICE).transpose(2, 3)
    z = nodes(6).conj()[::2]
    compare(lambda v, w, backend: cauchy(v, z, w, backend=backend), "torch", 1e-10, many, poles(2, 3).T.conj())


def test_blocks_of_rows_and_nodes_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_BLOCK", 50)
    monkeypatch.setattr(chunked, "BLOCK", 50)
    v, x = logarithms(7, 3, seed=1), logarithms(7, 3)
    compare(lambda v, x, backend: log_vandermonde(v, x, 40, backend=backend), "torch", 1e-10, v, x)
    compare(log_vandermonde_transpose, "torch", 1e-10, logarithms(7, 40).real.contiguous(), x)
    z = nodes(41)
    compare(lambda v, w, backend: cauchy(v, z, w, backend=backend), "torch", 1e-10, logarithms(3, 7, 4), poles(7, 4))


def test_nothing_of_channels_by_states_by_length_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that vectorised PyTorch makes, forward and backward, counted as it is made."""
    largest = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    channels, states, length = 16, 32, 4096
    v, x = random_tensor(channels, states, seed=1, dtype=torch.complex128, device=DEVICE), logarithms(channels, states)
    z = nodes(length)
    for name in ("CPU_BLOCK", "BLOCK"):
        monkeypatch.setattr(chunked, name, 2**14)
    residues, pairs = torch.stack((v.real, v.imag), -1)[None], torch.view_as_real(poles(channels, states))
    with Count():  # below the operators, which the mode would see whole
        kernel = chunked.log_vandermonde(v, x, length)
        chunked.log_vandermonde_moments(kernel, x, True)
        out = chunked.cauchy(residues, pairs, torch.view_as_real(z))
        chunked.cauchy_backward(out, residues, pairs, torch.view_as_real(z))
    assert largest == out.numel()
    with Count():
        cauchy(v, z, x, backend="reference")
    assert largest >= channels * states * length


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_triton_and_torch_operators_pass_opcheck_and_compile(backend: str) -> None:
    v, x = (random_tensor(2, 3, seed=1, dtype=torch.complex64, device=DEVICE), logarithms(2, 3, dtype=torch.complex64))
    u = random_tensor(2, 6, seed=2, device=DEVICE)
    z, w = (torch.view_as_real(t) for t in (nodes(5, torch.complex64), poles(2, 3, dtype=torch.complex64)))
    residues, dout = random_tensor(2, 2, 3, 2, seed=1, device=DEVICE), random_tensor(2, 2, 5, 2, seed=2, device=DEVICE)
    grad = [t.clone().requires_grad_() for t in (v, x, u, residues, w)]
    torch.library.opcheck(_log_vandermonde, (grad[0], grad[1], 6, backend))
    torch.library.opcheck(_log_vandermonde_moments, (u, x, backend))
    torch.library.opcheck(_log_vandermonde_transpose, (grad[2], grad[1], backend))
    torch.library.opcheck(_cauchy, (grad[3], grad[4], z, backend))
    torch.library.opcheck(_cauchy_backward, (dout, residues, w, z, backend))


def test_a_training_step_compiles_whole() -> None:
    v, x, z = random_tensor(2, 3, seed=1, dtype=torch.complex64), logarithms(2, 3, dtype=torch.complex64), nodes(5)
    v, x, z = (t.to(DEVICE, torch.complex64).requires_grad_(t.dim() > 1) for t in (v, x, z))

    def loss(v: Tensor, x: Tensor) -> Tensor:
        kernel = log_vandermonde(v, x, 6, backend="torch")
        state = log_vandermonde_transpose(kernel, x, backend="torch")
        return torch.stack((kernel.sum(), state.abs().sum(), cauchy(v, z, x, backend="torch").abs().sum()))

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(with_gradients(f, v.detach(), x.detach()) for f in (compiled, loss)), strict=True):
        assert_close("result", one, other, 1e-5)


@pytest.mark.parametrize(
    ("function", "changed", "error", "words"),
    [
        (log_vandermonde, {"v": 1.0}, TypeError, ["v must be a tensor", "float"]),
        (log_vandermonde, {"v": torch.ones(2, 3)}, TypeError, ["v has dtype float32", "complex64"]),
        (log_vandermonde, {"v": torch.ones(2, 4) * 1j}, ValueError, ["v has 4 states", "x has 3"]),
        (log_vandermonde, {"v": torch.ones(5, 3) * 1j}, ValueError, ["(5, 3)", "(2, 3)", "broadcast"]),
        (log_vandermonde, {"x": torch.ones(2, 0) * 1j}, ValueError, ["x has shape (2, 0)", "empty"]),
        (log_vandermonde, {"length": 0}, ValueError, ["length=0", "at least 1"]),
        (log_vandermonde, {"v": torch.ones(2, 3, device="meta") * 1j}, ValueError, ["is on meta"]),
        (log_vandermonde, {"backend": "cuda"}, ValueError, ["backend='cuda'"]),
        (log_vandermonde_transpose, {"u": torch.ones(2, 7) * 1j}, TypeError, ["u has dtype complex64", "float32"]),
        (log_vandermonde_transpose, {"u": torch.ones(4, 7)}, ValueError, ["u (4, 7)", "x (2, 3)"]),
        (cauchy, {"v": torch.ones(2, 4) * 1j}, ValueError, ["v has shape (2, 4)", "(2, 3)"]),
        (cauchy, {"z": torch.ones(2, 4) * 1j}, ValueError, ["z has shape (2, 4)", "(nodes,)"]),
        (cauchy, {"z": (torch.ones(4) * 1j).requires_grad_()}, ValueError, ["z requires a gradient", "detach"]),
        (cauchy, {"w": torch.ones(2, 3)}, TypeError, ["w has dtype float32"]),
        (
            cauchy,
            {"w": (torch.ones(2, 3) * 1j).to(torch.complex128), "backend": "triton"},
            ValueError,
            ["backend='triton' cannot serve"],
        ),
    ],
)
def test_bad_input_is_named(function: object, changed: dict, error: type, words: list[str]) -> None:
    ones = torch.ones(2, 3) * 1j
    given = {
        log_vandermonde: {"v": ones, "x": ones, "length": 7},
        log_vandermonde_transpose: {"u": torch.ones(2, 7), "x": ones},
        cauchy: {"v": ones, "z": torch.ones(4) * 1j, "w": ones},
    }[function] | changed  # type: ignore[index]
    with pytest.raises(error) as caught:
        function(**given)  # type: ignore[operator]
    message = str(caught.value).lower()
    assert message.startswith(function.__name__)  # type: ignore[attr-defined]
    assert all(word.lower() in message for word in words), message
