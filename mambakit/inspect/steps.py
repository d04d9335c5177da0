"""How far each place moves the state of a selective scan: its step delta, direction by direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.inspect.places import evaluating, placed, seen_grid
from mambakit.kernels import causal_conv1d
from mambakit.mixers.bidirectional import Bidirectional
from mambakit.mixers.mamba1 import Mamba1
from mambakit.mixers.ss2d import SS2D
from mambakit.mixers.vim import VimMixer

SS2D_DIRECTIONS = ("rows", "columns", "rows, from the end", "columns, from the end")


@dataclass(frozen=True)
class StepSizes:
    """The steps of one mixer.

    ``layer`` is the mixer's name in the model; ``directions`` gives for each direction delta (B, rows, columns, D), or
    (B, L, D) of sequences, float32 on the CPU, every place where it lies in the image, whatever way the scan runs.
    """

    layer: str
    directions: dict[str, Tensor]

    def maps(self) -> dict[str, Tensor]:
        """The mean over channels, (B, rows, columns) or (B, L), of each direction."""
        return {name: delta.mean(-1) for name, delta in self.directions.items()}


@torch.no_grad()
def step_sizes(model: nn.Module, images: Tensor, layers: Iterable[int] | None = None) -> list[StepSizes]:
    """The steps delta of a model's selective scans, at every place of every image.

    delta = softplus(dt_proj(x_proj(u)) + bias), after convolution and softplus, as the scan takes it (Gu and Dao 2023,
    arXiv 2312.00752): with h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t a large step forgets what came before and
    takes the place in, and a step near 0 passes over it. Each is computed from what its mixer is given while the model
    runs once, in evaluation mode.

    Mixers: VimMixer and Bidirectional Mamba-1 ("forwards", "backwards"), Mamba1 ("forwards"), SS2D ("rows", "columns",
    and both "from the end"). Class tokens are taken out: a Vim's in the middle, others in front.

    Args:
        model: a model of images, or a :class:`mambakit.Backbone`.
        images: what it takes: (B, C, H, W), or sequences (B, L, ...), on its device.
        layers: indices among the mixers found, in the order of the model, negative ones from the end; all by default.

    Raises:
        ValueError: a model without such mixers, a layer that does not exist, a mixer that the model does not run.
    """
    found = list(scanning(model))
    if not found:
        raise ValueError(
            f"step_sizes: {type(model).__name__} has no mixer with a selective scan, expected VimMixer, SS2D, Mamba1 "
            "or a bidirectional Mamba1"
        )
    chosen = found if layers is None else [_chosen(found, layer) for layer in layers]
    with evaluating(model), seen_grid(model) as grids, _inputs([mixer for _, mixer in chosen]) as inputs:
        model(images)
    steps = []
    for name, mixer in chosen:
        if mixer not in inputs:
            raise ValueError(f"step_sizes: the model did not run {name}; choose layers that it runs")
        grid = grids[0] if grids else None
        steps.append(StepSizes(name, {key: _placed(delta, model, grid) for key, delta in deltas(mixer, inputs[mixer])}))
    return steps


def scanning(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each mixer whose steps can be told, a bidirectional one as a whole."""
    within: tuple[str, ...] = ()
    for name, part in model.named_modules():
        if name.startswith(within):
            continue
        if isinstance(part, Bidirectional):
            within = (*within, f"{name}." if name else "")
            if isinstance(part.mamba_fwd, Mamba1):
                yield name, part
        elif isinstance(part, (VimMixer, SS2D, Mamba1)):
            yield name, part


def deltas(mixer: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name and delta (..., D), float32 at least, of each direction of a mixer.

    Args:
        mixer: one that :func:`scanning` gives.
        x: what the mixer is given: (B, L, d_model), or (B, H, W, d_model) of SS2D.
    """
    if isinstance(mixer, SS2D):
        u = mixer.in_proj(x)[..., : mixer.d_inner]
        u = F.silu(mixer.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        for k, name in enumerate(SS2D_DIRECTIONS):
            dt = F.linear(u, mixer.x_proj_weight[k, : mixer.dt_rank])
            yield name, _step(dt, mixer.dt_projs_weight[k], mixer.dt_projs_bias[k])
    elif isinstance(mixer, VimMixer):
        u, _ = mixer.in_proj(x).chunk(2, dim=-1)
        yield "forwards", _along(u, mixer.conv1d, mixer.x_proj, mixer.dt_proj)
        yield "backwards", _along(u, mixer.conv1d_b, mixer.x_proj_b, mixer.dt_proj_b, reverse=True)
    elif isinstance(mixer, Bidirectional):
        yield "forwards", _of_mamba1(mixer.mamba_fwd, x)
        yield "backwards", _of_mamba1(mixer.mamba_fwd if mixer.tie == "all" else mixer.mamba_rev, x, reverse=True)
    else:
        yield "forwards", _of_mamba1(mixer, x)


def _of_mamba1(mixer: Any, x: Tensor, reverse: bool = False) -> Tensor:
    u, _ = mixer.in_proj(x).chunk(2, dim=-1)
    norm = mixer.dt_layernorm if mixer.has_norms else None
    return _along(u, mixer.conv1d, mixer.x_proj, mixer.dt_proj, reverse, norm)


def _along(
    u: Tensor,
    conv1d: nn.Conv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    reverse: bool = False,
    norm: nn.Module | None = None,
) -> Tensor:
    """Delta of one direction of a sequence: u (B, L, D) before the convolution."""
    u = causal_conv1d(u, conv1d.weight.squeeze(1), conv1d.bias, "silu", reverse=reverse)
    dt = F.linear(u, x_proj.weight[: dt_proj.in_features])
    return _step(dt if norm is None else norm(dt), dt_proj.weight, dt_proj.bias)


def _step(dt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """softplus(weight dt + bias), as the scan has it, which adds the bias in float32."""
    delta = F.linear(dt, weight)
    wide = torch.promote_types(delta.dtype, torch.float32)
    return F.softplus(delta.to(wide) + bias.to(wide))


def _placed(delta: Tensor, model: nn.Module, grid: tuple[int, int] | None) -> Tensor:
    return (delta if delta.dim() == 4 else placed(delta, model, grid)).cpu()


def _chosen(found: list[tuple[str, nn.Module]], layer: int) -> tuple[str, nn.Module]:
    if not -len(found) <= layer < len(found):
        raise ValueError(f"step_sizes: there is no layer {layer}, expected {-len(found)} to {len(found) - 1}")
    return found[layer]


@contextmanager
def _inputs(mixers: Sequence[Any]) -> Iterator[dict[nn.Module, Tensor]]:
    """What each mixer is given while this lasts: the argument of its input projection, of the first call."""
    inputs: dict[nn.Module, Tensor] = {}

    def note(mixer: nn.Module, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.setdefault(mixer, arguments[0].detach())

    projections: list[Any] = [
        (mixer.mamba_fwd if isinstance(mixer, Bidirectional) else mixer).in_proj for mixer in mixers
    ]
    hooks = [
        projection.register_forward_pre_hook(partial(note, mixer))
        for projection, mixer in zip(projections, mixers, strict=True)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
