"""The forward scan: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t h_t + D u_t,  out = y silu(z)."""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.launch import launch
from mambakit.kernels.scan.triton_common import (
    CHUNK,
    LOG2E,
    checkpoint_shape,
    device_guard,
    geometry,
    load_resets,
    load_rows,
    load_tile,
    load_vectors,
    row_strides,
    sigmoid,
    states_first,
    step_size,
    store_tile,
    unit_stride,
    vector_strides,
)

# Steps whose loads are in flight together: with those of the next two, what the registers hold at 16 states.
STEPS = 2


@triton.jit
def load_inputs(
    u, delta, z, B, C, seq_idx, u_l, delta_l, z_l, B_l, C_l, d, in_d, n, in_n, t0, length, first, toward,
    STEPS: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
):  # fmt: skip
    """Everything STEPS scan steps from t0 read, each a tuple of STEPS values or ()."""
    return (
        load_rows(u, u_l, d, in_d, t0, length, first, toward, STEPS),
        load_rows(delta, delta_l, d, in_d, t0, length, first, toward, STEPS),
        load_rows(z, z_l, d, in_d, t0, length, first, toward, STEPS),
        load_vectors(B, B_l, n, in_n, t0, length, first, toward, STEPS, CONSTANT_B),
        load_vectors(C, C_l, n, in_n, t0, length, first, toward, STEPS, CONSTANT_C),
        load_resets(seq_idx, t0, length, first, toward, STEPS),
    )


