"""``selective_scan``: the public function, and the torch operators behind it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambakit.kernels import checks, dispatch
from mambakit.kernels.registration import call, register
from mambakit.kernels.scan import chunked
from mambakit.kernels.scan.reference import HALF, direction_of, has_halves, scan_reference, state_dtype

NAME = "selective_scan"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool | str = False,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    """The selective state space recurrence of Mamba (Gu and Dao 2023, arXiv 2312.00752, equations 2a to 4).

    For each channel d, with N states, and delta <- softplus(delta + delta_bias) where asked for:

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = C_t h_t + D u_t,    out_t = y_t SiLU(z_t)

    A complex A stands for conjugate pairs of states: y_t = 2 Re(C_t h_t) + D u_t.

    Letters: B batch, L length, D channels, N state size, G groups.

    Args:
        u: input (B, L, D), float16, bfloat16, float32 or float64, as every real argument below.
        delta: time steps (B, L, D), before bias and softplus.
        A: (D, N) real, or complex with real B, C or complex ones. Its real part is negative in a stable system.
        B: (B, L, N); (B, L, G, N), where group g serves channels g D/G to (g+1) D/G - 1; or constant in time (D, N).
        C: as B.
        D: skip weight (D,).
        z: gate (B, L, D).
        delta_bias: (D,), added to delta.
        delta_softplus: apply softplus to delta after the bias. A raw step of -1e4 then gives exactly 0: the state
            passes that element unchanged, which is how padding is written.
        initial_state: (B, D, N), the state before the first element; zeros if None.
        seq_idx: (B, L) int32 or int64; where its value changes another sequence begins and the state is cleared, so
            ``initial_state`` reaches only the first one.
        reverse: run from the last element to the first. The initial state then enters at the end of the sequence and
            the final state leaves at its start. "half": the second half of the channels does so and the first half
            runs forwards, both directions of a bidirectional block in one call; D is even, and B and C have an even
            number of groups, one group that serves both halves, or are constant. Every channel has its own z: to gate
            both halves by one (B, L, D/2), give it twice side by side or multiply behind the call.
        return_final_state: also return the state after the last element.
        backend: "auto", "triton", "torch" or "reference"; see ``mambakit.kernels.dispatch``. Complex or float64
            arguments are served by "torch".

    Returns:
        out (B, L, D) in u's dtype, or ``(out, final_state)`` with final_state (B, D, N). States are float32 whatever
        the inputs, complex64 for a complex A, and float64 or complex128 where u, delta, A, B or C is.
        Gradients flow to every tensor argument but ``seq_idx``, also back through the final state. For gradients of
        gradients use ``backend="reference"``.

    Raises:
        ValueError: a wrong shape or device, a length of 0, or a backend that cannot serve the call.
        TypeError: a wrong dtype.
    """
    if not _is_usual(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx):
        _check(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    if reverse is not False:
        _check_reverse(reverse, u, B, C)
    chosen = dispatch.choose(NAME, backend, u, _not_in_triton(u, delta, A, B, C)).backend
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, direction_of(reverse))
    if chosen == "reference":
        out, final_state = scan_reference(*arguments)
    else:
        out, final_state, _ = _scan(*arguments, chosen)
    return (out, final_state) if return_final_state else out


def _is_usual(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> bool:
    """Whether a call is plainly right, found out in a third of the time: all else is for ``_check`` to judge."""
    if seq_idx is not None or not isinstance(u, Tensor) or not isinstance(A, Tensor):
        return False
    rows, states, device = u.shape, A.shape, u.device
    if len(rows) != 3 or len(states) != 2 or states[0] != rows[2] or 0 in rows or 0 in states:
        return False
    vectors, lone = (*rows[:2], states[1]), rows[2:]
    required = ((u, rows), (delta, rows), (A, states), (B, vectors), (C, vectors))
    optional = ((D, lone), (z, rows), (delta_bias, lone), (initial_state, (rows[0], *states)))
    return all(
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype in checks.FLOATS
        and tensor.device == device
        for tensor, shape in (*required, *(pair for pair in optional if pair[0] is not None))
    )


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    checks.check_shape(NAME, "u", u, batch=None, length=None, channels=None)
    batch, length, channels = u.shape
    checks.check_shape(NAME, "A", A, channels=channels, d_state=None)
    numbers = checks.FLOATS + checks.COMPLEX if A.is_complex() else checks.FLOATS
    d_state = A.shape[1]
    checks.check_dtype(NAME, "A", A, *checks.FLOATS, *checks.COMPLEX)
    for name, tensor in (("B", B), ("C", C)):
        axes = tensor.dim() if isinstance(tensor, Tensor) else 3
        if axes == 2:
            checks.check_shape(NAME, name, tensor, channels=channels, d_state=d_state)
        elif axes == 4:
            checks.check_shape(NAME, name, tensor, batch=batch, length=length, groups=None, d_state=d_state)
            if channels % tensor.shape[2]:
                raise ValueError(
                    f"{NAME}: {name} has {tensor.shape[2]} groups, expected a divisor of the {channels} channels"
                )
        else:
            checks.check_shape(NAME, name, tensor, batch=batch, length=length, d_state=d_state)
        checks.check_dtype(NAME, name, tensor, *numbers)
    if initial_state is not None:
        checks.check_shape(NAME, "initial_state", initial_state, batch=batch, channels=channels, d_state=d_state)
        checks.check_dtype(NAME, "initial_state", initial_state, *numbers)
    for name, tensor in (("u", u), ("delta", delta), *(() if z is None else (("z", z),))):
        checks.check_shape(NAME, name, tensor, batch=batch, length=length, channels=channels)
        checks.check_dtype(NAME, name, tensor, *checks.FLOATS)
    for name, maybe in (("D", D), ("delta_bias", delta_bias)):
        if maybe is not None:
            checks.check_shape(NAME, name, maybe, channels=channels)
            checks.check_dtype(NAME, name, maybe, *checks.FLOATS)
    everything = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
    everything |= {"delta_bias": delta_bias, "initial_state": initial_state}
    for name, maybe in everything.items():
        if maybe is not None:
            checks.check_device(NAME, name, maybe, u, "u")
    checks.check_seq_idx(NAME, seq_idx, u, "u")


def _check_reverse(reverse: bool | str, u: Tensor, B: Tensor, C: Tensor) -> None:
    if reverse not in (False, True, "half"):
        raise ValueError(f'{NAME}: reverse is {reverse!r}, expected False, True or "half"')
    if direction_of(reverse) == HALF:
        channels = u.shape[2]
        if channels % 2:
            raise ValueError(f'{NAME}: u has {channels} channels, expected an even number of them for reverse="half"')
        for name, tensor in (("B", B), ("C", C)):
            if tensor.dim() == 4 and has_halves(tensor) and tensor.shape[2] % 2:
                raise ValueError(
                    f"{NAME}: {name} has {tensor.shape[2]} groups, expected one or an even number of them for "
                    'reverse="half": no group may serve channels of both directions unless it serves all'
                )


def _not_in_triton(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    dtype = state_dtype(u, delta, A, B, C)
    if dtype.is_complex:
        return "A is complex, and the kernel's states are real"
    if dtype == torch.float64:
        return "an argument is float64, and the kernel computes in float32"
    if A.shape[1] > 256:
        return f"d_state is {A.shape[1]}, and the kernel holds at most 256 states a channel"
    return None


def _implementation(backend: str) -> ModuleType:
    """The module whose ``scan_forward``, ``scan_backward`` and ``checkpoint_shape`` serve; Triton loads here."""
    if backend == "triton":
        from mambakit.kernels.scan import triton_kernels

        return triton_kernels
    return chunked


def _chosen_dtypes(backend: str, tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for vectorised PyTorch, which multiplies states with B and C in float32 at least."""
    return nullcontext() if backend == "triton" else torch.autocast(tensor.device.type, enabled=False)


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    direction: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, direction)
    with _chosen_dtypes(backend, u):
        return _implementation(backend).scan_forward(*arguments)


