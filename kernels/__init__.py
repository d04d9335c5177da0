"""Operators of selective state space models, channels-last: (batch, length, channels).

Letters: B batch, L length, D channels, N state size, G groups of channels, W convolution width, V vocabulary.
Each operator lies in a folder of its own: the definition (reference), vectorised PyTorch, Triton kernels, and the
registered operator with its one public function. :mod:`mambakit.kernels.dispatch` chooses between them.
"""

from mambakit.kernels.dispatch import use_backend

__all__ = [
    "use_backend",
]
