"""Shows what a language model writes."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mambakit.generation import generate


class Sample(Callback):
    """Prints a sample at the end of a fit, of a task whose ``model`` is a language model and data with a tokenizer.

    Args:
        prompt: text to continue; the opening of the validation text when left out.
        max_new_tokens: ids to draw.
        temperature: as in :func:`mambakit.generation.sample`.
        top_k: as in :func:`mambakit.generation.sample`.
        top_p: as in :func:`mambakit.generation.sample`.
        seed: of the draws; training's own random numbers are not touched.
        prompt_tokens: how much of the validation text opens the sample.
    """

    def __init__(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 400,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = 0.95,
        seed: int = 0,
        prompt_tokens: int = 48,
    ) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed
        self.prompt_tokens = prompt_tokens

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A prompt that the tokenizer cannot encode stops the run now and not after hours of training.
        if self.prompt is not None:
            self._encode(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if self.prompt is None:
            prompt = next(iter(trainer.datamodule.val_dataloader()))["input_ids"][:1, : self.prompt_tokens]  # type: ignore
        else:
            prompt = self._encode(trainer)
        draw = torch.Generator(pl_module.device).manual_seed(self.seed)
        new = generate(
            pl_module.model,  # type: ignore[arg-type]
            prompt.to(pl_module.device),
            self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=draw,
        )
        opening, rest = (tokenizer.decode(ids[0].tolist()) for ids in (prompt, new))
        print(f"--- sample, after the prompt {opening!r}\n{opening}{rest}\n---", flush=True)

    def _encode(self, trainer: Trainer) -> Tensor:
        try:
            ids = trainer.datamodule.tokenizer.encode(self.prompt)  # type: ignore[attr-defined]
        except ValueError as error:
            raise ValueError(f"Sample: prompt {self.prompt!r} does not suit the data's tokenizer: {error}") from error
        if not len(ids):
            raise ValueError("Sample: prompt is empty; give at least one character, or leave it out")
        return torch.tensor(ids, dtype=torch.int64)[None]
