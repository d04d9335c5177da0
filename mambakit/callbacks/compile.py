"""Compiles the network of a run, so that Python no longer launches each of its kernels."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from mambakit.backbone import Backbone

GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that replay CUDA graphs


class Compile(Callback):
    """Compiles a task's network by ``torch.compile`` before the first step of a fit, without a break and in place.

    In the default mode forward and backward are recorded as CUDA graphs and replayed, for every shape of batch once.
    A small model is bound by the time Python takes to launch its kernels, and a replay launches them at once. Names of
    parameters, checkpoints, precision, clipping and the optimiser are as without it. What a step costs at first is its
    compilation: of every new shape of batch in training, and again in validation. So the batches should be of one
    shape: ``drop_last=True``, or 8 shapes at most, which is where ``torch.compile`` stops.

    Gradients of a graph lie in memory that its next replay writes over. They are set free before each step, and adding
    them up over several batches is refused.

    Args:
        network: the submodule to compile, by its dotted name, which the task calls as a module; None takes ``model``,
            or of a model that is a :class:`mambakit.Backbone` with something around it, ``model.backbone``.
        mode: "reduce-overhead" (CUDA graphs), "default" (none), "max-autotune" (graphs, and products timed for the
            best), as ``torch.compile`` takes them. Without a CUDA device no mode has graphs.

    Raises:
        ValueError: an unknown mode or submodule; gradients added up over several batches in a mode with graphs.
    """

    def __init__(
        self,
        network: str | None = None,
        mode: Literal["default", "reduce-overhead", "max-autotune"] = "reduce-overhead",
    ) -> None:
        if mode not in ("default", *GRAPHS):
            raise ValueError(f"Compile: mode={mode!r}, expected one of default, {', '.join(GRAPHS)}")
        self.network = network
        self.mode = mode

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        batches = trainer.accumulate_grad_batches
        if self.mode in GRAPHS and batches != 1:
            raise ValueError(
                f"Compile: the trainer adds up gradients over accumulate_grad_batches={batches} batches, and those of "
                "a CUDA graph are overwritten by its next replay; set it to 1, or take mode='default'"
            )
        network_of(pl_module, self.network).compile(mode=self.mode, fullgraph=True, dynamic=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mode in GRAPHS:  # the trainer itself does so after the next forward, which already writes over them
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)


def network_of(task: LightningModule, name: str | None) -> nn.Module:
    """The submodule of that dotted name; None: ``model``, or its ``backbone`` where that is a Backbone.

    Raises:
        ValueError: there is none.
    """
    wanted = name or "model"
    found = dict(task.named_modules(remove_duplicate=False)).get(wanted)
    if found is None:
        near = ", ".join(child for child, _ in task.named_children())
        raise ValueError(
            f"Compile: {type(task).__name__} has no submodule {wanted!r}; give network, the dotted name of one inside "
            f"{near or 'a task that has submodules'}"
        )
    inner = getattr(found, "backbone", None)
    return inner if name is None and isinstance(inner, Backbone) else found
