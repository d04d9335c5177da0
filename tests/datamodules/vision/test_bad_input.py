"""Broken images, parts that do not fit, options out of range: each named in one sentence."""

import warnings

import pytest
import torch
from PIL import Image

from mambakit.datamodules.vision import Augment, ImageError, VisionDataModule


def module(data="digits", **options) -> VisionDataModule:
    return VisionDataModule(str(data), **{"batch_size": 4, **options})


def indices(loader) -> list[int]:
    return torch.cat([batch["index"] for batch in loader]).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_with_one_sentence(tree, workers):
    (tree / "train/cat/3.png").write_bytes(b"broken")
    loader = module(tree, num_workers=workers, batch_size=26).train_dataloader()
    with pytest.raises(ImageError, match=r"^image \S*train/cat/3.png cannot be decoded \([^\n]*\); mend or [^\n]*$"):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_on_request_and_counted(tree, workers):
    for name in ("train/cat/3.png", "train/dog/0.png", "test/9/1.png"):
        (tree / name).write_bytes(b"broken")
    data = module(tree, corrupt="skip", num_workers=workers, batch_size=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data.setup()
    assert "skipped 3 of 42 images that cannot be decoded: " + data.skipped[0] in str(told[0].message)
    assert "images train 24, validation 8, test 7; 4 classes; inputs (3, 6, 8); 3 skipped" in data.describe()
    assert len(data.skipped) == 3 and data.skipped[2].endswith("test/9/1.png")
    names = {data.image_name("train", index) for index in indices(data.train_dataloader())}
    assert len(names) == 24 and not names & set(data.skipped)


def test_a_class_of_broken_images_only(tree):
    for name in ("0", "1"):
        (tree / f"test/dog/{name}.png").write_bytes(b"")
    for index in range(6):
        (tree / f"train/dog/{index}.png").write_bytes(b"")
    data = module(tree, corrupt="skip")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"class dog has 0 image\(s\)"):
            data.setup()
        assert len(data.skipped) == 8, "counted anew"


def test_sizes_that_differ(tree):
    Image.new("RGB", (5, 9)).save(tree / "train/dog/0.png")
    message = r"image \S*train/dog/0.png is 5 x 9, and the first of the training images 8 x 6; set image_size"
    with pytest.raises(ImageError, match=message):
        list(module(tree).train_dataloader())
    assert len(list(module(tree, image_size=6).train_dataloader())) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0, expected at least 1"),
        ({"image_size": 0}, "image_size: 0, expected at least 1"),
        ({"view": "patches"}, "view: 'patches', expected image or pixels"),
        ({"color": "gray"}, "color: 'gray', expected native or rgb or grey"),
        ({"interpolation": "cubic"}, "interpolation: 'cubic', expected nearest or bilinear or bicubic"),
        ({"crop_pct": 1.5}, "crop_pct: 1.5, expected above 0 and at most 1"),
        ({"validation_fraction": 0.0}, "validation_fraction: 0.0, expected between 0 and 1"),
        ({"test_fraction": 1.0}, "test_fraction: 1.0, expected at least 0 and under 1"),
        ({"test_fraction": 0.1, "test_data": "digits"}, "test_fraction: given together with test_data"),
        ({"pixel_order": "random"}, "pixel_order, pixel_values: of no effect in the view 'image'"),
        ({"normalization": "imagnet"}, "normalization: 'imagnet', .* did you mean imagenet"),
        (
            {"view": "pixels", "pixel_values": "token", "normalization": "half"},
            "pixel_values: 'token' keeps the 8 bits",
        ),
        ({"augment": Augment(mixup=1.0), "batch_size": 3}, "batch_size: 3, but mixup and cutmix pair images"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        VisionDataModule(**options)


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({}, "test", "test: digits has no test part; set test_fraction or test_data"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, "fit", "together 1.1, expected under 1"),
        ({"test_data": "digits"}, "fit", r"digits\[0\] is in both the train and the test part"),
        ({"data": "nowhere"}, "fit", "there is no .*nowhere; give a folder"),
        ({"normalization": "imagenet"}, "loader", "is for 3 channels and the images have 1"),
        ({"batch_size": 5000}, "loader", r"batch_size: 5000, but an epoch has only 1618 image\(s\) for 1 process"),
    ],
)
def test_what_the_data_refuses(options, stage, message):
    data = VisionDataModule(**options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.train_dataloader() if stage == "loader" else data.setup(stage)


def test_a_test_fraction_beside_a_test_part(tree):
    with pytest.raises(ValueError, match="has a test part of its own; leave test_fraction out"):
        module(tree, test_fraction=0.1).setup()


def test_classes_of_validation_must_be_those_of_train(tree):
    (tree / "val/dog").rename(tree / "val/wolf")
    with pytest.raises(ValueError, match="the class wolf is in the validation part and not in the train part"):
        module(tree).setup("fit")
