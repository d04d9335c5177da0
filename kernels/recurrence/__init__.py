"""The first-order linear recurrence h_t = a_t h_{t-1} + b_t, the bare scan under every state space model."""

from mambakit.kernels.recurrence.op import linear_scan

__all__ = ["linear_scan"]
