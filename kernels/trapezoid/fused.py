"""``trapezoidal_ssd`` by Triton, of one rank: three registered operators around the recurrence, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambakit.kernels.duality import weighted_ssd
from mambakit.kernels.duality.reference import ssd_dtype
from mambakit.kernels.registration import call, register
from mambakit.kernels.trapezoid.chunked import at_end, begins, input_weights, masked, unless_empty
from mambakit.kernels.trapezoid.reference import TrapezoidalState, by_head, rotate, start_state


def not_in_triton(x: Tensor, dt: Tensor, dA: Tensor, B: Tensor, C: Tensor, mimo_x: Tensor | None) -> str | None:
    """Why the kernels do not cover a call, or None."""
    if mimo_x is not None:
        return "mimo_x is given, and the kernel takes one input a step"
    if ssd_dtype(x, dt, dA, B, C) == torch.float64:
        return "an argument is float64, and the kernel computes in float32"
    if x.shape[3] > 128:
        return f"a head has {x.shape[3]} channels, and the kernel holds at most 128"
    if B.shape[-1] > 256:
        return f"d_state is {B.shape[-1]}, and the kernel holds at most 256 states a channel"
    return None


def trapezoidal_ssd_triton(
    x: Tensor,
    dt: Tensor,
    dA: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: TrapezoidalState | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, TrapezoidalState | None]:
    """Arguments and results of ``trapezoidal_ssd_reference``, of one rank; ``backend`` computes the recurrence.

    The formulas are those of ``chunked.py``. A state costs a dozen small launches: it is None unless asked for.
    """
    heads = x.shape[2]
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen here, and not autocast's to change
        dt, dA = (masked(tensor.float(), lengths).contiguous() for tensor in (dt, dA))
        gamma, weights, reach = input_weights(dt, trap.float())
        runs = None if seq_idx is None else begins(seq_idx).cumsum(1, dtype=torch.int32)
        start = None if initial_state is None else start_state(initial_state, x, B, angles, torch.float32)
        angle, angle_end = _angles(_rows(angles), dt, None if start is None else start.angle, runs)
        ssm, first = None, None
        if start is not None:
            ssm = start.ssm + torch.einsum("bh,bhp,bhn->bhpn", reach, start.v, start.k.squeeze(1))
            q = rotate(by_head(C[:, 0], C_bias, heads, torch.float32), angle[:, :1], halves=False)
            first = torch.einsum("bhpn,bqhn->bhp", ssm, q)

        q_next, k, dots = _keys(
            *(_rows(tensor.squeeze(2)) for tensor in (B, C)),
            *(None if bias is None else bias.squeeze(1).contiguous() for bias in (B_bias, C_bias)),
            angle,
            x.dtype,
        )
        read, ssm = weighted_ssd(x, weights, dA, k, q_next, initial_state=ssm, seq_idx=seq_idx, backend=backend)
        z = None if z is None else _rows(z.squeeze(2))
        out = _output(read, first, _rows(x), z, D, dA, gamma.contiguous(), dots, runs).unsqueeze(2)
        if not return_final_state:
            return out, None

        k_end = rotate(by_head(at_end(B, lengths), B_bias, heads, torch.float32), angle_end.unsqueeze(1), halves=False)
        v_end = at_end(x, lengths).float()
        if lengths is not None:
            start = start_state(initial_state, x, B, angles, torch.float32)
            k_end, v_end = unless_empty(lengths, k_end, start.k), unless_empty(lengths, v_end, start.v)
    return out, TrapezoidalState(angle_end, ssm, k_end, v_end)


def _rows(tensor: Tensor) -> Tensor:
    """``tensor`` with its last axis contiguous, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _angles_implementation(
    angles: Tensor, dt: Tensor, start: Tensor | None, runs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The angle at each step, (B, L, H, S), and the last in [0, 2 pi), (B, H, S), from ``start`` (B, H, S), or 0, on.

    angles (B, L, S), dt (B, L, H); runs (B, L) counts the sequences of a row. The angle at a step is up to whole turns
    that of ``angle_sums``, smaller than 2 pi and what one chunk adds.
    """
    from mambakit.kernels.trapezoid import triton_launch

    return triton_launch.angles(angles, dt, start, runs)


def _angles_fake(angles: Tensor, dt: Tensor, start: Tensor | None, runs: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, heads = dt.shape
    return dt.new_empty(*dt.shape, angles.shape[2]), dt.new_empty(batch, heads, angles.shape[2])


def _angles_backward_implementation(
    dangle: Tensor, dend: Tensor, angles: Tensor, dt: Tensor, runs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of angles, dt and ``start``."""
    from mambakit.kernels.trapezoid import triton_launch

    return triton_launch.angles_gradients(dangle.contiguous(), dend, angles, dt, runs)


def _angles_backward_fake(
    dangle: Tensor, dend: Tensor, angles: Tensor, dt: Tensor, runs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return dt.new_empty(angles.shape), torch.empty_like(dt), torch.empty_like(dend)


def _angles_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    angles, dt, start, runs = inputs
    ctx.save_for_backward(angles, dt, runs)
    ctx.started = start is not None


def _angles_gradients(ctx: Any, dangle: Tensor, dend: Tensor) -> tuple[Any, ...]:
    angles, dt, runs = ctx.saved_tensors
    dangles, ddt, dstart = call(_angles_backward, dangle, dend, angles, dt, runs)
    return dangles.to(angles.dtype), ddt, dstart if ctx.started else None, None


def _keys_implementation(
    B: Tensor, C: Tensor, B_bias: Tensor | None, C_bias: Tensor | None, angle: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q of the step after, zeros at the last, and k, both (B, L, H, N) in ``dtype``; their products (B, L, H).

    B and C are (B, L, G, N), their biases (H, N), angle (B, L, H, S).
    """
    from mambakit.kernels.trapezoid import triton_launch

    return triton_launch.keys(B, C, B_bias, C_bias, angle, dtype)


def _keys_fake(
    B: Tensor, C: Tensor, B_bias: Tensor | None, C_bias: Tensor | None, angle: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    q = B.new_empty(*angle.shape[:3], B.shape[3], dtype=dtype)
    return q, torch.empty_like(q), angle.new_empty(angle.shape[:3])


def _keys_backward_implementation(
    dq: Tensor,
    dk: Tensor,
    ddots: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angle: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of B, C, both biases (H, 2, N), and angle."""
    from mambakit.kernels.trapezoid import triton_launch

    dq, dk, ddots = dq.contiguous(), dk.contiguous(), ddots.contiguous()
    return triton_launch.keys_gradients(dq, dk, ddots, B, C, B_bias, C_bias, angle)


def _keys_backward_fake(
    dq: Tensor,
    dk: Tensor,
    ddots: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angle: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dB, dC = (torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in (B, C))
    return dB, dC, angle.new_empty(angle.shape[2], 2, B.shape[3]), torch.empty_like(angle)


def _keys_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])


def _keys_gradients(ctx: Any, dq: Tensor, dk: Tensor, ddots: Tensor) -> tuple[Any, ...]:
    B, C, B_bias, C_bias, angle = ctx.saved_tensors
    dB, dC, dbias, dangle = call(_keys_backward, dq, dk, ddots, B, C, B_bias, C_bias, angle)
    biases = (None if b is None else d.to(b.dtype) for b, d in zip((B_bias, C_bias), dbias.unbind(1), strict=True))
    return dB, dC, *biases, dangle, None


def _output_implementation(
    read: Tensor,
    first: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    D: Tensor | None,
    dA: Tensor,
    gamma: Tensor,
    dots: Tensor,
    runs: Tensor | None,
) -> Tensor:
    """(exp(dA_t) read_{t-1} + (gamma_t dots_t + D) x_t) SiLU(z_t), (B, L, H, P); before the first step ``first``."""
    from mambakit.kernels.trapezoid import triton_launch

    return triton_launch.output(read.contiguous(), first, x, z, D, dA, gamma, dots, runs)


def _output_fake(
    read: Tensor,
    first: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    D: Tensor | None,
    dA: Tensor,
    gamma: Tensor,
    dots: Tensor,
    runs: Tensor | None,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _output_backward_implementation(
    dout: Tensor,
    read: Tensor,
    first: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    D: Tensor | None,
    dA: Tensor,
    gamma: Tensor,
    dots: Tensor,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of read, first, x, z (empty tensors where not given), dA, and of gamma_t dots_t + D."""
    from mambakit.kernels.trapezoid import triton_launch

    tensors = (dout.contiguous(), read.contiguous(), first, x, z, D, dA, gamma, dots, runs)
    dread, dfirst, dx, dz, ddA, down = triton_launch.output_gradients(*tensors)
    dfirst, dz = (dA.new_empty(0) if gradient is None else gradient for gradient in (dfirst, dz))
    return dread, dfirst, dx, dz, ddA, down


def _output_backward_fake(
    dout: Tensor,
    read: Tensor,
    first: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    D: Tensor | None,
    dA: Tensor,
    gamma: Tensor,
    dots: Tensor,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dread, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dfirst = dA.new_empty(0 if first is None else first.shape)
    dz = dA.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    return dread, dfirst, dx, dz, torch.empty_like(dA), torch.empty_like(dA)


def _output_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _output_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    read, first, x, z, D, dA, gamma, dots, runs = ctx.saved_tensors
    tensors = (read, first, x, z, D, dA, gamma, dots, runs)
    dread, dfirst, dx, dz, ddA, down = call(_output_backward, dout, *tensors)
    dD = None if D is None else down.sum((0, 1)).to(D.dtype)
    return (
        dread,
        None if first is None else dfirst,
        dx,
        None if z is None else dz,
        dD,
        ddA,
        down * dots,
        down * gamma,
        None,
    )


_angles_backward = register("trapezoid_angles_backward", _angles_backward_implementation, _angles_backward_fake)
_angles = register("trapezoid_angles", _angles_implementation, _angles_fake, _angles_setup, _angles_gradients)
_keys_backward = register("trapezoid_keys_backward", _keys_backward_implementation, _keys_backward_fake)
_keys = register("trapezoid_keys", _keys_implementation, _keys_fake, _keys_setup, _keys_gradients)
_output_backward = register("trapezoid_output_backward", _output_backward_implementation, _output_backward_fake)
_output = register("trapezoid_output", _output_implementation, _output_fake, _output_setup, _output_gradients)
