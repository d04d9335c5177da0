"""What generates the convolution kernels of time-invariant state spaces: sums of exponentials, sums of simple poles."""

from mambakit.kernels.generators.op import cauchy, log_vandermonde, log_vandermonde_transpose

__all__ = ["cauchy", "log_vandermonde", "log_vandermonde_transpose"]
