"""What the command line adds to every fit, for use in any Lightning trainer."""

from mambakit.callbacks.before_after import BeforeAfter
from mambakit.callbacks.last_checkpoint import LastCheckpoint
from mambakit.callbacks.loss_curve import LossCurve
from mambakit.callbacks.sample import Sample

__all__ = ["BeforeAfter", "LastCheckpoint", "LossCurve", "Sample"]
