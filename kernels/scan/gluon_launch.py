"""Launches the Gluon forward scan: which calls it takes, how time and channels are cut, buffers and strides."""

# Gluon's and Triton's launch syntax is untyped.
# mypy: disable-error-code="attr-defined, no-untyped-call, index"

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.kernels.launch import launch
from mambakit.kernels.scan.gluon_forward import scan_forward_kernel, segment_states_kernel
from mambakit.kernels.scan.reference import HALF
from mambakit.kernels.scan.triton_common import (
    CHUNK,
    device_guard,
    group_count,
    row_strides,
    unit_stride,
    vector_strides,
)
from mambakit.kernels.tuning import choose_config, is_tuning


class Config(NamedTuple):
    """Steps a tile, channels and states a thread, warps a program; see gluon_common.py."""

    steps: int
    channels: int
    states: int
    warps: int


# The space of configurations, each the fastest on an H200 for some shape (docs/kernels.md has the table). Long
# sequences take tall tiles and 8 states a thread, which leaves two lanes to add up each y.
LONG = Config(steps=16, channels=1, states=8, warps=1)
SHORT = Config(steps=8, channels=2, states=4, warps=1)
# 16 states a thread step: the fewest instructions a state, for walks that segments of time spread over the chip.
SEGMENTED = Config(steps=8, channels=2, states=8, warps=1)
# 163 registers let twelve warps share a multiprocessor: one wave.
WARPS_WANTED = 12
# Fewer than four warps, one a scheduler, leave a multiprocessor idle; a second walk over the sequence then pays.
WARPS_ENOUGH = 4


class Cut(NamedTuple):
    """How a call is cut: ``blocks`` tiles of channels a batch row, each within one group of B and one of C, times
    ``segments`` of ``segment_length`` steps."""

    config: Config
    groups: int
    B_share: int
    C_share: int
    blocks_per_group: int
    blocks: int
    segments: int
    segment_length: int


@lru_cache(maxsize=1024)
def cut(
    batch: int,
    length: int,
    channels: int,
    d_state: int,
    B_groups: int,
    C_groups: int,
    half: bool,
    multiprocessors: int,
    config: Config | None = None,
) -> Cut:
    """The rule's choice, or ``config`` cut for this shape."""
    groups = math.lcm(B_groups, C_groups, 2 if half else 1)

    def tiles(config: Config) -> int:
        tile = 32 * config.states // d_state * config.channels * config.warps
        return -(-channels // groups // tile)

    chosen = config or (LONG if length >= 512 else SHORT)
    chosen = chosen._replace(states=min(chosen.states, d_state))
    segments, chunks = 1, -(-length // CHUNK)
    segment_length = chunks * CHUNK
    if batch * groups * tiles(chosen) * chosen.warps < WARPS_ENOUGH * multiprocessors and chunks > 1:
        chosen = config or SEGMENTED
        chosen = chosen._replace(states=min(chosen.states, d_state))
        warps = batch * groups * tiles(chosen) * chosen.warps
        segment_length = -(-chunks // min(chunks, max(1, WARPS_WANTED * multiprocessors // warps))) * CHUNK
        segments = -(-length // segment_length)
    blocks = tiles(chosen)
    return Cut(
        chosen, groups, groups // B_groups, groups // C_groups, blocks, groups * blocks, segments, segment_length
    )


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def segment_states(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    V: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    direction: int,
    cut: Cut,
    V_share: int,
    backward: bool,
) -> Tensor:
    """products and ends (2, B, segments, D, N) float32 of every segment; see ``segment_states_kernel``."""
    batch, length, channels = x.shape
    d_state = A.shape[1]
    config = cut.config
    states = torch.empty((2, batch, cut.segments, channels, d_state), dtype=torch.float32, device=x.device)
    launch(
        segment_states_kernel, (batch * cut.blocks * cut.segments,),
        x, delta, A, V, z, delta_bias, seq_idx, states[0], states[1],
        length, channels, channels // cut.groups, cut.blocks_per_group, cut.blocks, cut.groups, V_share,
        cut.segments, cut.segment_length,
        *row_strides(x), *row_strides(delta), *row_strides(z), row_strides(seq_idx)[0], *vector_strides(V),
        N=d_state, T=config.steps, CPT=config.channels, SPT=config.states, NW=config.warps,
        SOFTPLUS=delta_softplus, DIRECTION=direction, BACKWARD=backward, num_warps=config.warps,
    )  # fmt: skip
    return states


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
    """As :func:`mambakit.kernels.scan.triton_forward.scan_forward`; the states are kept every ``CHUNK`` steps."""
    u, delta, z, B, C = (unit_stride(tensor) for tensor in (u, delta, z, B, C))
    A, initial_state = dense_float(A), dense_float(initial_state)
    D, delta_bias, seq_idx = unit_stride(D), unit_stride(delta_bias), unit_stride(seq_idx)
    batch, length, channels = u.shape
    d_state = A.shape[1]

    def run(plan: Cut) -> tuple[Tensor, Tensor, Tensor]:
        states = None
        if plan.segments > 1:
            states = segment_states(
                u, delta, A, B, None, delta_bias, seq_idx, delta_softplus, direction, plan, plan.B_share, False
            )
        # Made while the segments' kernel runs: at batch 1 the GPU would wait for them.
        out = torch.empty((batch, length, channels), dtype=u.dtype, device=u.device)
        final = torch.empty((batch, channels, d_state), dtype=torch.float32, device=u.device)
        chunks = -(-length // CHUNK)
        checkpoints = torch.empty((batch, chunks, channels * d_state), dtype=torch.float32, device=u.device)
        config = plan.config
        launch(
            scan_forward_kernel, (batch * plan.blocks * plan.segments,),
            u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
            None if states is None else states[0], None if states is None else states[1], out, final, checkpoints,
            length, channels, channels // plan.groups, plan.blocks_per_group, plan.blocks, plan.groups,
            plan.B_share, plan.C_share, plan.segments, plan.segment_length,
            *row_strides(u), *row_strides(delta), *row_strides(z), row_strides(seq_idx)[0],
            *vector_strides(B), *vector_strides(C),
            N=d_state, T=config.steps, CPT=config.channels, SPT=config.states, NW=config.warps, CHUNK=CHUNK,
            SOFTPLUS=delta_softplus, DIRECTION=direction, num_warps=config.warps,
        )  # fmt: skip
        return out, final, checkpoints

    half = direction == HALF
    shape = (batch, length, channels, d_state, group_count(B), group_count(C), half, multiprocessors(u.device))
    with device_guard(u):
        rule = cut(*shape)
        if not is_tuning():
            return run(rule)
        others = [config for config in (LONG, SHORT, SEGMENTED) if config != rule.config]
        key = ("scan_forward", *shape, str(u.dtype), z is not None, direction)
        return run(cut(*shape, choose_config(key, [rule.config, *others], lambda config: run(cut(*shape, config)))))


def dense_float(tensor: Tensor | None) -> Any:
    """A contiguous float32 copy where the tensor is not that already."""
    return tensor if tensor is None else tensor.float().contiguous()
