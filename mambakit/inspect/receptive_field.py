"""The effective receptive field: Luo et al. (2016), arXiv 1701.04128."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mambakit.backbone import Backbone
from mambakit.inspect.places import evaluating, placed, seen_grid


@dataclass(frozen=True)
class ReceptiveField:
    """How much each pixel moves the features of one place.

    ``contribution`` (H, W), or (L,) of sequences, float64 on the CPU; ``location`` is the place among the ``grid`` of
    features, (row, column) or (element,); ``images`` is the number of images averaged over.
    """

    contribution: Tensor
    location: tuple[int, ...]
    grid: tuple[int, ...]
    images: int

    @property
    def center(self) -> tuple[float, ...]:
        """The middle of the location's patch in pixels, the first pixel's own middle being 0."""
        return tuple(
            (place + 0.5) * size / cells - 0.5
            for place, size, cells in zip(self.location, self.contribution.shape, self.grid, strict=True)
        )

    def held(self) -> tuple[Tensor, Tensor]:
        """Sides (S,) in pixels of squares around the center, and the share (S,) of all contributions inside each."""
        distance = torch.zeros(self.contribution.shape, dtype=torch.float64)
        for axis, middle in enumerate(self.center):
            along = torch.arange(distance.shape[axis], dtype=torch.float64).sub_(middle).abs_()
            distance = torch.maximum(distance, along.view(-1, *[1] * (distance.dim() - 1 - axis)))
        sides, ring = torch.unique(2 * distance.flatten() + 1, return_inverse=True)
        inside = torch.zeros_like(sides).index_add_(0, ring, self.contribution.flatten()).cumsum(0)
        return sides, inside / inside[-1]

    def side(self, share: float = 0.5) -> float:
        """The side in pixels of the smallest square around the center that holds ``share`` of all contributions.

        Raises:
            ValueError: a share outside 0 to 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"side: share={share}, expected above 0 and at most 1")
        sides, inside = self.held()
        return float(sides[(inside >= share * (1 - 1e-12)).nonzero()[0]])


def receptive_field(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor | Iterable[Tensor],
    *,
    layer: int = -1,
    location: tuple[int, ...] | None = None,
) -> ReceptiveField:
    """The effective receptive field of one place of a model's features, averaged over images.

    With f(x) in R^C the features of the place for an image x, a pixel's contribution is

        c_p = mean over images of sum over channels k of | d ||f(x)||_2 / d x_{k,p} |

    The model runs in evaluation mode and is left as it was; no parameter receives a gradient. What is measured:

    - a timm model (anything with ``forward_intermediates``, itself or inside): the features after ``layer``, before the
      final norm. Behind a norm the length of a vector is the same for every image, and its gradient nothing but noise;
    - else a :class:`mambakit.Backbone`, itself or inside: the residual stream after ``layer``, before the final norm;
    - else the output of the module or callable, (B, C, rows, columns) or (B, L, C).

    Class tokens are left out: a Vim's in the middle, others in front.

    Args:
        model: what to look into.
        images: (B, C, H, W), or sequences (B, L, C), floating, on the model's device; or batches of them, of one size.
        layer: which layer's features, -1 the last; -1 alone for a plain module.
        location: (row, column) among the features, or (element,) of a sequence; the middle, n // 2, by default.

    Raises:
        ValueError: no images, images of several sizes, features of another shape than named above, a layer or a
            location that does not exist, features that do not depend on the images, a gradient that is not finite.
        TypeError: images that are not floating.
    """
    watched, forward = _features(model, layer)
    total: Tensor | None = None
    count = 0
    grid: tuple[int, ...] = ()
    place: tuple[int, ...] = ()
    for batch in [images] if isinstance(images, Tensor) else images:
        _check_images(batch)
        x = batch.detach().clone().requires_grad_()
        with torch.enable_grad(), evaluating(watched):
            features = forward(x)
            grid = tuple(features.shape[1:-1])
            place = _place(location, grid)
            at_place = features[:, place[0]] if len(place) == 1 else features[:, place[0], place[1]]
            length = torch.linalg.vector_norm(at_place.to(torch.promote_types(at_place.dtype, torch.float32)), dim=1)
            gradient = _gradient(length.sum(), x)
        # Channels are axis 1 of images, the last of sequences.
        found = gradient.double().abs().sum(dim=1 if x.dim() == 4 else 2).sum(0).cpu()
        if total is not None and total.shape != found.shape:
            raise ValueError(
                f"receptive_field: images of {tuple(total.shape)} and of {tuple(found.shape)} came; give one size"
            )
        total = found if total is None else total + found
        count += len(x)
    if total is None:
        raise ValueError("receptive_field: images is empty, expected at least one image")
    if not total.isfinite().all():
        raise ValueError("receptive_field: the gradient is not finite; look for NaN in the images or the weights")
    if not total.any():
        raise ValueError(
            f"receptive_field: the features at {place} do not depend on the images; choose another layer or location"
        )
    return ReceptiveField(total / count, place, grid, count)


