"""The words of the training part are learnt before the first step."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from mambakit.embeddings import KmerEmbedding


class LearnWords(Callback):
    """Before a fit, shows each :class:`mambakit.embeddings.KmerEmbedding` with ``known`` words the training part, with
    its labels (:meth:`~mambakit.embeddings.KmerEmbedding.learn`). Validation and test are not looked at.

    One that has its words, from a checkpoint, keeps them. In evaluation there is nothing to do: words are part of the
    state dictionary.

    Raises:
        ValueError: no such embedding in the model, or data without ``training_sequences()``, which
            :class:`mambakit.datamodules.genomics.GenomicsDataModule` has.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        embeddings = [one for one in pl_module.modules() if isinstance(one, KmerEmbedding) and one.known]
        if not embeddings:
            raise ValueError(
                "LearnWords: the model has no KmerEmbedding with known words; give it one, or leave the callback out"
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "training_sequences"):
            raise ValueError(
                f"LearnWords: the data is {'no datamodule' if data is None else type(data).__name__}, expected one "
                "with training_sequences(), such as GenomicsDataModule; or call the embedding's learn()"
            )
        for embedding in embeddings:
            if embedding.has_learnt:
                continue
            start = time.perf_counter()
            found = embedding.learn(data.training_sequences())
            told = ", ".join(f"{number:,} of {letters} letters" for letters, number in found.items())
            rank_zero_info(f"words of the training part: {told} ({time.perf_counter() - start:.1f} s)")
