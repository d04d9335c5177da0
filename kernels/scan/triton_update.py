"""One step of the selective scan, in place on a state: what generation calls for every token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.scan.triton_common import LOG2E, device_guard, sigmoid, softplus


@triton.jit
def state_update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, indices, out,
    heads, dim, group_heads,
    state_b, state_h, state_d, state_n, x_b, x_h, x_d, dt_b, dt_h, dt_d, A_h, A_d, A_n,
    B_b, B_g, B_n, C_b, C_g, C_n, D_h, D_d, z_b, z_h, z_d, bias_h, bias_d, indices_b,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """A tile of BD channels of one head of one row. Grid (batch * heads * tiles of dim,); ``out`` is contiguous."""
    tiles = tl.cdiv(dim, BD)
    row = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    group = head // group_heads
    d = (tl.program_id(0) % tiles * BD + tl.arange(0, BD)).to(tl.int64)
    n = tl.arange(0, BN).to(tl.int64)
    in_d = d < dim
    in_n = n < N
    in_tile = in_d[:, None] & in_n[None, :]

    target = out + (row * heads + head) * dim + d
    slot = row
    if indices is not None:
        slot = tl.load(indices + row * indices_b).to(tl.int64)
    live = slot >= 0  # a negative index marks a padding row: its state is not read, not written, its output zero
    states = state + slot * state_b + head * state_h + d[:, None] * state_d + n[None, :] * state_n
    h = tl.load(states, mask=in_tile & live, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_b + head * x_h + d * x_d, mask=in_d, other=0.0).to(tl.float32)
    step = tl.load(dt + row * dt_b + head * dt_h + d * dt_d, mask=in_d, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + head * bias_h + d * bias_d, mask=in_d, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    rate = tl.load(A + head * A_h + d[:, None] * A_d + n[None, :] * A_n, mask=in_tile, other=0.0).to(tl.float32)
    entry = tl.load(B + row * B_b + group * B_g + n * B_n, mask=in_n, other=0.0).to(tl.float32)
    exit = tl.load(C + row * C_b + group * C_g + n * C_n, mask=in_n, other=0.0).to(tl.float32)

    h = tl.exp2(step[:, None] * (rate * LOG2E)) * h + (step * value)[:, None] * entry[None, :]
    tl.store(states, h.to(state.dtype.element_ty), mask=in_tile & live)
    y = tl.sum(h * exit[None, :], axis=1)
    if D is not None:
        y += tl.load(D + head * D_h + d * D_d, mask=in_d, other=0.0).to(tl.float32) * value
    if z is not None:
        gate = tl.load(z + row * z_b + head * z_h + d * z_d, mask=in_d, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    tl.store(target, tl.where(live, y, 0.0).to(out.dtype.element_ty), mask=in_d)


def state_update(
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
) -> Tensor:
    """Launch the one-step kernel; every tensor may have any strides, the zero strides of an expanded one included.

    Args:
        state: (slots, dim, N) or (slots, heads, dim, N), changed in place.
        x, dt, z: (batch, dim) or (batch, heads, dim).
        A: (dim, N) or (heads, dim, N), real.
        B, C: (batch, N) or (batch, groups, N), heads divided among groups in order.
        D, dt_bias: (dim,) or (heads, dim).
        state_batch_indices: (batch,) integers, the slot of each row; negative: a padding row.

    Returns:
        out like x, contiguous.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if state.dim() == 3:
        state, x, dt, A = state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0)
        D, dt_bias = (None if tensor is None else tensor.unsqueeze(0) for tensor in (D, dt_bias))
        z = None if z is None else z.unsqueeze(1)
    B, C = (vector.unsqueeze(1) if vector.dim() == 2 else vector for vector in (B, C))
    batch, heads, dim = x.shape
    d_state = state.shape[-1]
    groups = B.shape[1]
    BN = triton.next_power_of_2(d_state)
    BD, warps = _tile(batch * heads * dim * BN, triton.next_power_of_2(dim), BN)

    def strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
        return (0,) * axes if tensor is None else tensor.stride()

    with device_guard(x):
        state_update_kernel[(batch * heads * triton.cdiv(dim, BD),)](
            state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, out,
            heads, dim, heads // groups,
            *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(),
            *strides(D, 2), *strides(z, 3), *strides(dt_bias, 2), *strides(state_batch_indices, 1),
            N=d_state, BN=BN, BD=BD, SOFTPLUS=dt_softplus, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return out


def _tile(states: int, dim: int, BN: int) -> tuple[int, int]:
    """(channels, warps) of a program. Few states: two a thread, so that many threads share the wait for memory. Many:
    16 a thread and one warp a program, which never waits for another warp of its own.
    """
    tile, warps = (256, 4) if states < 2**18 else (512, 1)
    return max(1, min(dim, tile // BN)), warps
