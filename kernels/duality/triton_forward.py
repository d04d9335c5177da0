"""The forward of ``ssd``: a program walks over the tiles of a segment of one head, its state in registers."""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.duality.triton_common import (
    decay_matrix,
    load_decays,
    load_rows,
    prepare,
    row_strides,
    scale,
    skip_strides,
    store_rows,
    tiling,
    unit_stride,
)
from mambakit.kernels.duality.triton_states import Segments
from mambakit.kernels.launch import launch

# Programs with which time is not cut, see ``Segments``: two on each of an H200's 132 multiprocessors.
ENOUGH = 256


@triton.jit(do_not_specialize=["length", "tiles", "segments", "segment_tiles", "share"])
def ssd_forward_kernel(
    x, weights, logs, B, C, D, z, owners, entering, out, final,
    length, heads, share, tiles, segments, segment_tiles,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, D_h, D_p, owner_b,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment of one head. Grid (B * segments * H,).

    entering: (B, segments, H, P, N), the state before each segment, or None for zeros.
    """
    head = tl.program_id(0) % heads
    segment = tl.program_id(0) // heads % segments
    b = (tl.program_id(0) // heads // segments).to(tl.int64)
    i, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    x += b * x_b + head.to(tl.int64) * x_h
    B += b * B_b + (head // share).to(tl.int64) * B_g
    C += b * C_b + (head // share).to(tl.int64) * C_g
    weights += (b * heads + head) * tiles * Q
    logs += (b * heads + head) * tiles * Q
    out += (b * length * heads + head) * P
    if z is not None:
        z += b * z_b + head.to(tl.int64) * z_h
    if owners is not None:
        owners += b * owner_b
    if D is not None:
        skip = tl.load(D + head * D_h + p * D_p, mask=p < P, other=0.0).to(tl.float32)
    # The state lies as (N, P): the form in which both of its products take it.
    place = p[None, :] * N + n[:, None]
    exists = (p < P)[None, :] & (n < N)[:, None]
    state = tl.zeros([BN, BP], tl.float32)
    if entering is not None:
        there = ((b * segments + segment) * heads + head) * P * N
        state = tl.load(entering + there + place, mask=exists, other=0.0).to(tl.float32)
    first = segment * segment_tiles
    last = tl.minimum(first + segment_tiles, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        t0 = tile * Q
        inputs = load_rows(x, t0, x_l, i, p, length, P, BP)
        Bs = load_rows(B, t0, B_l, i, n, length, N, BN).to(OPERAND)
        Cs = load_rows(C, t0, C_l, i, n, length, N, BN).to(OPERAND)
        log, weight, carry, to_end, through = load_decays(weights, logs, owners, t0, i, Q)
        y = tl.dot(Cs, state.to(OPERAND), input_precision=PRECISION)
        scores = tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION)
        y = scale(y, carry[:, None])
        mixed = scores * decay_matrix(log, owners, t0, i) * weight[None, :]
        y = tl.dot(mixed.to(OPERAND), inputs.to(OPERAND), acc=y, input_precision=PRECISION)
        wide = inputs.to(tl.float32)
        entry = (wide * (weight * to_end)[:, None]).to(OPERAND)
        state = tl.dot(tl.trans(Bs), entry, acc=scale(state, through), input_precision=PRECISION)
        if D is not None:
            y += skip[None, :] * wide
        if z is not None:
            gate = load_rows(z, t0, z_l, i, p, length, P, BP).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        store_rows(out, y, t0, heads * P, i, p, length, P, BP)
    if last == tiles:
        tl.store(final + (b * heads + head) * P * N + place, state, mask=exists)


def ssd_forward(
    x: Tensor,
    weights: Tensor,
    log_decays: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`mambakit.kernels.duality.chunked.ssd_forward`, but that no states are kept: the backward's are its own.

    chunk_size is PyTorch's alone.
    """
    x, B, C, z = (unit_stride(tensor) for tensor in (x, B, C, z))
    batch, length, heads, channels = x.shape
    d_state = B.shape[3]
    tile = tiling(x, B, C)
    with torch.cuda.device_of(x):
        prepared = prepare(weights, log_decays, seq_idx, tile.Q)
        initial = None if initial_state is None else initial_state.contiguous()
        cut = Segments(x, B, prepared, tile, initial, heads, ENOUGH)
        cut.join(0)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = torch.empty(batch, heads, channels, d_state, dtype=torch.float32, device=x.device)
        owners = prepared.owners
        launch(
            ssd_forward_kernel, (batch * cut.segments * heads,),
            x, prepared.weights, prepared.logs, B, C, D, z, owners, cut.entering, out, final,
            length, heads, heads // B.shape[2], cut.tiles, cut.segments, cut.segment_tiles,
            *row_strides(x), *row_strides(B), *row_strides(C), *row_strides(z), *skip_strides(D),
            0 if owners is None else owners.stride(0),
            P=channels, N=d_state, **tile.sizes, STAGES=2, num_warps=4,
        )  # fmt: skip
    return out, final, final.new_empty(0, *final.shape)
