"""Looking into a vision model: what its features read, and how far each place moves the state of its scans."""

from mambakit.inspect.figures import provenance, receptive_field_figure, step_sizes_figure
from mambakit.inspect.receptive_field import ReceptiveField, receptive_field
from mambakit.inspect.steps import StepSizes, step_sizes

__all__ = [
    "ReceptiveField",
    "StepSizes",
    "provenance",
    "receptive_field",
    "receptive_field_figure",
    "step_sizes",
    "step_sizes_figure",
]
