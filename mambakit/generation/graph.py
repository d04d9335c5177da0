"""A decoding step and the draw after it as one CUDA graph, captured once and replayed for every token.

Launching some hundred kernels one by one costs the host more than the device needs to run them; a graph is one launch.
It is captured for one batch size, computing dtype and set of sampling options, and kept with the model for the next
call. :func:`release_graphs` frees what is kept; so does the end of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mambakit.generation.fused import FusedStep, obstacle
from mambakit.generation.sampling import SamplingOptions, pick
from mambakit.models import LanguageModel

KEPT = 2  # graphs kept a model: each holds the state of its batch and a pool of intermediate results
WORTH_CAPTURING = 4  # steps: the run that warms up and the capture cost the host about as much as two plain steps


class Key(NamedTuple):
    """What a captured graph depends on; ``addresses`` are those of the parameters, which it reads in place."""

    batch: int
    dtype: torch.dtype
    options: SamplingOptions
    addresses: tuple[int, ...]


_kept: WeakKeyDictionary[Any, dict[Key, GraphedStep]] = WeakKeyDictionary()


class GraphedStep:
    """Ids (B,) to the ids drawn after them: a graph of the step, the filters and the draw.

    The noise of the draw is made outside the graph, with whatever generator the call brings, so that the same
    generator draws the same ids as it does with plain steps.

    Args:
        step: from ``step.ids`` to logits; captured here, after a run that compiles its kernels.
        options: of the draw.
    """

    def __init__(self, step: FusedStep, options: SamplingOptions) -> None:
        self.step = step
        self.noise = None if options.temperature == 0 else torch.ones_like(step.logits, dtype=torch.float32)
        self.graph = torch.cuda.CUDAGraph()
        self._drawn: Tensor | None = None
        device = step.ids.device

        def advance() -> None:
            step.ids.copy_(pick(step(), self.noise, options))

        with torch.cuda.device(device), torch.autocast("cuda", enabled=False):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                advance()
            torch.cuda.current_stream(device).wait_stream(stream)
            # Other threads, a data loader's for instance, may go on allocating memory meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                advance()

    def __call__(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        if ids is not self._drawn:
            self.step.ids.copy_(ids)
        if self.noise is not None:
            self.noise.exponential_(generator=generator)
        self.graph.replay()
        self._drawn = self.step.ids.clone()
        return self._drawn


@contextmanager
def graphed_step(
    model: Any, state: Any, options: SamplingOptions, ids: Tensor, steps: int
) -> Iterator[GraphedStep | None]:
    """A graph that continues from ``state``, or None where plain steps must serve.

    A kept graph is lent to one generation at a time: another that runs between the steps of the first gets its own.
    One whose parameters have moved (to another device, dtype or tensor) is dropped; new values in the same tensors
    are read as they are.

    Args:
        model: as :func:`mambakit.generation.generate` takes it.
        state: what ``model.prefill`` gave.
        options: of the draw.
        ids: (B,), drawn from the prompt; their device decides.
        steps: how many steps may follow.
    """
    if ids.device.type != "cuda" or steps < WORTH_CAPTURING or not isinstance(model, LanguageModel):
        yield None
        return
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else model.lm_head.weight.dtype
    if obstacle(model, ids.device, dtype) is not None:
        yield None
        return
    key = Key(len(ids), dtype, options, tuple(parameter.data_ptr() for parameter in model.parameters()))
    kept = _kept.setdefault(model, {})
    for old in [old for old in kept if old.addresses != key.addresses]:
        del kept[old]
    graphed = kept.pop(key, None) or GraphedStep(FusedStep(model, len(ids), dtype), options)
    graphed.step.refresh()
    graphed.step.load(state)
    try:
        yield graphed
    finally:
        kept[key] = graphed
        while len(kept) > KEPT:
            del kept[next(iter(kept))]


def release_graphs(model: Any) -> None:
    """Free the graphs kept for ``model``, with their states and memory pools; the next generation captures anew."""
    _kept.pop(model, None)
