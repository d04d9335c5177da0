"""``trapezoidal_ssd`` by Triton, of one rank: two registered operators around the recurrence, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.duality import weighted_ssd
from mambakit.kernels.duality.reference import ssd_dtype
from mambakit.kernels.registration import call, register
from mambakit.kernels.trapezoid.chunked import at_end, begins, input_weights, masked, unless_empty
from mambakit.kernels.trapezoid.reference import TrapezoidalState, by_head, rotate, start_state

STEPS = 16  # of a chunk of angles, which a program adds up


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
    backend: str,
) -> tuple[Tensor, TrapezoidalState]:
    """Arguments and results of ``trapezoidal_ssd_reference``, of one rank; ``backend`` computes the recurrence.

    The formulas are those of ``chunked.py``.
    """
    heads = x.shape[2]
    start = start_state(initial_state, x, B, angles, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen here, and not autocast's to change
        dt, dA = (masked(tensor.float(), lengths).contiguous() for tensor in (dt, dA))
        gamma, weights, reach = input_weights(dt, trap.float(), seq_idx)
        runs = None if seq_idx is None else begins(seq_idx).cumsum(1, dtype=torch.int32)
        carry = carries(angles.float(), dt, start.angle, runs)
        ssm, first = None, None
        if initial_state is not None:
            ssm = start.ssm + torch.einsum("bh,bhp,bhn->bhpn", reach, start.v, start.k.squeeze(1))
            angle = start.angle + math.pi * torch.tanh(angles[:, :1].float()) * dt[:, 0].unsqueeze(-1)
            q = rotate(by_head(C[:, 0], C_bias, heads, torch.float32), angle.unsqueeze(1), halves=False)
            first = torch.einsum("bhpn,bqhn->bhp", ssm, q)

        q_next, k, dots = _keys(
            *(_rows(tensor.squeeze(2)) for tensor in (B, C)),
            *(None if bias is None else bias.squeeze(1).contiguous() for bias in (B_bias, C_bias)),
            _rows(angles),
            dt,
            carry[:, :-1].contiguous(),
            runs,
            x.dtype,
        )
        read, ssm = weighted_ssd(x, weights, dA, k, q_next, initial_state=ssm, seq_idx=seq_idx, backend=backend)
        z = None if z is None else _rows(z.squeeze(2))
        out = _output(read, first, _rows(x), z, D, dA, gamma.contiguous(), dots, runs)

        k_end = rotate(by_head(at_end(B, lengths), B_bias, heads, torch.float32), carry[:, -1:], halves=False)
        k_end = unless_empty(lengths, k_end, start.k)
        v_end = unless_empty(lengths, at_end(x, lengths).float(), start.v)
    return out.unsqueeze(2), TrapezoidalState(carry[:, -1], ssm, k_end, v_end)


def carries(angles: Tensor, dt: Tensor, start: Tensor, runs: Tensor | None) -> Tensor:
    """The angle before each chunk of ``STEPS`` steps, and behind the last: (B, chunks + 1, H, S) in [0, 2 pi).

    ``runs`` (B, L) counts the sequences of a row. Inside the chunks the kernels add up; the chunks' sums are float64,
    as in ``angle_sums``.
    """
    padding = -dt.shape[1] % STEPS
    speeds = F.pad(math.pi * torch.tanh(angles), (0, 0, 0, padding)).unflatten(1, (-1, STEPS))
    steps = F.pad(dt, (0, 0, 0, padding)).unflatten(1, (-1, STEPS))
    resets = None
    if runs is not None:
        by_chunk = F.pad(runs.unsqueeze(1).float(), (0, padding), mode="replicate").squeeze(1).unflatten(1, (-1, STEPS))
        ends = by_chunk[:, :, -1]
        steps = steps.masked_fill((by_chunk != ends.unsqueeze(2)).unsqueeze(-1), 0)
        resets = ends != F.pad(ends[:, :-1], (1, 0))
    sums = F.pad(torch.einsum("bcth,bcts->bchs", steps.double(), speeds.double()), (0, 0, 0, 0, 1, 0)).cumsum(1)
    if resets is None:
        angle = start.unsqueeze(1) + sums
    else:  # of the chunks so far, the last in which a sequence begins: what came before it does not count
        chunks = torch.arange(resets.shape[1], device=dt.device)
        last = F.pad(torch.where(resets, chunks, -1).cummax(1).values, (1, 0), value=-1)[..., None, None]
        own = sums - sums.gather(1, last.clamp(min=0).expand_as(sums))
        angle = torch.where(last < 0, start.unsqueeze(1) + sums, own)
    return torch.remainder(angle, 2 * math.pi).to(dt.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """``tensor`` with its last axis contiguous, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _keys_implementation(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angles: Tensor,
    dt: Tensor,
    carry: Tensor,
    runs: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """q of the step after, zeros at the last, and k, both (B, L, H, N) in ``dtype``; their products (B, L, H).

    B and C are (B, L, G, N), their biases (H, N), angles (B, L, S), dt (B, L, H), carry (B, chunks, H, S), runs (B, L).
    """
    from mambakit.kernels.trapezoid import triton_launch

    return triton_launch.keys(B, C, B_bias, C_bias, angles, dt, carry, runs, dtype, STEPS)


def _keys_fake(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angles: Tensor,
    dt: Tensor,
    carry: Tensor,
    runs: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    q = B.new_empty(*dt.shape, B.shape[3], dtype=dtype)
    return q, torch.empty_like(q), torch.empty_like(dt)


def _keys_backward_implementation(
    dq: Tensor,
    dk: Tensor,
    ddots: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angles: Tensor,
    dt: Tensor,
    carry: Tensor,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of B, C, their biases, angles, dt and carry; of a bias that was not given an empty tensor."""
    from mambakit.kernels.trapezoid import triton_launch

    dq, dk, ddots = dq.contiguous(), dk.contiguous(), ddots.contiguous()
    tensors = (B, C, B_bias, C_bias, angles, dt, carry, runs)
    dB, dC, dB_bias, dC_bias, dangles, ddt, dcarry = triton_launch.keys_gradients(dq, dk, ddots, *tensors, STEPS)
    dB_bias, dC_bias = (dt.new_empty(0) if gradient is None else gradient for gradient in (dB_bias, dC_bias))
    return dB, dC, dB_bias, dC_bias, dangles, ddt, dcarry


def _keys_backward_fake(
    dq: Tensor,
    dk: Tensor,
    ddots: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    angles: Tensor,
    dt: Tensor,
    carry: Tensor,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dB_bias, dC_bias = (dt.new_empty(0 if bias is None else bias.shape) for bias in (B_bias, C_bias))
    dB, dC = (torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in (B, C))
    return dB, dC, dB_bias, dC_bias, dt.new_empty(angles.shape), torch.empty_like(dt), torch.empty_like(carry)


def _keys_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8])


def _keys_gradients(ctx: Any, dq: Tensor, dk: Tensor, ddots: Tensor) -> tuple[Any, ...]:
    B, C, B_bias, C_bias, angles, dt, carry, runs = ctx.saved_tensors
    tensors = (B, C, B_bias, C_bias, angles, dt, carry, runs)
    dB, dC, dB_bias, dC_bias, dangles, ddt, dcarry = call(_keys_backward, dq, dk, ddots, *tensors)
    dB_bias, dC_bias = (
        None if bias is None else gradient.to(bias.dtype) for bias, gradient in ((B_bias, dB_bias), (C_bias, dC_bias))
    )
    return dB, dC, dB_bias, dC_bias, dangles.to(angles.dtype), ddt, dcarry, None, None


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


_keys_backward = register("trapezoid_keys_backward", _keys_backward_implementation, _keys_backward_fake)
_keys = register("trapezoid_keys", _keys_implementation, _keys_fake, _keys_setup, _keys_gradients)
_output_backward = register("trapezoid_output_backward", _output_backward_implementation, _output_backward_fake)
_output = register("trapezoid_output", _output_implementation, _output_fake, _output_setup, _output_gradients)
