"""Conventions of normalisation, those of CIFAR-10 against its (JPEG) pixels."""

import os
from pathlib import Path

import numpy as np
import pytest

from mambakit.datamodules.vision.normalization import CONVENTIONS, Normalization, default_name, resolve
from mambakit.datamodules.vision.sources import open_parts

SHARED = Path(os.environ.get("MAMBAKIT_DATA", Path(__file__).resolve().parents[4] / "shared/data"))


def test_cifar10_has_a_std_over_pixels_and_one_within_images():
    archive = SHARED / "vision/cifar10_jpg_small.tar"
    if not archive.is_file():
        pytest.skip(f"no vision/cifar10_jpg_small.tar under {SHARED} (set MAMBAKIT_DATA)")
    train = open_parts(str(archive))["train"]
    assert len(train) == 5000 and train.classes[0] == "airplane"
    pixels = np.stack([np.asarray(train.image(index, 3)) for index in range(0, 5000, 4)]) / 255
    for name in ("cifar10", "cifar10-s4", "cifar10-per-image"):
        assert np.allclose(pixels.mean((0, 1, 2)), CONVENTIONS[name].mean, atol=0.01), name
    assert np.allclose(pixels.std((0, 1, 2)), CONVENTIONS["cifar10"].std, atol=0.006)
    assert np.allclose(pixels.std((0, 1, 2)), CONVENTIONS["cifar10-s4"].std, atol=0.006)
    assert np.allclose(pixels.std((1, 2)).mean(0), CONVENTIONS["cifar10-per-image"].std, atol=0.006)
    grey = pixels @ [0.299, 0.587, 0.114]
    assert np.isclose(grey.mean(), CONVENTIONS["cifar10-grey-s4"].mean[0], atol=0.01)
    assert np.isclose(grey.std(), CONVENTIONS["cifar10-grey-s4"].std[0], atol=0.006)


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100", "mnist", "fashion-mnist", "kmnist", "a/folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_set_has_a_default(data, channels):
    assert resolve(default_name(data, channels), channels)


def test_defaults():
    assert default_name("cifar10", 3) == "cifar10" and default_name("cifar10", 1) == "cifar10-grey-s4"
    assert default_name("a/folder", 3) == "imagenet" and default_name("digits", 1) == "half"


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"normalization: 'cifar-10', expected one of .*; did you mean cifar10\?"):
        resolve("cifar-10", 3)
    with pytest.raises(ValueError, match="is for 3 channels and the images have 1; name another one, or set color"):
        resolve("imagenet", 1)
    with pytest.raises(ValueError, match="expected as many of each, every std positive"):
        Normalization((0.5,), (0.0,))
    with pytest.raises(ValueError, match="expected as many of each"):
        Normalization((0.5,), (0.5, 0.5))
