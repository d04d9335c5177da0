"""Structured state space duality: Mamba-2's recurrence, computed as attention inside chunks."""

from mambakit.kernels.duality.op import ssd
from mambakit.kernels.duality.reference import step_sizes

__all__ = ["ssd", "step_sizes"]
