"""The convolution's step for generation: :func:`causal_conv1d_update`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from mambakit.kernels.conv import reference
from mambakit.kernels.conv.op import _check_filter, _not_in_triton
from mambakit.kernels.dispatch import choose


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One step, or T steps, of :func:`causal_conv1d`; ``conv_state`` is updated in place.

    ``y_t = act(bias + sum_k weight[:, k] * x_{t-(W-1)+k})``, the inputs before x_0 taken from ``conv_state``. The
    interface is that of the causal-conv1d package. No gradient flows through it. Letters: B batch, D channels,
    T steps, W width, S columns of state.

    Args:
        x: (B, D), one step, or (B, D, T), of any float dtype.
        conv_state: (B, D, S) of any float dtype, S at least W-1, **changed in place**. The last S inputs, oldest
            first; with ``cache_seqlens`` a ring, in which input number n stands in column n modulo S. With
            ``conv_state_indices`` its first axis may have any size.
        weight, bias, activation: as in :func:`causal_conv1d`.
        cache_seqlens: (B,) int32 or int64, the number of inputs each row has seen.
        conv_state_indices: (B,) int32 or int64, the line of ``conv_state`` for each row; no two the same. A negative
            one marks a padding row: its output is zero and no state changes.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        y of x's shape and dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, activation or backend, named.
    """
    name = "causal_conv1d_update"
    if isinstance(x, Tensor) and x.dim() == 2:
        check_shape(name, "x", x, batch=None, channels=None)
        return causal_conv1d_update(
            x.unsqueeze(-1), conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend=backend
        ).squeeze(-1)
    check_shape(name, "x", x, batch=None, channels=None, steps=None)
    batch, channels = x.shape[:2]
    _check_filter(name, x, channels, weight, bias, activation)
    lines = batch if conv_state_indices is None else None
    check_shape(name, "conv_state", conv_state, batch=lines, channels=channels, state_len=None)
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"{name}: conv_state has {conv_state.shape[2]} columns, expected at least width - 1 = {weight.shape[1] - 1}"
        )
    check_dtype(name, "conv_state", conv_state, *FLOATS)
    check_device(name, "conv_state", conv_state, x, "x")
    for argument, numbers in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if numbers is not None:
            check_shape(name, argument, numbers, batch=batch)
            check_dtype(name, argument, numbers, torch.int32, torch.int64)
            check_device(name, argument, numbers, x, "x")
    chosen = choose(name, backend, x, _not_in_triton(x)).backend
    if chosen == "reference":
        with torch.no_grad():
            return reference.causal_conv1d_update(
                x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
            )
    return _update(x, conv_state, weight, bias, activation is not None, cache_seqlens, conv_state_indices, chosen)


@torch.library.custom_op("mambakit::causal_conv1d_update", mutates_args=("conv_state",))
def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from mambakit.kernels.conv import triton_launch

        return triton_launch.update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    with torch.autocast(x.device.type, enabled=False):
        return update_torch(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)


@_update.register_fake
def _(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def update_torch(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """y (B, D, T) in x's dtype; all rows at once."""
    steps, state_len, past = x.shape[2], conv_state.shape[2], weight.shape[1] - 1
    exact = torch.promote_types(x.dtype, torch.float32)
    state = conv_state
    if conv_state_indices is not None:
        rows = conv_state_indices.clamp(min=0)
        state = conv_state.index_select(0, rows)
    if cache_seqlens is None:
        seen = torch.cat([state, x.to(state.dtype)], dim=2)
        new_state = seen[..., -state_len:]
        history = state[..., state_len - past :]
    else:
        ages = torch.arange(-past, 0, device=x.device) + cache_seqlens[:, None]
        history = state.gather(2, (ages % state_len)[:, None].expand(-1, state.shape[1], -1))
        kept = min(steps, state_len)  # older ones would be overwritten in the same call
        columns = (torch.arange(steps - kept, steps, device=x.device) + cache_seqlens[:, None]) % state_len
        columns = columns[:, None].expand(-1, state.shape[1], -1)
        new_state = state.scatter(2, columns, x[..., steps - kept :].to(state.dtype))
    window = torch.cat([history.to(exact), x.to(exact)], dim=2)
    taps = weight.to(exact)
    out = window[..., :steps] * taps[:, :1]
    for k in range(1, past + 1):
        out.addcmul_(window[..., k : k + steps], taps[:, k : k + 1])
    if bias is not None:
        out += bias[:, None]
    if silu:
        F.silu(out, inplace=True)
    if conv_state_indices is None:
        conv_state.copy_(new_state)
    else:
        real = conv_state_indices >= 0
        out.masked_fill_(~real.view(-1, 1, 1), 0)
        conv_state[conv_state_indices[real].long()] = new_state[real]
    return out.to(x.dtype).contiguous()
