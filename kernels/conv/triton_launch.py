"""Launches the convolution's Triton kernels: tiles, grids, and the sums of partial gradients."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mambakit.kernels.conv.triton_backward import conv_backward, conv_backward_both, sum_partials
from mambakit.kernels.conv.triton_kernels import conv_forward, conv_forward_both, conv_update
from mambakit.kernels.launch import launch

WARPS = 4
FILLED = 512  # programs that keep a large device busy


class Tiling(NamedTuple):
    """``chunks`` of ``steps`` steps a row of the batch, ``total`` in all; ``rows`` x ``channels`` of them a program."""

    chunks: int
    total: int
    steps: int
    unroll: int
    rows: int
    channels: int
    tiles: int  # of chunks
    programs: int


@lru_cache(maxsize=1024)
def tiling(
    batch: int, length: int, channels: int, vector: int, unroll: int, longest: int, shortest: int, ahead: int
) -> Tiling:
    """The cut in which a thread holds ``vector`` channels, and a walk is the longest that leaves programs enough.

    A walk of ``steps + ahead`` is a multiple of ``unroll``, and between ``shortest`` and ``longest`` where the length
    allows: a long one repeats less at the seams and leaves fewer partial sums, short ones fill the device.
    """
    if channels < 64:
        tile = max(16, triton.next_power_of_2(channels))
    else:
        tile = min((256, 128, 64), key=lambda size: triton.cdiv(channels, size) * size)
    rows = max(1, 32 * WARPS * vector // tile)
    d_tiles = triton.cdiv(channels, tile)
    walk = longest
    while walk > shortest and d_tiles * triton.cdiv(batch * triton.cdiv(length, walk), rows) < FILLED:
        walk //= 2
    chunks = triton.cdiv(length, walk - ahead)
    steps = triton.cdiv(triton.cdiv(length, chunks) + ahead, unroll) * unroll - ahead
    tiles = triton.cdiv(batch * chunks, rows)
    return Tiling(chunks, batch * chunks, steps, unroll, rows, tile, tiles, d_tiles * tiles)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """As :func:`mambakit.kernels.conv.chunked.forward`."""
    batch, length, channels = x.shape
    x = _channels_last(x)
    out = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    cut = tiling(batch, length, channels, 16 // x.itemsize, 4, 64, 8, 0)
    launch(
        conv_forward,
        (cut.programs,),
        x,
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        initial_state if initial_state is None else initial_state.contiguous(),
        seq_idx if seq_idx is None else seq_idx.contiguous(),
        out,
        length,
        channels,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        cut.chunks,
        cut.total,
        cut.steps,
        SILU=silu,
        REVERSE=reverse,
        W=weight.shape[1],
        U=cut.unroll,
        BR=cut.rows,
        BD=cut.channels,
        num_warps=WARPS,
    )
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As :func:`mambakit.kernels.conv.chunked.backward`."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    x, dout = _channels_last(x), _channels_last(dout)
    if dx is None:
        dx = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    # Half the forward's channels a thread: the sums fill as many registers as the windows.
    cut = tiling(batch, length, channels, 4, 4, 64, 32, width - 1)
    columns = channels * width if bias is None else channels * (width + 1)
    partials = torch.empty((cut.tiles, columns), dtype=torch.float32, device=x.device)
    dweight = torch.empty((channels, width), dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty((channels,), dtype=bias.dtype, device=x.device)
    dstate = None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
        dstate = torch.empty((batch, channels, width - 1), dtype=initial_state.dtype, device=x.device)
    launch(
        conv_backward,
        (cut.programs,),
        dout,
        x,
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        initial_state,
        seq_idx if seq_idx is None else seq_idx.contiguous(),
        dx,
        partials,
        dstate,
        length,
        channels,
        dout.stride(0),
        dout.stride(1),
        x.stride(0),
        x.stride(1),
        dx.stride(0),
        dx.stride(1),
        cut.chunks,
        cut.total,
        cut.steps,
        SILU=silu,
        REVERSE=reverse,
        W=width,
        U=cut.unroll,
        BR=cut.rows,
        BD=cut.channels,
        num_warps=WARPS,
    )
    grid = (triton.cdiv(columns, 32),)
    launch(sum_partials, grid, partials, dweight, dbias, cut.tiles, channels, W=width, BP=64, BC=32, num_warps=WARPS)
    return dx, dweight, dbias, dstate


def forward_both(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool) -> Tensor:
    """As :func:`mambakit.kernels.conv.chunked.forward_both`, of contiguous weight and bias."""
    batch, length, channels = x.shape
    x = _channels_last(x)
    out = torch.empty((batch, length, 2 * channels), dtype=x.dtype, device=x.device)
    cut = tiling(batch, length, channels, 16 // x.itemsize, 4, 64, 8, 0)
    launch(
        conv_forward_both, (2 * cut.programs,),
        x, weight, bias, seq_idx if seq_idx is None else seq_idx.contiguous(), out,
        length, channels, *x.stride()[:2], *out.stride()[:2], cut.chunks, cut.total, cut.steps,
        SILU=silu, W=weight.shape[2], U=cut.unroll, BR=cut.rows, BD=cut.channels, num_warps=WARPS,
    )  # fmt: skip
    return out


def backward_both(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, dx: Tensor
) -> tuple[Tensor, Tensor | None]:
    """As :func:`mambakit.kernels.conv.chunked.backward_both`, of contiguous weight and bias."""
    batch, length, channels = x.shape
    width = weight.shape[2]
    x, dout = _channels_last(x), _channels_last(dout)
    back = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    cut = tiling(batch, length, channels, 4, 4, 64, 32, width - 1)
    columns = channels * width if bias is None else channels * (width + 1)
    partials = torch.empty((2, cut.tiles, columns), dtype=torch.float32, device=x.device)
    dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    launch(
        conv_backward_both, (2 * cut.programs,),
        dout, x, weight, bias, seq_idx if seq_idx is None else seq_idx.contiguous(), dx, back, partials,
        length, channels, *dout.stride()[:2], *x.stride()[:2], *dx.stride()[:2], *back.stride()[:2],
        cut.chunks, cut.total, cut.steps, cut.tiles,
        SILU=silu, W=width, U=cut.unroll, BR=cut.rows, BD=cut.channels, num_warps=WARPS,
    )  # fmt: skip
    grid = (triton.cdiv(columns, 32), 2)
    launch(sum_partials, grid, partials, dweight, dbias, cut.tiles, channels, W=width, BP=64, BC=32, num_warps=WARPS)
    dx += back
    return dweight, dbias


def update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """As :func:`mambakit.kernels.conv.update.update_torch`."""
    batch, channels, steps = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    warps = 4
    tile_d = 32 * warps
    launch(
        conv_update,
        (triton.cdiv(channels, tile_d), batch),
        x,
        conv_state,
        weight.contiguous(),
        x if bias is None else bias.contiguous(),
        x if cache_seqlens is None else cache_seqlens.contiguous(),
        x if conv_state_indices is None else conv_state_indices.contiguous(),
        out,
        steps,
        channels,
        conv_state.shape[2],
        *x.stride(),
        *conv_state.stride(),
        HAS_BIAS=bias is not None,
        RING=cache_seqlens is not None,
        HAS_LINES=conv_state_indices is not None,
        SILU=silu,
        W=weight.shape[1],
        BD=tile_d,
        num_warps=warps,
    )
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
