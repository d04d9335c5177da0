"""Where in an image the tokens of a model stand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode for a while: no dropout, and every image for itself."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def seen_grid(module: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """A list into which each patch embedding of ``module`` puts its rows and columns, at each image it is given."""
    found: list[tuple[int, int]] = []

    def note(embedding: Any, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].dim() == 4:
            size = arguments[0].shape[2:]
            found.append(
                embedding.grid_of(*size) if hasattr(embedding, "grid_of") else embedding.dynamic_feat_size(size)
            )

    hooks = [
        part.register_forward_pre_hook(note)
        for part in module.modules()
        if hasattr(part, "grid_of") or hasattr(part, "dynamic_feat_size")  # ours, and timm's PatchEmbed
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def placed(tokens: Tensor, module: nn.Module, grid: tuple[int, int] | None) -> Tensor:
    """Tokens (B, L, D) of ``module`` where they lie: (B, rows, columns, D), class tokens taken out.

    A Vim's class token stands in the middle, those of other models in front. Without ``grid`` they stay (B, L, D).

    Raises:
        ValueError: fewer tokens than the grid has places.
    """
    if grid is None:
        return tokens
    extra = tokens.shape[1] - grid[0] * grid[1]
    if extra < 0:
        raise ValueError(
            f"{type(module).__name__}: there are {tokens.shape[1]} tokens, expected those of {grid[0]} x {grid[1]} "
            "patches; a layer that pools or drops tokens has no place in the image, choose one before it"
        )
    if extra == 1 and _is_vim(module):
        from mambakit.models.vision_mamba import split_tokens

        tokens = split_tokens(tokens)[1]
    else:
        tokens = tokens[:, extra:]
    return tokens.unflatten(1, grid)


def _is_vim(module: nn.Module) -> bool:
    """Whether a VisionMamba is in ``module``; told by name, since its class imports timm."""
    return any(
        kind.__module__ == "mambakit.models.vision_mamba" and kind.__name__ == "VisionMamba"
        for part in module.modules()
        for kind in type(part).__mro__
    )
