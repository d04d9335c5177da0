"""Triton kernels behind Mamba-3's recurrence: each step's own input, the skip, the gate. Launches: triton_launch.py.

A program takes some rows, each the channels of one head at one step. Arithmetic is float32; rows are counted
in int32, offsets in int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from mambakit.kernels.trapezoid.triton_kernels import example


@triton.jit
def _places(runs, L, H, ROWS: tl.constexpr):
    """Of ROWS rows (b, t, h): row, batch, step and head, (ROWS, 1) each, and which read a state before them."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    step = row // H
    batch = step // L
    t = step - batch * L
    head = row - step * H
    row, step, batch, t = row.to(tl.int64), step.to(tl.int64), batch.to(tl.int64), t.to(tl.int64)
    later = t > 0
    if runs is not None:
        run = tl.load(runs + step, mask=later, other=0)
        later = later & (run == tl.load(runs + step - 1, mask=later, other=0))
    return row, batch, t, head, later


@triton.jit
def output_forward(
    read,
    first,
    x,
    z,
    D,
    dA,
    gamma,
    dots,
    runs,
    out,
    L,
    H,
    P,
    total,
    x_batch,
    x_step,
    x_head,
    z_batch,
    z_step,
    z_head,
    ROWS: tl.constexpr,
    PP: tl.constexpr,
):
    """out = (exp(dA_t) read_{t-1} + (gamma_t dots_t + D) x_t) SiLU(z_t). Grid (blocks of the total B L H rows). Instead
    of read at the first step stands first (B, H, P). first, z, D and runs may be None.
    """
    row, batch, t, head, later = _places(runs, L, H, ROWS)
    p = tl.arange(0, PP)[None, :]
    here = row < total
    inside = here & (p < P)
    value = tl.load(read + (row - H) * P + p, mask=inside & later, other=0.0).to(tl.float32)
    if first is not None:
        value += tl.load(first + (batch * H + head) * P + p, mask=inside & (t == 0), other=0.0)
    own = tl.load(gamma + row, mask=here, other=0.0) * tl.load(dots + row, mask=here, other=0.0)
    if D is not None:
        own += tl.load(D + head, mask=here, other=0.0)
    u = tl.load(x + batch * x_batch + t * x_step + head * x_head + p, mask=inside, other=0.0).to(tl.float32)
    y = tl.exp(tl.load(dA + row, mask=here, other=0.0)) * value + own * u
    if z is not None:
        gate = tl.load(z + batch * z_batch + t * z_step + head * z_head + p, mask=inside, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(out + row * P + p, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def output_backward(
    dout,
    read,
    first,
    x,
    z,
    D,
    dA,
    gamma,
    dots,
    runs,
    dread,
    dfirst,
    dx,
    dz,
    ddA,
    down,
    L,
    H,
    P,
    total,
    x_batch,
    x_step,
    x_head,
    z_batch,
    z_step,
    z_head,
    ROWS: tl.constexpr,
    PP: tl.constexpr,
):
    """Gradients of ``output_forward``; down (B, L, H) is that of gamma_t dots_t + D. dread's last step is left to the
    caller. Grid as before.
    """
    row, batch, t, head, later = _places(runs, L, H, ROWS)
    p = tl.arange(0, PP)[None, :]
    here = row < total
    inside = here & (p < P)
    value = tl.load(read + (row - H) * P + p, mask=inside & later, other=0.0).to(tl.float32)
    if first is not None:
        value += tl.load(first + (batch * H + head) * P + p, mask=inside & (t == 0), other=0.0)
    own = tl.load(gamma + row, mask=here, other=0.0) * tl.load(dots + row, mask=here, other=0.0)
    if D is not None:
        own += tl.load(D + head, mask=here, other=0.0)
    u = tl.load(x + batch * x_batch + t * x_step + head * x_head + p, mask=inside, other=0.0).to(tl.float32)
    alpha = tl.exp(tl.load(dA + row, mask=here, other=0.0))
    dy = tl.load(dout + row * P + p, mask=inside, other=0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + batch * z_batch + t * z_step + head * z_head + p, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dgate = dy * (alpha * value + own * u) * slope
        tl.store(dz + row * P + p, dgate.to(dz.dtype.element_ty), mask=inside)
        dy *= gate * sigmoid
    tl.store(dx + row * P + p, (own * dy).to(dx.dtype.element_ty), mask=inside)
    dvalue = alpha * dy
    tl.store(ddA + row, tl.sum(dvalue * value, axis=1, keep_dims=True), mask=here)
    tl.store(down + row, tl.sum(dy * u, axis=1, keep_dims=True), mask=here)
    if first is not None:
        tl.store(dfirst + (batch * H + head) * P + p, dvalue, mask=inside & (t == 0))
    dvalue = tl.where(later, dvalue, 0.0)
    tl.store(dread + (row - H) * P + p, dvalue.to(dread.dtype.element_ty), mask=inside & (t > 0))


def compile_examples() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constant arguments, warps) of typical calls, for a compile test that needs no GPU."""
    strides = {f"{name}_{axis}": "i64" for name in "xz" for axis in ("batch", "step", "head")}
    sizes = {"L": "i32", "H": "i32", "P": "i32", "total": "i32"}
    inputs = {"read": "*bf16", "first": "*fp32", "x": "*bf16", "z": "*bf16"}
    inputs |= dict.fromkeys(("D", "dA", "gamma", "dots"), "*fp32") | {"runs": "*i32"}
    gradients = {"dread": "*bf16", "dfirst": "*fp32", "dx": "*bf16", "dz": "*bf16", "ddA": "*fp32", "down": "*fp32"}
    tile = {"ROWS": 32, "PP": 64}
    for given in ({}, {"first": None, "runs": None}, {"z": None, "D": None}):
        yield example(output_forward, inputs | {"out": "*bf16"} | sizes | strides, tile | given, 4)
        given = given | {f"d{name}": None for name in given if name in ("first", "z")}
        yield example(output_backward, {"dout": "*bf16"} | inputs | gradients | sizes | strides, tile | given, 4)
