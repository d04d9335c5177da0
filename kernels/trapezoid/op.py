"""``trapezoidal_ssd``: the public function, its checks, and the choice between its implementations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambakit.kernels import checks, dispatch
from mambakit.kernels.trapezoid.chunked import trapezoidal_ssd_chunked
from mambakit.kernels.trapezoid.fused import not_in_triton, trapezoidal_ssd_triton
from mambakit.kernels.trapezoid.reference import TrapezoidalState, trapezoidal_ssd_reference

NAME = "trapezoidal_ssd"


def trapezoidal_ssd(
    x: Tensor,
    dt: Tensor,
    dA: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state: TrapezoidalState | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Mamba-3's recurrence (Lahoti et al. 2026, arXiv 2603.15569): trapezoidal rule, rotating state, several inputs.

    For each head, with P channels and N states a channel:

        phi_t = phi_{t-1} + pi tanh(angles_t) dt_t  (mod 2 pi)
        k_t = rot(B_t + B_bias, phi_t),    q_t = rot(C_t + C_bias, phi_t)
        h_t = alpha_t h_{t-1} + (1 - lambda_t) dt_t alpha_t x_{t-1} k_{t-1}ᵀ + lambda_t dt_t x_t k_tᵀ         (P, N)
        y_t = h_t q_t + D x_t,    out_t = y_t SiLU(z_t),        alpha_t = exp(dA_t),  lambda_t = sigmoid(trap_t)

    ``rot`` turns S pairs of the N numbers by S angles, which makes the state's decay complex (the paper's proposition
    on data-dependent rotary embeddings); the other numbers stay as they are. With ``mimo_x`` there are R inputs and R
    outputs a step: x_t k_tᵀ becomes the sum over r of (x_t * mimo_x_r) k_{t,r}ᵀ, and output r is h_t q_{t,r} +
    D (x_t * mimo_x_r).

    Letters: B batch, L length, H heads, P channels a head, N state size (even), G groups (G divides H; group g serves
    heads g H/G to (g+1) H/G - 1), S angles (at most N/2), R ranks.

    Args:
        x: input (B, L, H, P), float16, bfloat16, float32 or float64, as every tensor below.
        dt: time steps (B, L, H), not negative.
        dA: log decays (B, L, H), dt times A in the paper; not positive in a stable system.
        trap: (B, L, H), before its sigmoid.
        B: (B, L, G, N); with ranks (B, L, R, G, N).
        C: as B.
        angles: (B, L, S), before their tanh; one for all heads, whose steps dt make them differ.
        B_bias: (H, N); with ranks (H, R, N).
        C_bias: as B_bias.
        mimo_x: (H, R, P), what each rank takes of the input. Without it the rotated pairs are numbers 2i and 2i + 1,
            with it numbers i and i + N/2, as in the kernels whose checkpoints are to load.
        D: skip weight (H,).
        z: gate, of the output's shape.
        chunk_size: the most steps computed at once, as attention; it decides speed and memory, and not the result.
        initial_state: a :class:`TrapezoidalState`; zeros if None.
        seq_idx: (B, L) int32 or int64; where its value changes another sequence begins: state, angle and the last k and
            v are cleared, so ``initial_state`` reaches only the first one.
        lengths: (B,) integers from 0 to L; elements behind them leave the state as it is. Where there is a ``seq_idx``
            it does not change behind them.
        return_final_state: also return the state after the last element.
        backend: "auto", "triton", "torch" (by chunks) or "reference" (a loop over time).

    Returns:
        out (B, L, H, P) in x's dtype, with ranks (B, L, R, H, P); or ``(out, final_state)``. States and arithmetic are
        float32 whatever the inputs, float64 where x, dt, dA, B or C is. Gradients flow to every tensor argument but
        ``seq_idx`` and ``lengths``, those of ``initial_state`` included, also back through the final state.

    Raises:
        ValueError: a wrong shape or device, a length of 0, a chunk size below 1, or an unknown backend.
        TypeError: a wrong dtype.
    """
    _check(x, dt, dA, trap, B, C, angles, B_bias, C_bias, mimo_x, D, z, initial_state, seq_idx, lengths)
    if chunk_size < 1:
        raise ValueError(f"{NAME}: chunk_size is {chunk_size}, expected at least 1")
    obstacle = not_in_triton(x, dt, dA, B, C, mimo_x)
    chosen = dispatch.choose(NAME, backend, x, obstacle, warn=mimo_x is None).backend
    single = mimo_x is None
    if single:  # one rank, whose axis the implementations see
        B, C, z = B.unsqueeze(2), C.unsqueeze(2), None if z is None else z.unsqueeze(2)
        B_bias, C_bias = (None if bias is None else bias.unsqueeze(1) for bias in (B_bias, C_bias))
    tensors = (x, dt, dA, trap, B, C, angles, B_bias, C_bias, mimo_x, D, z, initial_state, seq_idx, lengths)
    final_state: TrapezoidalState | None
    if chosen == "reference":
        out, final_state = trapezoidal_ssd_reference(*tensors)
    elif chosen == "triton":
        out, final_state = trapezoidal_ssd_triton(*tensors[:9], *tensors[10:], return_final_state, backend)
    else:
        out, final_state = trapezoidal_ssd_chunked(*tensors, chunk_size, backend)
    if single:
        out = out.squeeze(2)
        final_state = None if final_state is None else final_state._replace(k=final_state.k.squeeze(1))
    return (out, final_state) if return_final_state else out


