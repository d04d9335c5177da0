"""Structured state space duality: Mamba-2's recurrence, computed as attention inside chunks."""

from mambakit.kernels.duality.op import ssd
from mambakit.kernels.duality.reference import step_sizes
from mambakit.kernels.duality.weighted import weighted_ssd

__all__ = ["ssd", "step_sizes", "weighted_ssd"]
