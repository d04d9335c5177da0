"""Operators of selective state space models, channels-last: (batch, length, channels).

Letters: B batch, L length, D channels, N state size, G groups of channels, W convolution width, V vocabulary.
Each operator lies in a folder of its own: the definition (reference), vectorised PyTorch, Triton kernels, and the
registered operator with its one public function. :mod:`mambakit.kernels.dispatch` chooses between them.
"""

from mambakit.kernels.conv import causal_conv1d, causal_conv1d_update
from mambakit.kernels.dispatch import use_backend
from mambakit.kernels.duality import ssd
from mambakit.kernels.generators import cauchy, log_vandermonde, log_vandermonde_transpose
from mambakit.kernels.inner import mamba2_inner, mamba_inner
from mambakit.kernels.loss import linear_cross_entropy
from mambakit.kernels.norm import gated_rms_norm, layer_norm, rms_norm
from mambakit.kernels.recurrence import linear_scan
from mambakit.kernels.scan import selective_scan, selective_state_update
from mambakit.kernels.trapezoid import TrapezoidalState, trapezoidal_ssd
from mambakit.kernels.tuning import autotune

__all__ = [
    "TrapezoidalState",
    "autotune",
    "cauchy",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "layer_norm",
    "linear_cross_entropy",
    "linear_scan",
    "log_vandermonde",
    "log_vandermonde_transpose",
    "mamba2_inner",
    "mamba_inner",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "trapezoidal_ssd",
    "use_backend",
]
