"""The language model's loss."""

from mambakit.kernels.loss.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