def _fake_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    direction: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    dtype = state_dtype(u, delta, A, B, C)
    checkpoints = _implementation(backend).checkpoint_shape(batch, length, channels, A.shape[1])
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, channels, A.shape[1]), dtype=dtype),
        u.new_empty(checkpoints, dtype=dtype),
    )


def _backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    direction: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    with _chosen_dtypes(backend, u):
        gradients = _implementation(backend).scan_backward(
            dout, dfinal_state, *arguments, checkpoints, delta_softplus, direction
        )
    # An operator returns tensors only: an empty one stands for the gradient of an argument that was not given.
    return tuple(u.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


def _fake_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    direction: int,
    backend: str,
) -> tuple[Tensor, ...]:
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty(0) if a is None else a.new_empty(a.shape) for a in arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros as large as the checkpoints for the gradient they never get
    *tensors, ctx.delta_softplus, ctx.direction, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    options = (ctx.delta_softplus, ctx.direction, ctx.backend)
    gradients = call(_scan_backward, dout, dfinal_state, *tensors, checkpoints, *options)
    given = (None if t is None else gradient for t, gradient in zip(tensors, gradients, strict=False))
    return *given, None, None, None, None


_scan = register("selective_scan", _forward, _fake_forward, _save, _differentiate)
_scan_backward = register("selective_scan_backward", _backward, _fake_backward)
