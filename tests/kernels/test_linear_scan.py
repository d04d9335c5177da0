"""The chunked linear recurrence against the loop, its gradients, and a polynomial that is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambakit.kernels import linear_scan
from mambakit.kernels.recurrence import chunked
from mambakit.kernels.recurrence.op import _scan
from mambakit.kernels.testing import assert_close, poisoned_memory, random_tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def arguments(
    length: int, a_shape: tuple[int, ...] | None = None, dtypes: str = "ddd", trailing: tuple[int, ...] = (3,)
) -> list[Tensor]:
    """a, b and an initial state; letters of ``dtypes``: d float64, z complex128, f float32, c complex64, h bfloat16."""
    named = {"d": torch.float64, "z": torch.complex128, "f": torch.float32, "c": torch.complex64, "h": torch.bfloat16}
    b_shape = (2, length, *trailing)
    shapes = (b_shape if a_shape is None else a_shape, b_shape, (2, *trailing))
    return [random_tensor(*s, seed=i, dtype=named[d]) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]


def results(tensors: list[Tensor | None], reverse: bool, backend: str) -> list[Tensor]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    h = linear_scan(leaves[0], leaves[1], initial_state=leaves[2], reverse=reverse, backend=backend)
    weight = random_tensor(*h.shape, seed=9, dtype=h.dtype, device=h.device)
    return [h, *torch.autograd.grad(h, [t for t in leaves if t is not None], weight)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 48, 300])
@pytest.mark.parametrize("given", ["both", "no state", "complex", "mixed", "constant", "per channel", "flat", "deep"])
def test_states_and_gradients_are_those_of_the_loop(given: str, length: int, reverse: bool, device: str) -> None:
    forms = {
        "both": arguments(length),
        "no state": [*arguments(length)[:2], None],
        "complex": arguments(length, dtypes="zzz"),
        "mixed": arguments(length, dtypes="dzd"),
        "constant": arguments(length, (1, 1, 3), dtypes="zdz"),
        "per channel": arguments(length, (2, length, 1)),
        "flat": arguments(length, trailing=()),
        "deep": arguments(length, (1, length, 2, 1), trailing=(2, 3)),
    }
    tensors = [None if t is None else t.to(device) for t in forms[given]]
    tensors[0] = tensors[0] / 2
    got, want = results(tensors, reverse, "torch"), results(tensors, reverse, "reference")
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert_close(given, one, other)


@pytest.mark.parametrize("reverse", [False, True])
def test_large_steps_go_one_after_another(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LARGE_STEP", 1)
    monkeypatch.setattr(chunked, "_scan_chunks", None)
    for one, other in zip(*(results(arguments(40), reverse, name) for name in ("torch", "reference")), strict=True):
        assert_close("result", one, other)


def test_powers_and_sums() -> None:
    """With a constant a and b = 1 the states are the geometric series; with a = 1 they are running sums."""
    a = torch.tensor([[[0.9, -0.5]]], dtype=torch.float64)
    n = torch.arange(1, 101, dtype=torch.float64).view(1, -1, 1)
    h = linear_scan(a, torch.ones(1, 100, 2, dtype=torch.float64))
    assert_close("series", h, (1 - a**n) / (1 - a))
    b = random_tensor(1, 100, 2, seed=1, dtype=torch.float64)
    assert_close("sums", linear_scan(torch.ones_like(b), b), b.cumsum(1))


def test_vanishing_coefficients_leave_no_trace() -> None:
    """Products that underflow and coefficients of zero: nothing divides by them."""
    a, b, state = arguments(200, dtypes="fff")
    a = a.abs() * 1e-30
    a[:, 50] = 0
    h = linear_scan(a, b, initial_state=state)
    assert bool(torch.isfinite(h).all())
    assert_close("states", h, linear_scan(a, b, initial_state=state, backend="reference"))
    assert torch.equal(h[:, 50], b[:, 50])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtypes", ["ddd", "zzz", "dzz"])
def test_gradcheck_of_both_orders(dtypes: str, reverse: bool) -> None:
    tensors = [t.requires_grad_() for t in arguments(18, dtypes=dtypes, trailing=(1,))]

    def function(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        return linear_scan(a, b, initial_state=state, reverse=reverse, backend="torch")

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
def test_narrow_inputs_keep_float32_states(device: str) -> None:
    a, b, state = (t.to(device) for t in arguments(40, dtypes="hhh"))
    h = linear_scan(a / 2, b, initial_state=state)
    assert h.dtype == torch.float32
    assert_close("states", h, linear_scan(a.double() / 2, b.double(), initial_state=state.double()).float())
    got, want = results([a / 2, b, state], False, "torch"), results([a / 2, b, state], False, "reference")
    assert [t.dtype for t in got] == [torch.float32, *[torch.bfloat16] * 3]
    for one, other in zip(got, want, strict=True):
        assert_close("result", one, other)


def test_reverse_is_flipped_and_inputs_are_left_alone() -> None:
    tensors = arguments(37)
    kept = [t.clone() for t in tensors]
    a, b, state = tensors
    with poisoned_memory():
        h = linear_scan(a.transpose(0, 1).contiguous().transpose(0, 1), b, initial_state=state, reverse=True)
    assert_close("reverse", h, linear_scan(a.flip(1), b.flip(1), initial_state=state).flip(1))
    assert all(torch.equal(one, other) for one, other in zip(tensors, kept, strict=True))
    a, b = a[:1, :, :1].expand(2, 37, 3), b[:1].expand(2, 37, 3)
    assert_close("expanded", linear_scan(a, b), linear_scan(a.contiguous(), b.contiguous()))


@pytest.mark.parametrize("dtypes", ["fff", "ccc"])
def test_operator_passes_opcheck_and_compiles(dtypes: str) -> None:
    a, b, state = (t.requires_grad_() for t in arguments(20, dtypes=dtypes))
    torch.library.opcheck(_scan, (a, b, state, False))
    torch.library.opcheck(_scan, (a[:, :1].detach(), b, None, True))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: linear_scan(x[0], x[1]).abs().sum(), fullgraph=True, backend="aot_eager")
    assert_close("loss", compiled(a, b), linear_scan(a, b).abs().sum())


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"b": torch.zeros(4)}, ValueError, ["b has shape (4,)", "batch, length"]),
        ({"b": torch.zeros(2, 0, 3)}, ValueError, ["b has shape (2, 0, 3)", "empty"]),
        ({"b": 1.0}, TypeError, ["b must be a tensor", "float"]),
        ({"a": 0.5}, TypeError, ["a must be a tensor", "torch.full"]),
        ({"a": torch.zeros(2, 4, 3)}, ValueError, ["a has shape (2, 4, 3)", "(2, 5, 3)"]),
        ({"a": torch.zeros(2, 5, 3, dtype=torch.int32)}, TypeError, ["a has dtype int32"]),
        ({"initial_state": torch.zeros(2, 4)}, ValueError, ["initial_state has shape (2, 4)", "axis_2=3"]),
        ({"a": torch.zeros(2, 5, 3, device="meta")}, ValueError, ["a is on meta"]),
        ({"backend": "triton"}, ValueError, ["linear_scan", "Triton"]),
    ],
)
def test_bad_input_is_named(changed: dict, error: type, words: list[str]) -> None:
    given = {"a": torch.zeros(2, 5, 3), "b": torch.zeros(2, 5, 3), "initial_state": torch.zeros(2, 3)} | changed
    with pytest.raises(error) as caught:
        linear_scan(given.pop("a"), given.pop("b"), **given)
    message = str(caught.value).lower()
    assert all(word.lower() in message for word in words), message
