"""Launches the convolution's Triton kernels: strides, grids, and the sums of partial gradients."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mambakit.kernels.conv import chunked
from mambakit.kernels.conv.triton_kernels import conv_backward, conv_forward, conv_update


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
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile_l, tile_d = 16, _tile_d(channels)
    grid = (triton.cdiv(channels, tile_d) * triton.cdiv(length, tile_l) * batch,)
    conv_forward[grid](
        x,
        weight.contiguous(),
        x if bias is None else bias.contiguous(),
        x if initial_state is None else initial_state.transpose(1, 2).contiguous(),
        x if seq_idx is None else seq_idx.contiguous(),
        out,
        length,
        channels,
        x.stride(0),
        x.stride(1),
        HAS_BIAS=bias is not None,
        HAS_STATE=initial_state is not None,
        HAS_SEQ=seq_idx is not None,
        SILU=silu,
        REVERSE=reverse,
        W=weight.shape[1],
        BL=tile_l,
        BD=tile_d,
        num_warps=4,
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As :func:`mambakit.kernels.conv.chunked.backward`."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    x, dout = _channels_last(x), _channels_last(dout)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Time is cut into groups so that the partial sums stay small beside x and the programs still fill the device.
    tile_l, tile_d, tiles = 8, _tile_d(channels), 16
    groups = triton.cdiv(length, tile_l * tiles)
    dweight = torch.empty(batch * groups, width, channels, dtype=torch.float32, device=x.device)
    dbias = torch.empty(batch * groups, channels, dtype=torch.float32, device=x.device)
    conv_backward[(triton.cdiv(channels, tile_d) * groups * batch,)](
        dout,
        x,
        weight.contiguous(),
        x if bias is None else bias.contiguous(),
        x if initial_state is None else initial_state.transpose(1, 2).contiguous(),
        x if seq_idx is None else seq_idx.contiguous(),
        dx,
        dweight,
        dbias,
        length,
        channels,
        x.stride(0),
        x.stride(1),
        dout.stride(0),
        dout.stride(1),
        HAS_BIAS=bias is not None,
        HAS_STATE=initial_state is not None,
        HAS_SEQ=seq_idx is not None,
        SILU=silu,
        REVERSE=reverse,
        W=width,
        BL=tile_l,
        BD=tile_d,
        TILES=tiles,
        num_warps=4,
    )
    dinitial_state = None
    if initial_state is not None:  # it touches the first W-1 outputs alone: too little for a kernel of its own
        first = slice(-min(length, width - 1), None) if reverse else slice(0, width - 1)
        seq_first = None if seq_idx is None else seq_idx[:, first]
        dinitial_state = chunked.backward(
            dout[:, first], x[:, first], weight, bias, initial_state, seq_first, silu, reverse
        )[3]
    return (
        dx,
        dweight.sum(0).t().to(weight.dtype).contiguous(),
        None if bias is None else dbias.sum(0).to(bias.dtype),
        dinitial_state,
    )


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
    conv_update[(triton.cdiv(channels, tile_d), batch)](
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


def _tile_d(channels: int) -> int:
    return min(64, max(16, triton.next_power_of_2(channels)))