@triton.jit(do_not_specialize=[
    "length", "channels", "group_channels", "blocks_per_group", "blocks", "u_b", "u_l", "delta_b", "delta_l",
    "z_b", "z_l", "out_b", "out_l", "seq_b",
])  # fmt: skip
def scan_forward_kernel(
    u, delta, A, B, C, D, z, bias, initial, seq_idx, out, final, checkpoints,
    length, channels, group_channels, blocks_per_group, blocks, B_share, C_share,
    u_b, u_l, delta_b, delta_l, z_b, z_l, out_b, out_l, seq_b,
    B_b, B_l, B_g, C_b, C_l, C_g,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, DIRECTION: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of channels of one batch row, the whole sequence. Grid (batch * blocks,)."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    # Scan step t lies at position first + toward * t. Of two halves of the channels the second runs backwards.
    if DIRECTION == 2:
        toward = 1 - 2 * (2 * block >= blocks).to(tl.int32)
    else:
        toward: tl.constexpr = 1 - 2 * DIRECTION
    group = block // blocks_per_group
    local = (block % blocks_per_group) * BD + tl.arange(0, BD)
    d = group * group_channels + local
    in_d = local < group_channels
    n = tl.arange(0, BN)
    in_n = n < N
    in_tile = in_n[:, None] & in_d[None, :]

    u += b * u_b
    delta += b * delta_b
    out += b * out_b
    if z is not None:
        z += b * z_b
    if seq_idx is not None:
        seq_idx += b * seq_b
    A2 = load_tile(A, 1, channels, d, n, in_tile) * LOG2E
    if CONSTANT_B:
        B_tile = load_tile(B, B_b, B_l, d, n, in_tile)
    else:
        B += b * B_b + (group // B_share).to(tl.int64) * B_g
    if CONSTANT_C:
        C_tile = load_tile(C, C_b, C_l, d, n, in_tile)
    else:
        C += b * C_b + (group // C_share).to(tl.int64) * C_g
    offset = tl.zeros([BD], tl.float32)
    if bias is not None:
        offset = tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    skip = tl.zeros([BD], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)
    h = tl.zeros([BN, BD], tl.float32)
    if initial is not None:
        h = load_tile(initial + b * N * channels, 1, channels, d, n, in_tile)

    first = ((1 - toward) // 2 * (length - 1)).to(tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    checkpoints += b * chunks * N * channels
    ahead = load_inputs(
        u, delta, z, B, C, seq_idx, u_l, delta_l, z_l, B_l, C_l, d, in_d, n, in_n, 0, length, first,
        toward, STEPS, CONSTANT_B, CONSTANT_C,
    )  # fmt: skip
    for t0 in tl.range(0, length, STEPS):
        us, deltas, zs, Bs, Cs, resets = ahead
        # The next steps' loads start before this block's arithmetic and stores, which hide them.
        ahead = load_inputs(
            u, delta, z, B, C, seq_idx, u_l, delta_l, z_l, B_l, C_l, d, in_d, n, in_n, t0 + STEPS, length, first,
            toward, STEPS, CONSTANT_B, CONSTANT_C,
        )  # fmt: skip
        if t0 % CHUNK == 0:
            store_tile(checkpoints, 1, channels, d, n, in_tile, h)
            checkpoints += N * channels
        ys = ()
        for i in tl.static_range(STEPS):
            _, step = step_size(deltas[i], offset, t0 + i < length, SOFTPLUS)
            a = tl.exp2(step[None, :] * A2)
            if seq_idx is not None:
                h = tl.where(resets[i], 0.0, h)  # whatever it holds: 0 times infinity would be NaN
            if not CONSTANT_B:
                B_tile = Bs[i].to(tl.float32)[:, None]
            if not CONSTANT_C:
                C_tile = Cs[i].to(tl.float32)[:, None]
            x = us[i].to(tl.float32)
            h = a * h + (step * x)[None, :] * B_tile
            ys += (tl.sum(h * C_tile, axis=0) + skip * x,)
        for i in tl.static_range(STEPS):
            y = ys[i]
            if z is not None:
                gate = zs[i].to(tl.float32)
                y *= gate * sigmoid(gate)
            row = out + (first + toward * (t0 + i)) * out_l + d
            tl.store(row, y.to(out.dtype.element_ty), mask=in_d & (t0 + i < length))
    store_tile(final + b * channels * N, N, 1, d, n, in_tile, h)


def scan_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward scan. Shapes as in :func:`mambakit.kernels.selective_scan`; A is real.

    Returns:
        out (B, L, D) in u's dtype, the final state (B, D, N) float32, and the states at chunk starts
        (``checkpoint_shape``) float32, from which the backward recomputes the rest.
    """
    u, delta, z, B, C = (unit_stride(tensor) for tensor in (u, delta, z, B, C))
    D, delta_bias, seq_idx = unit_stride(D), unit_stride(delta_bias), unit_stride(seq_idx)
    batch, length, channels = u.shape
    d_state = A.shape[1]
    cut = geometry(channels, d_state, B, C, direction, states_per_thread=32, max_warps=1)
    # 168 registers, which a half-precision call fits without spilling, let 12 programs share a multiprocessor, not 8.
    half = B.element_size() == C.element_size() == 2
    maxnreg = 168 if half and cut.BN <= 16 else None
    out = torch.empty((batch, length, channels), dtype=u.dtype, device=u.device)
    final = torch.empty((batch, channels, d_state), dtype=torch.float32, device=u.device)
    checkpoints = torch.empty(checkpoint_shape(batch, length, channels, d_state), dtype=torch.float32, device=u.device)
    with device_guard(u):
        launch(
            scan_forward_kernel, (batch * cut.blocks,),
            u, delta, states_first(A), B, C, D, z, delta_bias, states_first(initial_state), seq_idx,
            out, final, checkpoints,
            length, channels, channels // cut.groups, cut.blocks_per_group, cut.blocks,
            cut.groups // cut.B_groups, cut.groups // cut.C_groups,
            *row_strides(u), *row_strides(delta), *row_strides(z), *row_strides(out), row_strides(seq_idx)[0],
            *vector_strides(B), *vector_strides(C),
            N=d_state, BN=cut.BN, BD=cut.BD, STEPS=STEPS,
            SOFTPLUS=delta_softplus, DIRECTION=direction, CONSTANT_B=B.dim() == 2, CONSTANT_C=C.dim() == 2, CHUNK=CHUNK,
            num_warps=cut.num_warps, num_stages=1, maxnreg=maxnreg,
        )  # fmt: skip
    return out, final, checkpoints
