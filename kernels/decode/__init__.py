"""Fused kernels of one decoding step: few rows, so that launches and the reading of weights are all the time there is.

They serve :mod:`mambakit.generation` on CUDA devices alone and have no PyTorch path of their own: what they fuse is a
model's ``step``, which is also what their tests compare them with. Letters: B batch, K inputs, R outputs of a linear
map, D channels, N state size, W convolution width, P rank of the projection to delta.
"""

MAX_COLUMNS = 8192  # inputs of a linear map of few rows, which a program holds whole
