"""Registering a torch operator so that a call of it costs little.

``torch.library.custom_op`` wraps every call in several Python layers (checks for aliasing, for mutation, an autograd
node made of dictionaries): tens of microseconds, while the kernel of a short sequence takes about as long. Here the
same operator is defined by the functions underneath, ``Library.define`` and ``Library.impl``: one Python function for
the computation, and one under the Autograd key that makes a ``torch.autograd.Function`` only where a gradient is
needed. ``opcheck``, ``torch.compile(fullgraph=True)`` and fake tensors see an operator like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Kept as long as the process lives: an operator disappears with the library that defined it.
_library = torch.library.Library("mambakit", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_implementations: dict[Any, Callable[..., Any]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def register(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define the operator ``mambakit::name`` and return it; it is called with all arguments by position.

    Args:
        name: the operator's name, used once in a process.
        implementation: the computation, for every device. Its annotations (``Tensor``, ``Tensor | None``, int, float,
            bool, str; a tensor or a tuple of tensors back) are the schema. No argument has a default value or is
            changed in place, and no result is an argument or a view of one.
        fake: the same signature; returns empty tensors of the results' shapes and dtypes.
        setup_context: ``(ctx, inputs, output)``, saves what ``backward`` needs, as for a ``torch.autograd.Function``.
        backward: ``(ctx, *gradients)`` of the outputs, returns one gradient or None for each argument. Without it and
            ``setup_context`` a gradient through the operator is an error.
    """
    _library.define(name + torch.library.infer_schema(implementation, mutates_args=()))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mambakit::{name}", fake, lib=_library)
    operator = getattr(torch.ops.mambakit, name).default

    _implementations[operator] = implementation

    def compute(inputs: tuple[Any, ...]) -> Any:
        if _is_plain(inputs):
            return implementation(*inputs)
        with _below_autograd():
            return operator(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = compute(inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"mambakit::{name} has no gradient; for gradients of gradients use backend='reference'")

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward or refuse)}
    node: Any = type(name, (torch.autograd.Function,), methods)

    def differentiable(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return node.apply(*inputs)
        return compute(inputs)

    _library.impl(name, differentiable, "Autograd")
    return operator


def call(operator: Any, *inputs: Any) -> Any:
    """``operator(*inputs)``, from the backward of another: past the dispatcher where nothing watches."""
    if not torch.is_grad_enabled() and _is_plain(inputs):
        return _implementations[operator](*inputs)
    return operator(*inputs)


def _is_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether nothing waits below autograd (fake tensors, a tracer or another mode, a transform, a tensor subclass).

    The dispatcher would then come to the implementation itself, by way of two conversions of every argument.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(x) in _PLAIN for x in inputs if isinstance(x, Tensor))
