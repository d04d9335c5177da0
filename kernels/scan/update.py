"""``selective_state_update``: one step of the selective scan, in place on its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels import checks, dispatch
from mambakit.kernels.scan.reference import state_dtype

NAME = "selective_state_update"


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One element of ``selective_scan``, for generation: reads and overwrites ``state``.

    With dt <- softplus(dt + dt_bias) where asked for (Gu and Dao 2023, arXiv 2312.00752; with heads, Dao and Gu 2024,
    arXiv 2405.21060):

        state <- exp(dt A) state + dt B x,    y = C state + D x,    out = y SiLU(z)

    A complex A stands for conjugate pairs of states: y = 2 Re(C state) + D x.

    Letters: B batch, D channels, N state size, H heads, P channels a head, G groups (G divides H; group g serves heads
    g H/G to (g+1) H/G - 1). Floats of any width; the arithmetic is float32, or float64 where an argument is.

    Args:
        state: (B, D, N), or (B, H, P, N) with heads; **updated in place**. With ``state_batch_indices`` its first axis
            is that of a cache of any number of lines.
        x: input (B, D), or (B, H, P).
        dt: time step, like x.
        A: (D, N), or (H, P, N).
        B: (B, N), or (B, G, N) with heads.
        C: like B.
        D: skip weight (D,), or (H, P).
        z: gate, like x.
        dt_bias: (D,), or (H, P).
        dt_softplus: apply softplus to dt after the bias.
        state_batch_indices: (B,) int32 or int64, the line of ``state`` that each row uses, each line at most once. A
            negative one marks a padding row: no line changes, and its output is zero.
        backend: "auto", "triton", "torch" or "reference" (for one step the PyTorch path is the definition, so the
            last two are the same).

    Returns:
        out, like x. There are no gradients: use ``selective_scan`` of length 1 where they are needed.

    Raises:
        ValueError: a wrong shape or device, or a backend that cannot serve the call.
        TypeError: a wrong dtype.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    dtype = state_dtype(state, x, dt, A, B, C)
    obstacle = None
    if dtype.is_complex:
        obstacle = "an argument is complex, and the kernel's states are real"
    elif dtype == torch.float64:
        obstacle = "an argument is float64, and the kernel computes in float32"
    chosen = dispatch.choose(NAME, backend, x, obstacle).backend
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, chosen)


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    """The update in PyTorch, on any device; arguments as ``selective_state_update``."""
    dtype = state_dtype(state, x, dt, A, B, C)
    real = torch.empty((), dtype=dtype).real.dtype
    lines = state if state_batch_indices is None else state.index_select(0, state_batch_indices.clamp(min=0))
    step, wide_x = dt.to(real), x.to(real)
    if dt_bias is not None:
        step = step + dt_bias.to(real)
    if dt_softplus:
        step = F.softplus(step)
    # With heads, B and C (B, G, N) serve H / G heads each, and all their channels; without, all channels.
    if x.dim() == 3:
        B, C = (b.repeat_interleave(x.shape[1] // b.shape[1], dim=1) for b in (B, C))
    B, C = B.to(dtype).unsqueeze(-2), C.to(dtype).unsqueeze(-2)
    updated = torch.exp(step.unsqueeze(-1) * A.to(dtype)) * lines + (step * wide_x).unsqueeze(-1) * B
    y = (updated * C).sum(-1)
    if dtype.is_complex:
        y = 2 * y.real
    if D is not None:
        y = y + D.to(real) * wide_x
    if z is not None:
        y = y * F.silu(z.to(real))
    if state_batch_indices is None:
        state.copy_(updated)
    else:
        real_rows = state_batch_indices >= 0
        state[state_batch_indices[real_rows]] = updated[real_rows].to(state.dtype)
        y = y.masked_fill(~real_rows.view(-1, *[1] * (y.dim() - 1)), 0)
    return y.to(x.dtype).contiguous()


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
) -> None:
    if state.dim() == 4:
        checks.check_shape(NAME, "state", state, lines=None, heads=None, channels=None, d_state=None)
        width: dict[str, int | None] = {"heads": state.shape[1], "channels": state.shape[2]}
        group: dict[str, int | None] = {"groups": None}
    else:
        checks.check_shape(NAME, "state", state, lines=None, channels=None, d_state=None)
        width, group = {"channels": state.shape[1]}, {}
    d_state = state.shape[-1]
    checks.check_shape(NAME, "x", x, batch=None if state_batch_indices is not None else state.shape[0], **width)
    batch = x.shape[0]
    checks.check_shape(NAME, "dt", dt, batch=batch, **width)
    checks.check_shape(NAME, "A", A, **width, d_state=d_state)
    for name, tensor in (("B", B), ("C", C)):
        checks.check_shape(NAME, name, tensor, batch=batch, **group, d_state=d_state)
        if group and state.shape[1] % tensor.shape[1]:
            raise ValueError(
                f"{NAME}: {name} has {tensor.shape[1]} groups, expected a divisor of the {state.shape[1]} heads"
            )
    if z is not None:
        checks.check_shape(NAME, "z", z, batch=batch, **width)
    for name, maybe in (("D", D), ("dt_bias", dt_bias)):
        if maybe is not None:
            checks.check_shape(NAME, name, maybe, **width)
    if A.is_complex() and not state.is_complex():
        raise TypeError(
            f"{NAME}: A is complex and state is {state.dtype}, expected a complex state (state.to(A.dtype))"
        )
    numbers = checks.FLOATS + checks.COMPLEX if state.is_complex() else checks.FLOATS
    for name, tensor in (("state", state), ("A", A), ("B", B), ("C", C)):
        checks.check_dtype(NAME, name, tensor, *numbers)
        checks.check_device(NAME, name, tensor, x, "x")
    for name, maybe in (("x", x), ("dt", dt), ("D", D), ("z", z), ("dt_bias", dt_bias)):
        if maybe is not None:
            checks.check_dtype(NAME, name, maybe, *checks.FLOATS)
            checks.check_device(NAME, name, maybe, x, "x")
    if state_batch_indices is not None:
        checks.check_shape(NAME, "state_batch_indices", state_batch_indices, batch=batch)
        checks.check_dtype(NAME, "state_batch_indices", state_batch_indices, torch.int32, torch.int64)
        checks.check_device(NAME, "state_batch_indices", state_batch_indices, x, "x")


@torch.library.custom_op("mambakit::selective_state_update", mutates_args={"state"})
def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from mambakit.kernels.scan import triton_kernels

        return triton_kernels.state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    return state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


@_update.register_fake
def _(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)
