"""Step sizes and decays of the Mamba-2 block in one launch, and their gradients in another.

They are a few numbers a token, so in PyTorch the dozen launches cost more than the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambakit.kernels.launch import launch
from mambakit.kernels.scan.triton_common import sigmoid, softplus

ROWS = 128  # tokens of a program


@triton.jit
def _steps(dt, dt_bias, lengths, token, h, in_tile, length, dt_t, least, most):
    """(r, steps, whether a step follows r) of a tile: r = dt + dt_bias."""
    raw = tl.load(dt + token * dt_t + h, mask=in_tile, other=0.0).to(tl.float32)
    raw += tl.load(dt_bias + h, mask=in_tile, other=0.0).to(tl.float32)
    free = softplus(raw)
    follows = (free >= least) & (free <= most)
    step = tl.minimum(tl.maximum(free, least), most)
    if lengths is not None:
        real = token % length < tl.load(lengths + token // length, mask=in_tile, other=0)
        step = tl.where(real, step, 0.0)
        follows = follows & real
    return raw, step, follows


@triton.jit(do_not_specialize=["tokens", "length"])
def steps_kernel(
    dt, dt_bias, A, lengths, steps, decays, tokens, length, heads, dt_t, least, most,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """steps and decays (T, H), contiguous, of BT tokens; dt's rows lie dt_t apart. Grid (tiles of tokens,)."""
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    h = tl.arange(0, BH)[None, :]
    in_tile = (token < tokens) & (h < heads)
    _, step, _ = _steps(dt, dt_bias, lengths, token, h, in_tile, length, dt_t, least, most)
    rate = tl.load(A + h, mask=h < heads, other=0.0).to(tl.float32)
    tl.store(steps + token * heads + h, step, mask=in_tile)
    tl.store(decays + token * heads + h, step * rate, mask=in_tile)


@triton.jit(do_not_specialize=["tokens", "length"])
def steps_backward_kernel(
    dsteps, ddecays, dt, dt_bias, A, lengths, ddt, sums, tokens, length, heads, dt_t, ddt_t, least, most,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """ddt of BT tokens, and their parts of the gradients of dt_bias and A: sums (programs, 2, H). Grid as above."""
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    h = tl.arange(0, BH)
    columns = h[None, :]
    in_tile = (token < tokens) & (columns < heads)
    raw, step, follows = _steps(dt, dt_bias, lengths, token, columns, in_tile, length, dt_t, least, most)
    rate = tl.load(A + columns, mask=columns < heads, other=0.0).to(tl.float32)
    dstep = tl.load(dsteps + token * heads + columns, mask=in_tile, other=0.0).to(tl.float32)
    ddecay = tl.load(ddecays + token * heads + columns, mask=in_tile, other=0.0).to(tl.float32)
    draw = tl.where(follows, (dstep + ddecay * rate) * sigmoid(raw), 0.0)
    tl.store(ddt + token * ddt_t + columns, draw.to(ddt.dtype.element_ty), mask=in_tile)
    sums += tl.program_id(0).to(tl.int64) * 2 * heads + h
    tl.store(sums, tl.sum(draw, axis=0), mask=h < heads)
    tl.store(sums + heads, tl.sum(ddecay * step, axis=0), mask=h < heads)


def forward(
    dt: Tensor, dt_bias: Tensor, A: Tensor, lengths: Tensor | None, least: float, most: float
) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.inner.mamba2_steps.forward`; dt a slice of the last axis of a contiguous tensor."""
    batch, length, heads = dt.shape
    steps, decays = (torch.empty(dt.shape, dtype=torch.float32, device=dt.device) for _ in range(2))
    launch(
        steps_kernel, (triton.cdiv(batch * length, ROWS),),
        dt, dt_bias.contiguous(), A.contiguous(), None if lengths is None else lengths.contiguous(), steps, decays,
        batch * length, length, heads, dt.stride(1), least, most,
        BT=ROWS, BH=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return steps, decays


def backward(
    dsteps: Tensor,
    ddecays: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    lengths: Tensor | None,
    least: float,
    most: float,
    ddt: Tensor,
) -> tuple[Tensor, Tensor]:
    """As :func:`mambakit.kernels.inner.mamba2_steps.backward`; dt and ddt slices as in ``forward``."""
    batch, length, heads = dt.shape
    programs = triton.cdiv(batch * length, ROWS)
    sums = torch.empty(programs, 2, heads, dtype=torch.float32, device=dt.device)
    launch(
        steps_backward_kernel, (programs,),
        dsteps.contiguous(), ddecays.contiguous(), dt, dt_bias.contiguous(), A.contiguous(),
        None if lengths is None else lengths.contiguous(), ddt, sums,
        batch * length, length, heads, dt.stride(1), ddt.stride(1), least, most,
        BT=ROWS, BH=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    ddt_bias, dA = sums.sum(0)
    return ddt_bias.to(dt_bias.dtype), dA.to(A.dtype)


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps) of typical calls, for tests/kernels/test_triton_compiles.py."""
    wide = dict.fromkeys(("dt_bias", "A", "steps", "decays", "dsteps", "ddecays", "sums"), "*fp32")
    types = wide | {"dt": "*bf16", "ddt": "*bf16", "lengths": "*i64", "least": "fp32", "most": "fp32"}
    for kernel in (steps_kernel, steps_backward_kernel):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        constants = {"BT": ROWS, "BH": 32}
        yield kernel, signature | dict.fromkeys(constants, "constexpr"), constants, 4