def _features(model: Any, layer: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The module that runs, and what gives the features of ``layer``, channels last, of images or sequences."""
    if not isinstance(model, nn.Module):
        watched = getattr(model, "__self__", None)  # of a method such as model.forward_features
        return watched if isinstance(watched, nn.Module) else nn.Module(), lambda x: _plain(model, x, layer)
    for part in model.modules():
        if hasattr(part, "forward_intermediates"):
            return part, lambda x, part=part: _of_timm(part, x, layer)  # type: ignore[misc]
    for part in model.modules():
        if isinstance(part, Backbone):
            return model, lambda x, part=part: _of_backbone(model, part, x, layer)  # type: ignore[misc]
    return model, lambda x: _plain(model, x, layer)


def _of_timm(model: Any, x: Tensor, layer: int) -> Tensor:
    (features,) = model.forward_intermediates(x, indices=[layer], norm=False, intermediates_only=True)
    return _channels_last(features)


def _of_backbone(model: nn.Module, backbone: Backbone, x: Tensor, layer: int) -> Tensor:
    """The stream after ``layer``, as the norm behind it reads it."""
    depth = len(backbone.layers)
    if not -depth <= layer < depth:
        raise ValueError(f"receptive_field: layer={layer}, expected {-depth} to {depth - 1}, the backbone's layers")
    after = layer % depth + 1
    norm = backbone.norm_f if after == depth else cast(Any, backbone.layers[after]).norm
    streams: list[Tensor] = []
    # Its arguments are the last output and the stream before it, or, where layers are recomputed, their sum.
    hook = norm.register_forward_pre_hook(
        lambda _, arguments: streams.append(sum(part for part in arguments if part is not None))
    )
    try:
        with seen_grid(model) as grids:
            model(x)
    finally:
        hook.remove()
    return placed(streams[0], model, grids[0] if grids else None)


def _plain(model: Callable[[Tensor], Tensor], x: Tensor, layer: int) -> Tensor:
    if layer != -1:
        raise ValueError(f"receptive_field: layer={layer}, but a plain module has its output alone; leave layer away")
    features: Any = model(x)
    if not isinstance(features, Tensor) or features.dim() not in (3, 4) or (x.dim() == 4) != (features.dim() == 4):
        came = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"receptive_field: the model gives {came} for {tuple(x.shape)}, expected (batch, channels, rows, columns) "
            "of images or (batch, length, channels) of sequences; give the part of the model before it pools"
        )
    return _channels_last(features)


def _channels_last(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1) if features.dim() == 4 else features


def _gradient(length: Tensor, x: Tensor) -> Tensor:
    if not length.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(length, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _place(location: tuple[int, ...] | None, grid: tuple[int, ...]) -> tuple[int, ...]:
    if location is None:
        return tuple(size // 2 for size in grid)
    if len(location) != len(grid) or any(not 0 <= place < size for place, size in zip(location, grid, strict=False)):
        raise ValueError(
            f"receptive_field: location={location}, expected a place in a grid of {' x '.join(map(str, grid))}, "
            "counted from 0"
        )
    return tuple(location)


def _check_images(images: Tensor) -> None:
    if images.dim() not in (3, 4) or not math.prod(images.shape):
        raise ValueError(
            f"receptive_field: images have shape {tuple(images.shape)}, expected (batch, channels, height, width), or "
            "(batch, length, channels) of sequences"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"receptive_field: images are {images.dtype}, expected floating numbers as the model takes them; "
            "normalise them first"
        )
