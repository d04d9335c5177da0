"""The figures show what was found, and say what made them."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mambakit import Backbone
from mambakit.inspect import (
    ReceptiveField,
    StepSizes,
    provenance,
    receptive_field_figure,
    step_sizes,
    step_sizes_figure,
)


def drawn(figure: Figure) -> list[np.ndarray]:
    """The arrays of the figure's pictures, in the order of its panels; without colour bars."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def field_of(contribution: torch.Tensor) -> ReceptiveField:
    location = tuple(size // 2 for size in contribution.shape)
    return ReceptiveField(contribution.double(), location, tuple(contribution.shape), 1)


def test_contributions_are_drawn_relative_to_the_largest_down_to_a_thousandth(tmp_path):
    contribution = torch.tensor([[0.0, 2.0, 0.001], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    figure = receptive_field_figure({"start": field_of(contribution), "end": field_of(contribution.T)}, note="a note")
    first, second = drawn(figure)
    np.testing.assert_allclose(first, [[1e-3, 0.5, 1e-3], [0.25, 1, 1e-3], [1e-3, 1e-3, 1e-3]], rtol=1e-6)
    np.testing.assert_allclose(second, first.T)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["start", "end"]
    line = figure.axes[2].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [1, 3])
    np.testing.assert_allclose(line.get_ydata(), [4 / 7.001, 1])
    assert figure.get_supxlabel() == "a note"
    assert figure.axes[1].get_xlim() == (-0.5, 2.5) and figure.axes[1].get_ylim() == (2.5, -0.5)
    figure.savefig(tmp_path / "field.png")
    assert (tmp_path / "field.png").read_bytes().startswith(b"\x89PNG")


def test_contributions_of_a_sequence_are_a_line():
    contribution = torch.tensor([1.0, 2.0, 8.0, 4.0])
    figure = receptive_field_figure(field_of(contribution))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.125, 0.25, 1, 0.5])
    assert drawn(figure) == []


def test_steps_are_drawn_beside_the_image_in_one_scale_a_layer():
    torch.manual_seed(0)
    steps = [
        StepSizes(f"layers.{i}", {"there": torch.rand(2, 3, 4, 5), "back": torch.rand(2, 3, 4, 5)}) for i in range(2)
    ]
    images = torch.randn(2, 1, 6, 8)
    figure = step_sizes_figure(steps, images, index=1, note=provenance(seed=3, command="a command"))
    shown = drawn(figure)
    picture = images[1, 0].numpy()
    for layer, (image, there, back) in zip(steps, (shown[:3], shown[3:]), strict=True):
        np.testing.assert_allclose(image, (picture - picture.min()) / (picture.max() - picture.min()), atol=1e-6)
        np.testing.assert_allclose(there, layer.directions["there"][1].mean(-1))
        np.testing.assert_allclose(back, layer.directions["back"][1].mean(-1))
    row = [axes.images[0].get_clim() for axes in figure.axes[1:3]]
    assert row[0] == row[1] == pytest.approx((min(shown[1].min(), shown[2].min()), max(shown[1].max(), shown[2].max())))
    note = figure.get_supxlabel()
    assert "seed 3" in note and f"torch {torch.__version__.split('+')[0]}" in note and note.endswith("\na command")


def test_a_square_beyond_the_image_does_not_stretch_it():
    contribution = torch.zeros(3, 8)
    contribution[1, 0] = 1
    figure = receptive_field_figure(field_of(contribution), note=" ".join(["word"] * 60))
    assert figure.axes[0].get_xlim() == (-0.5, 7.5) and figure.axes[0].get_ylim() == (2.5, -0.5)
    assert max(map(len, figure.get_supxlabel().splitlines())) <= 144  # 7.2 inches


def test_colour_images_are_shown_in_colour():
    steps = [StepSizes("layer", {"rows": torch.rand(1, 3, 4, 5)})]
    image = torch.rand(1, 3, 6, 8)
    (shown, _) = drawn(step_sizes_figure(steps, image))
    low, high = image.min(), image.max()
    np.testing.assert_allclose(shown, ((image[0] - low) / (high - low)).permute(1, 2, 0), atol=1e-6)


def test_steps_of_sequences_are_refused():
    x = torch.randn(1, 5, 8)
    with pytest.raises(ValueError, match="steps are of sequences"):
        step_sizes_figure(step_sizes(Backbone(8, 1), x), x)
