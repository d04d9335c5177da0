"""The inner path of the Mamba-1 block as one operator, in one direction or in both."""

from mambakit.kernels.inner.bimamba_op import bimamba_inner
from mambakit.kernels.inner.op import mamba_inner
from mambakit.kernels.inner.packing import Direction

__all__ = ["Direction", "bimamba_inner", "mamba_inner"]
