"""Mamba-3's recurrence: the trapezoidal rule, a rotating state, and several inputs and outputs a step."""

from mambakit.kernels.trapezoid.op import trapezoidal_ssd
from mambakit.kernels.trapezoid.reference import TrapezoidalState

__all__ = ["TrapezoidalState", "trapezoidal_ssd"]
