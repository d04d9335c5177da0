"""Small trees of images, and archives of them."""

import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Class folders of a data set with all three parts, and the images in each.
COUNTS = {"cat": 10, "dog": 6, "10": 5, "9": 5}


def draw(number: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    """An image that no other number has: its first pixel is the number, the rest noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = number
    return Image.fromarray(pixels)


@pytest.fixture
def plant(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes class folders of PNG images, each with a number of its own."""

    def make(counts: dict[str, int], name: str = "images", size: tuple[int, int] = (8, 6)) -> Path:
        number = 0
        for folder, count in counts.items():
            (tmp_path / name / folder).mkdir(parents=True)
            for index in range(count):
                draw(number, size).save(tmp_path / name / folder / f"{index}.png")
                number += 1
        return tmp_path / name

    return make


@pytest.fixture
def tree(plant: Callable[..., Path]) -> Path:
    """A folder ``images`` with train, val and test."""
    rest = {f"{part}/{name}": 2 for part in ("val", "test") for name in COUNTS}
    return plant({f"train/{name}": count for name, count in COUNTS.items()} | rest)


@pytest.fixture
def pack() -> Callable[[Path, str], Path]:
    """A function that packs what is in a folder: ``zip``, ``tar``, ``gztar``, or ``deflated`` (a zip that packs)."""

    def make(folder: Path, kind: str) -> Path:
        if kind == "tar":  # members in an order that is nobody's
            with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
                for file in sorted(folder.rglob("*"), key=lambda path: str(path)[::-1]):
                    archive.add(file, file.relative_to(folder).as_posix(), recursive=False)
            return folder.with_suffix(".tar")
        if kind in ("zip", "deflated"):
            method = zipfile.ZIP_STORED if kind == "zip" else zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(folder.with_suffix(".zip"), "w", method) as archive:
                for file in sorted(folder.rglob("*"), key=lambda path: str(path)[::-1]):
                    archive.write(file, file.relative_to(folder).as_posix())
            return folder.with_suffix(".zip")
        return Path(shutil.make_archive(str(folder), kind, folder))

    return make
