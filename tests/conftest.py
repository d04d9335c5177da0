"""Settings every test shares. Without a CUDA device the Triton kernels run in Triton's interpreter, on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of ours
