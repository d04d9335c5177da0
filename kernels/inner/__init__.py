"""The inner path of a block as one operator: of Mamba-1 in one direction or in both, and of Mamba-2."""

from mambakit.kernels.inner.bimamba_op import bimamba_inner
from mambakit.kernels.inner.mamba2_op import mamba2_inner
from mambakit.kernels.inner.op import mamba_inner
from mambakit.kernels.inner.packing import Direction

__all__ = ["Direction", "bimamba_inner", "mamba2_inner", "mamba_inner"]
