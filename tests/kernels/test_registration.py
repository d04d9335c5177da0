"""Operators registered by ``mambakit.kernels.registration``: gradients where needed, seen by whoever watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mambakit.kernels.registration import call, register

calls: list[str] = []


def _scale(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    calls.append("scale")
    return x * factor if y is None else x * y * factor, x.sum()


def _fake_scale(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


def _scale_backward(dout: Tensor, x: Tensor, factor: float) -> Tensor:
    calls.append("scale_backward")
    return dout * x * factor


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, y, ctx.factor = inputs
    ctx.save_for_backward(x, y)


def _differentiate(ctx: Any, dout: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    dx = call(backward, dout, torch.ones_like(x) if y is None else y, ctx.factor) + dsum
    return dx, None if y is None else call(backward, dout, x, ctx.factor), None


scale = register("test_scale", _scale, _fake_scale, _save, _differentiate)
backward = register("test_scale_backward", _scale_backward, lambda dout, x, factor: torch.empty_like(dout))


class Watch(TorchDispatchMode):
    """Notes every operator that reaches the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("y", [None, torch.arange(3.0)], ids=["absent", "given"])
def test_values_and_gradients(y: Tensor | None) -> None:
    x = torch.ones(3, requires_grad=True)
    out, total = scale(x, y, 2.0)
    assert torch.equal(out, 2 * (torch.ones(3) if y is None else y)) and total == 3
    (out.sum() + total).backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach() + 1)
    assert not scale(x.detach(), y, 2.0)[0].requires_grad
    with torch.no_grad():
        assert not scale(x, y, 2.0)[0].requires_grad


def test_torch_finds_nothing_to_object_to() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.arange(3.0, requires_grad=True)
    torch.library.opcheck(scale, (x, y, 2.0))
    torch.library.opcheck(scale, (x, None, 2.0))
    torch.library.opcheck(backward, (x.detach(), y.detach(), 2.0))


def test_modes_and_fake_tensors_see_the_operator() -> None:
    """The short way past the dispatcher is for plain tensors that nobody watches."""
    x = torch.ones(3, requires_grad=True)
    with Watch() as watch:
        out, total = scale(x, None, 2.0)
        (out.sum() + total).backward()
    assert [name for name in watch.seen if "mambakit" in name] == [
        "mambakit.test_scale.default",
        "mambakit.test_scale_backward.default",
    ]
    calls.clear()
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.ones(3)).requires_grad_()
    out, total = scale(fake, None, 2.0)  # outside the mode: the tensor alone tells
    with mode:
        (out.sum() + total).backward()
    assert fake.grad.shape == (3,) and not calls


def test_without_a_gradient_of_its_own_an_operator_refuses() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="mambakit::test_scale_backward has no gradient; .*backend='reference'"):
        backward(x, x, 2.0).sum().backward()


def test_a_call_inside_a_backward_goes_past_the_dispatcher_only_unwatched() -> None:
    x = torch.ones(3)
    with torch.no_grad(), Watch() as watch:
        assert torch.equal(call(backward, x, x, 2.0), 2 * x)
    assert "mambakit.test_scale_backward.default" in watch.seen
    with torch.no_grad():
        assert torch.equal(call(backward, x, x, 2.0), 2 * x)
    with torch.enable_grad():  # a gradient of a gradient is refused, not lost
        result = call(backward, x.clone().requires_grad_(), x, 2.0)
    with pytest.raises(RuntimeError, match="has no gradient"):
        result.sum().backward()
