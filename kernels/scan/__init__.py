"""The selective scan of Mamba, over a sequence and one step at a time."""

from mambakit.kernels.scan.op import selective_scan
from mambakit.kernels.scan.update import selective_state_update

__all__ = ["selective_scan", "selective_state_update"]
