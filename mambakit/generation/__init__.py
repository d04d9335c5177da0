"""Sampling and generation: pure functions of logits, and the loop that feeds a model its own draws."""

from mambakit.generation.decoding import StepwiseModel, generate, stream
from mambakit.generation.sampling import filter_logits, sample

__all__ = ["StepwiseModel", "filter_logits", "generate", "sample", "stream"]
