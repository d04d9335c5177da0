"""``ssd``: the public function, its checks, and its step sizes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mambakit.kernels import checks, dispatch
from mambakit.kernels.duality.steps import steps_and_logs
from mambakit.kernels.duality.weighted import NAME, not_in_triton, weighted_ssd

UNLIMITED = (0.0, float("inf"))


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    chunk_size: int = 256,
    dt_limit: tuple[float, float] = UNLIMITED,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Mamba-2's recurrence, structured state space duality (Dao and Gu 2024, arXiv 2405.21060).

    For each head, with P channels and N states a channel, and dt <- clamp(softplus(dt + dt_bias), *dt_limit):

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ            (P, N)
        y_t = h_t C_t + D x_t,    out_t = y_t SiLU(z_t)

    Letters: B batch, L length, H heads, P channels a head, N state size, G groups (G divides H; group g serves heads
    g H/G to (g+1) H/G - 1).

    Args:
        x: input (B, L, H, P), float16, bfloat16, float32 or float64, as every argument below.
        dt: time steps (B, L, H), before bias, softplus and limits.
        A: (H,), negative in a stable system.
        B: (B, L, G, N).
        C: as B.
        D: skip weight, (H,) or (H, P).
        z: gate (B, L, H, P).
        dt_bias: (H,), added to dt.
        dt_softplus: apply softplus to dt after the bias.
        chunk_size: the most steps that PyTorch computes at once, as attention, 64 at most; it decides speed and memory,
            and not the result. The Triton kernels have a size of their own.
        dt_limit: the smallest and largest step, applied last. A step of 0 passes the state unchanged.
        initial_state: (B, H, P, N), the state before the first element; zeros if None.
        seq_idx: (B, L) int32 or int64; where its value changes another sequence begins and the state is cleared, so
            ``initial_state`` reaches only the first one.
        return_final_state: also return the state after the last element.
        backend: "auto", "triton", "torch" (by chunks) or "reference" (a loop over time); see
            ``mambakit.kernels.dispatch``. float64 arguments, P over 128, N over 256 and P N over 16,384 (8,192
            but in bfloat16) are served by "torch".

    Returns:
        out (B, L, H, P) in x's dtype, or ``(out, final_state)`` with final_state (B, H, P, N). States and arithmetic
        are float32 whatever the inputs, float64 where x, dt, A, B or C is. Gradients flow to every tensor argument but
        ``seq_idx``, also back through the final state.

    Raises:
        ValueError: a wrong shape or device, a length of 0, limits or chunk size out of range, or a backend that is
            unknown or cannot serve the call.
        TypeError: a wrong dtype.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    if chunk_size < 1:
        raise ValueError(f"{NAME}: chunk_size is {chunk_size}, expected at least 1")
    dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{NAME}: dt_limit is {dt_limit}, expected 0 <= smallest <= largest")
    chosen = dispatch.choose(NAME, backend, x, not_in_triton(x, dt, A, B, C)).backend
    steps, log_decays = steps_and_logs(x, dt, A, dt_bias, dt_softplus, dt_limit, chosen == "triton")
    out, final_state = weighted_ssd(
        x, steps, log_decays, B, C, D, z,
        chunk_size=chunk_size, initial_state=initial_state, seq_idx=seq_idx, backend=chosen,
    )  # fmt: skip
    return (out, final_state) if return_final_state else out


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    checks.check_shape(NAME, "x", x, batch=None, length=None, heads=None, channels=None)
    batch, length, heads, channels = x.shape
    checks.check_shape(NAME, "dt", dt, batch=batch, length=length, heads=heads)
    checks.check_shape(NAME, "A", A, heads=heads)
    checks.check_shape(NAME, "B", B, batch=batch, length=length, groups=None, d_state=None)
    groups, d_state = B.shape[2:]
    if heads % groups:
        raise ValueError(f"{NAME}: B has {groups} groups, expected a divisor of the {heads} heads")
    checks.check_shape(NAME, "C", C, batch=batch, length=length, groups=groups, d_state=d_state)
    if isinstance(D, Tensor) and D.dim() == 2:
        checks.check_shape(NAME, "D", D, heads=heads, channels=channels)
    elif D is not None:
        checks.check_shape(NAME, "D", D, heads=heads)
    if z is not None:
        checks.check_shape(NAME, "z", z, batch=batch, length=length, heads=heads, channels=channels)
    if dt_bias is not None:
        checks.check_shape(NAME, "dt_bias", dt_bias, heads=heads)
    if initial_state is not None:
        checks.check_shape(
            NAME, "initial_state", initial_state, batch=batch, heads=heads, channels=channels, d_state=d_state
        )
    everything = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z}
    everything |= {"dt_bias": dt_bias, "initial_state": initial_state}
    for name, tensor in everything.items():
        if tensor is not None:
            checks.check_dtype(NAME, name, tensor, *checks.FLOATS)
            checks.check_device(NAME, name, tensor, x, "x")
    checks.check_seq_idx(NAME, seq_idx, x, "x")
