"""Norms: fused with the residual add, and gated."""

from mambakit.kernels.norm.op import gated_rms_norm, layer_norm, rms_norm

__all__ = ["gated_rms_norm", "layer_norm", "rms_norm"]
