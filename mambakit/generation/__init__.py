"""Sampling and generation: pure functions of logits, and the loop that feeds a model its own draws.

On a CUDA device the loop replays one captured graph a token where the model allows it (:mod:`.graph`, :mod:`.fused`).
"""

from mambakit.generation.decoding import StepwiseModel, generate, stream
from mambakit.generation.graph import release_graphs
from mambakit.generation.sampling import filter_logits, sample

__all__ = ["StepwiseModel", "filter_logits", "generate", "release_graphs", "sample", "stream"]
