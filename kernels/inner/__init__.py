"""The inner path of the Mamba-1 block as one operator."""

from mambakit.kernels.inner.op import mamba_inner

__all__ = ["mamba_inner"]
