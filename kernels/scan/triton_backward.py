"""The backward scan. With g_t the gradient of y_t before the gate, the gradient of the state h_t is

    s_t = C_t g_t + exp(delta_{t+1} A) s_{t+1},

a scan from the end. The states it needs are recomputed from those stored at chunk starts, never by undoing the
recurrence: exp(delta A) is often close to 0. A chunk is recomputed twice: once to leave a state every few steps in a
scratch of this program's own, then those few steps at a time in registers, where the reverse scan uses them.
"""

# Inside a kernel tuples grow step by step, which mypy takes for an assignment of another type.
# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.launch import launch
from mambakit.kernels.scan.triton_common import (
    CHUNK,
    LOG2E,
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
from mambakit.kernels.scan.triton_forward import scan_forward


@triton.jit(do_not_specialize=[
    "length", "channels", "group_channels", "blocks_per_group", "blocks", "u_b", "u_l", "delta_b", "delta_l",
    "z_b", "z_l", "dout_b", "dout_l", "seq_b",
])  # fmt: skip
def scan_backward_kernel(
    dout, dfinal, u, delta, A, B, C, D, z, bias, seq_idx, checkpoints, scratch,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial,
    length, channels, group_channels, blocks_per_group, blocks, B_share, C_share,
    u_b, u_l, delta_b, delta_l, z_b, z_l, dout_b, dout_l, seq_b, B_b, B_l, B_g, C_b, C_l, C_g,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, DIRECTION: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of channels of one batch row, the whole sequence from its end. Grid (batch * blocks,).

    Written whole: du, ddelta, dz (B, L, D) in their arguments' dtypes; and float32 partial sums, added up by the
    caller: dA and a constant B's or C's gradient (B, N, D), dD, dbias (B, D), and by tile of channels dB, dC
    (blocks, B, L, N). Scratch (programs, CHUNK / STEPS, N, BD) float32.
    """
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
    batch = tl.num_programs(0) // blocks

    u += b * u_b
    delta += b * delta_b
    dout += b * dout_b
    row = b * length * channels
    du += row
    ddelta += row
    if z is not None:
        z += b * z_b
        dz += row
    if seq_idx is not None:
        seq_idx += b * seq_b
    tile = b * N * channels
    A_tile = load_tile(A, 1, channels, d, n, in_tile)
    if CONSTANT_B:
        B_tile = load_tile(B, B_b, B_l, d, n, in_tile)
        dB_tile = tl.zeros([BN, BD], tl.float32)
    else:
        B += b * B_b + (group // B_share).to(tl.int64) * B_g
        dB += (block.to(tl.int64) * batch + b) * length * N
    if CONSTANT_C:
        C_tile = load_tile(C, C_b, C_l, d, n, in_tile)
        dC_tile = tl.zeros([BN, BD], tl.float32)
    else:
        C += b * C_b + (group // C_share).to(tl.int64) * C_g
        dC += (block.to(tl.int64) * batch + b) * length * N
    offset = tl.zeros([BD], tl.float32)
    if bias is not None:
        offset = tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
        dbias_sum = tl.zeros([BD], tl.float32)
    skip = tl.zeros([BD], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)
        dD_sum = tl.zeros([BD], tl.float32)
    dA_tile = tl.zeros([BN, BD], tl.float32)
    # s: the gradient that reaches a state from all later steps.
    s = tl.zeros([BN, BD], tl.float32)
    if dfinal is not None:
        s = load_tile(dfinal + tile, 1, channels, d, n, in_tile)

    first = ((1 - toward) // 2 * (length - 1)).to(tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    checkpoints += tile * chunks
    slots: tl.constexpr = CHUNK // STEPS
    in_slot = tl.arange(0, BD)
    scratch += tl.program_id(0).to(tl.int64) * slots * N * BD
    for reverse_chunk in tl.range(0, chunks):
        index = chunks - 1 - reverse_chunk
        start = index * CHUNK
        parts = tl.cdiv(tl.minimum(CHUNK, length - start), STEPS)

        h = load_tile(checkpoints + index.to(tl.int64) * N * channels, 1, channels, d, n, in_tile)
        tl.debug_barrier()  # the previous chunk's reads of the scratch are over
        for part in tl.range(0, parts):
            store_tile(scratch + part * N * BD, 1, BD, in_slot, n, in_n[:, None], h)
            t0 = start + part * STEPS
            us = load_rows(u, u_l, d, in_d, t0, length, first, toward, STEPS)
            deltas = load_rows(delta, delta_l, d, in_d, t0, length, first, toward, STEPS)
            Bs = load_vectors(B, B_l, n, in_n, t0, length, first, toward, STEPS, CONSTANT_B)
            resets = load_resets(seq_idx, t0, length, first, toward, STEPS)
            for i in tl.static_range(STEPS):
                _, step = step_size(deltas[i], offset, t0 + i < length, SOFTPLUS)
                a = tl.exp2((step * LOG2E)[None, :] * A_tile)
                if seq_idx is not None:
                    h = tl.where(resets[i], 0.0, h)
                if not CONSTANT_B:
                    B_tile = Bs[i].to(tl.float32)[:, None]
                h = a * h + (step * us[i].to(tl.float32))[None, :] * B_tile
        tl.debug_barrier()  # the scratch is written

        for reverse_part in tl.range(0, parts):
            part = parts - 1 - reverse_part
            t0 = start + part * STEPS
            h = load_tile(scratch + part * N * BD, 1, BD, in_slot, n, in_n[:, None])
            us = load_rows(u, u_l, d, in_d, t0, length, first, toward, STEPS)
            deltas = load_rows(delta, delta_l, d, in_d, t0, length, first, toward, STEPS)
            zs = load_rows(z, z_l, d, in_d, t0, length, first, toward, STEPS)
            gs = load_rows(dout, dout_l, d, in_d, t0, length, first, toward, STEPS)
            Bs = load_vectors(B, B_l, n, in_n, t0, length, first, toward, STEPS, CONSTANT_B)
            Cs = load_vectors(C, C_l, n, in_n, t0, length, first, toward, STEPS, CONSTANT_C)
            resets = load_resets(seq_idx, t0, length, first, toward, STEPS)
            states = (h,)
            decays = ()
            for i in tl.static_range(STEPS):
                _, step = step_size(deltas[i], offset, t0 + i < length, SOFTPLUS)
                a = tl.exp2((step * LOG2E)[None, :] * A_tile)
                if seq_idx is not None:
                    h = tl.where(resets[i], 0.0, h)
                if not CONSTANT_B:
                    B_tile = Bs[i].to(tl.float32)[:, None]
                h = a * h + (step * us[i].to(tl.float32))[None, :] * B_tile
                states += (h,)
                decays += (a,)
            for i in tl.static_range(STEPS - 1, -1, -1):
                valid = t0 + i < length
                here = in_d & valid
                position = first + toward * (t0 + i)
                x = us[i].to(tl.float32)
                g = gs[i].to(tl.float32)
                raw, step = step_size(deltas[i], offset, valid, SOFTPLUS)
                if not CONSTANT_B:
                    B_tile = Bs[i].to(tl.float32)[:, None]
                if not CONSTANT_C:
                    C_tile = Cs[i].to(tl.float32)[:, None]
                if z is not None:
                    gate = zs[i].to(tl.float32)
                    open = sigmoid(gate)
                    y = tl.sum(states[i + 1] * C_tile, axis=0) + skip * x
                    slope = open * (1.0 + gate * (1.0 - open))
                    tl.store(dz + position * channels + d, (g * y * slope).to(dz.dtype.element_ty), mask=here)
                    g *= gate * open
                if D is not None:
                    dD_sum += g * x
                s += g[None, :] * C_tile
                sB = tl.sum(s * B_tile, axis=0)
                # s_t times the decayed state, what both delta and A multiply.
                through = s * decays[i] * states[i]
                if seq_idx is not None:
                    through = tl.where(resets[i], 0.0, through)
                dA_tile += step[None, :] * through
                dstep = x * sB + tl.sum(through * A_tile, axis=0)
                if SOFTPLUS:
                    dstep *= tl.where(raw > 20.0, 1.0, sigmoid(raw))
                dstep = tl.where(valid, dstep, 0.0)
                if bias is not None:
                    dbias_sum += dstep
                tl.store(du + position * channels + d, (skip * g + step * sB).to(du.dtype.element_ty), mask=here)
                tl.store(ddelta + position * channels + d, dstep.to(ddelta.dtype.element_ty), mask=here)
                dB_here = s * (step * x)[None, :]
                dC_here = states[i + 1] * g[None, :]
                if CONSTANT_B:
                    dB_tile += dB_here
                else:
                    tl.store(dB + position * N + n, tl.sum(dB_here, axis=1), mask=in_n & valid)
                if CONSTANT_C:
                    dC_tile += dC_here
                else:
                    tl.store(dC + position * N + n, tl.sum(dC_here, axis=1), mask=in_n & valid)
                s *= decays[i]
                if seq_idx is not None:
                    s = tl.where(resets[i], 0.0, s)

    store_tile(dA + tile, 1, channels, d, n, in_tile, dA_tile)
    if CONSTANT_B:
        store_tile(dB + tile, 1, channels, d, n, in_tile, dB_tile)
    if CONSTANT_C:
        store_tile(dC + tile, 1, channels, d, n, in_tile, dC_tile)
    if bias is not None:
        tl.store(dbias + b * channels + d, dbias_sum, mask=in_d)
    if D is not None:
        tl.store(dD + b * channels + d, dD_sum, mask=in_d)
    if dinitial is not None:
        store_tile(dinitial + tile, 1, channels, d, n, in_tile, s)


def scan_backward(
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
    recompute_out: bool = False,
    dz: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Launch the backward scan and add up its partial sums, in a fixed order: equal inputs give equal bits.

    Returns:
        The gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each with the shape and dtype of its
        argument, None where that is None; with ``recompute_out`` also ``out``, from a second forward. That of z is put
        into ``dz`` too, where given.
    """
    again = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus, direction)
    batch, length, channels = u.shape
    d_state = A.shape[1]
    dtypes = u.dtype, delta.dtype, None if z is None else z.dtype
    dout, u, delta, z = unit_stride(dout), unit_stride(u), unit_stride(delta), unit_stride(z)
    B, C, D, delta_bias, seq_idx = (unit_stride(tensor) for tensor in (B, C, D, delta_bias, seq_idx))
    cut = geometry(channels, d_state, B, C, direction, states_per_thread=16, max_warps=8)
    # Steps whose states and decays stay in registers together: 4 fill 255 registers at 8 states a thread, 2 at 16.
    steps = 4 if cut.BN <= 8 else 2

    def empty(*shape: int, dtype: torch.dtype | None = torch.float32) -> Any:
        return None if dtype is None else torch.empty(shape, dtype=dtype, device=u.device)

    du, ddelta, gate_gradient = (empty(batch, length, channels, dtype=dtype) for dtype in dtypes)
    dA = empty(batch, d_state, channels)
    dB, dC = (
        empty(batch, d_state, channels) if vector.dim() == 2 else empty(cut.blocks, batch, length, d_state)
        for vector in (B, C)
    )
    dD, dbias = (empty(batch, channels, dtype=None if t is None else torch.float32) for t in (D, delta_bias))
    dinitial = empty(batch, d_state, channels, dtype=None if initial_state is None else torch.float32)
    scratch = empty(batch * cut.blocks, CHUNK // steps, d_state, cut.BD)
    with device_guard(u):
        launch(
            scan_backward_kernel, (batch * cut.blocks,),
            dout, states_first(dfinal_state), u, delta, states_first(A), B, C, D, z, delta_bias, seq_idx,
            checkpoints, scratch, du, ddelta, gate_gradient, dA, dB, dC, dD, dbias, dinitial,
            length, channels, channels // cut.groups, cut.blocks_per_group, cut.blocks,
            cut.groups // cut.B_groups, cut.groups // cut.C_groups,
            *row_strides(u), *row_strides(delta), *row_strides(z), *row_strides(dout), row_strides(seq_idx)[0],
            *vector_strides(B), *vector_strides(C),
            N=d_state, BN=cut.BN, BD=cut.BD, STEPS=steps,
            SOFTPLUS=delta_softplus, DIRECTION=direction, CONSTANT_B=B.dim() == 2, CONSTANT_C=C.dim() == 2, CHUNK=CHUNK,
            num_warps=cut.num_warps, num_stages=1,
        )  # fmt: skip
    if dz is not None:
        dz.copy_(gate_gradient)
    return (
        du,
        ddelta,
        states_last(dA.sum(0), A),
        vector_gradient(dB, B),
        vector_gradient(dC, C),
        None if D is None else dD.sum(0).to(D.dtype),
        gate_gradient,
        None if delta_bias is None else dbias.sum(0).to(delta_bias.dtype),
        None if initial_state is None else states_last(dinitial, initial_state),
        *((scan_forward(*again)[0],) if recompute_out else ()),
    )


def states_last(gradient: Tensor, like: Tensor) -> Tensor:
    """(..., N, D) as a contiguous (..., D, N) of the dtype of ``like``."""
    return gradient.transpose(-1, -2).to(like.dtype).contiguous()


def vector_gradient(partial: Tensor, vector: Tensor) -> Tensor:
    """Add up the partial sums of B's or C's gradient over the batch (constant) or over each group's tiles."""
    if vector.dim() == 2:
        return states_last(partial.sum(0), vector)
    if vector.dim() == 3:
        return partial.sum(0).to(vector.dtype)
    by_group = partial.unflatten(0, (vector.shape[2], -1)).sum(1)
    return by_group.permute(1, 2, 0, 3).to(vector.dtype).contiguous()
