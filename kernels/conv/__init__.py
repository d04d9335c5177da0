"""The short causal convolution along time, and its step for generation."""

from mambakit.kernels.conv.op import causal_conv1d
from mambakit.kernels.conv.update import causal_conv1d_update

__all__ = ["causal_conv1d", "causal_conv1d_update"]
