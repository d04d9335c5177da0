"""Runs of rows, each with a matrix of its own: what a mixture of experts multiplies."""

from mambakit.kernels.grouped.op import grouped_linear

__all__ = ["grouped_linear"]