def _check(
    x: Tensor,
    dt: Tensor,
    dA: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: TrapezoidalState | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> None:
    checks.check_shape(NAME, "x", x, batch=None, length=None, heads=None, channels=None)
    batch, length, heads, channels = x.shape
    time: dict[str, int | None] = {"batch": batch, "length": length}
    ranks: dict[str, int | None] = {}
    if mimo_x is not None:
        checks.check_shape(NAME, "mimo_x", mimo_x, heads=heads, ranks=None, channels=channels)
        ranks = {"ranks": mimo_x.shape[1]}
    checks.check_shape(NAME, "B", B, **time, **ranks, groups=None, d_state=None)
    groups, d_state = B.shape[-2:]
    if heads % groups:
        raise ValueError(f"{NAME}: B has {groups} groups, expected a divisor of the {heads} heads")
    checks.check_shape(NAME, "C", C, **time, **ranks, groups=groups, d_state=d_state)
    checks.check_shape(NAME, "angles", angles, **time, angles=None)
    if d_state % 2 or 2 * angles.shape[-1] > d_state:
        raise ValueError(
            f"{NAME}: angles has {angles.shape[-1]} a step and B a state size of {d_state}; expected an even state "
            "size, at least twice the number of angles"
        )
    tensors: dict[str, Tensor | None] = {"x": x, "dt": dt, "dA": dA, "trap": trap, "B": B, "C": C, "angles": angles}
    tensors |= {"B_bias": B_bias, "C_bias": C_bias, "mimo_x": mimo_x, "D": D, "z": z}
    shapes: dict[str, dict[str, int | None]] = {name: {**time, "heads": heads} for name in ("dt", "dA", "trap")}
    shapes |= {name: {"heads": heads, **ranks, "d_state": d_state} for name in ("B_bias", "C_bias")}
    shapes |= {"D": {"heads": heads}, "z": {**time, **ranks, "heads": heads, "channels": channels}}
    if initial_state is not None:
        rows: dict[str, int | None] = {"batch": batch, **ranks, "heads": heads}
        carried = dict(zip(TrapezoidalState._fields, initial_state, strict=True))
        tensors |= {f"initial_state.{name}": tensor for name, tensor in carried.items()}
        alone: dict[str, int | None] = {"batch": batch, "heads": heads}
        shapes["initial_state.angle"] = {**alone, "angles": angles.shape[-1]}
        shapes["initial_state.ssm"] = {**alone, "channels": channels, "d_state": d_state}
        shapes["initial_state.k"] = {**rows, "d_state": d_state}
        shapes["initial_state.v"] = {**alone, "channels": channels}
    for name, tensor in tensors.items():
        if tensor is not None:
            if name in shapes:
                checks.check_shape(NAME, name, tensor, **shapes[name])
            checks.check_dtype(NAME, name, tensor, *checks.FLOATS)
            checks.check_device(NAME, name, tensor, x, "x")
    checks.check_seq_idx(NAME, seq_idx, x, "x")
    if lengths is not None:
        checks.check_shape(NAME, "lengths", lengths, batch=batch)
        checks.check_device(NAME, "lengths", lengths, x, "x")
