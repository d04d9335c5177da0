"""Sources of images: class folders, torchvision's sets, digits; what they refuse and how they say it."""

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from mambakit.datamodules.vision.sources import ImageError, open_part, open_parts, prepare


def same_images(one, other) -> bool:
    pairs = ((one.image(index, 3), other.image(index, 3)) for index in range(len(one)))
    return len(one) == len(other) and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_class_folders_are_torchvisions(tree, pack, kind):
    wanted = torchvision.datasets.ImageFolder(str(tree / "train"))
    found = open_parts(str(tree if kind == "folder" else pack(tree, kind)))["train"]
    assert found.classes == wanted.classes == ["10", "9", "cat", "dog"], "sorted as strings"
    assert found.labels.tolist() == wanted.targets and found.channels == 3
    for index, (image, _) in enumerate(wanted):
        assert np.array_equal(np.asarray(found.image(index, 3)), np.asarray(image))
    names = [found.name(index) for index in range(len(found))]
    assert [Path(name).parts[-2:] for name in names] == [Path(path).parts[-2:] for path, _ in wanted.samples]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_parts(tree, pack, kind):
    (tree / "val").rename(tree / "valid")
    path = tree if kind == "folder" else pack(tree, kind)
    parts = open_parts(path.name, path.parent)
    assert {part: len(source) for part, source in parts.items()} == {"train": 26, "validation": 8, "test": 8}
    assert same_images(open_part("test", str(path)), parts["test"])
    assert same_images(open_part("test", str(path / "valid")), parts["validation"])


def test_class_folders_without_parts(tree):
    assert list(open_parts(str(tree / "train"))) == ["train"]
    assert len(open_parts("train", tree)["train"]) == len(open_part("validation", "train", tree)) == 26


def test_an_archive_of_one_folder(plant, pack):
    path = pack(plant({"all/of/it/a": 2, "all/of/it/b": 1}), "zip")
    assert open_parts(str(path))["train"].classes == ["a", "b"]
    assert open_part("test", str(path / "all/of")).classes == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"images.zip holds no folder all/off; name one that it has"):
        open_parts(str(path / "all/off"))


def test_a_class_named_train(plant):
    assert open_parts(str(plant({"train": 2, "plane": 2})))["train"].classes == ["plane", "train"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": 2, "test": 2}, r"images lie directly in .*images/test?.*; give each class a folder of its own"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1}, "images holds both val and valid; keep one of them"),
        ({"a": 1, ".": 1}, r"images/0.png lies in no class folder; give each class a folder"),
        ({"a": 1, "b": 0}, r"the class folder .*images/b holds no image; fill it or remove it"),
        ({}, "images holds no class folder"),
    ],
)
def test_folders_that_cannot_be_right(plant, tmp_path, counts, message):
    (tmp_path / "images").mkdir()
    names = [name for name in counts if name != "."]
    plant({name: counts[name] for name in names})
    if "." in counts:
        (tmp_path / "images/0.png").write_bytes((tmp_path / "images/a/0.png").read_bytes())
    with pytest.raises(ValueError, match=message):
        open_parts(str(tmp_path / "images"))


def test_nothing_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"there is no {tmp_path}/cifar; give a folder, a zip .*digits, cifar10"
    ):
        open_parts("cifar", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data.download fetches torchvision's sets only"):
        open_parts("cifar", tmp_path, download=True)


def test_digits():
    digits = open_parts("digits")["train"]
    assert len(digits) == 1797 and digits.channels == 1 and digits.classes == list("0123456789")
    stored = load_digits()
    assert digits.labels.tolist() == stored.target.tolist()
    assert np.allclose(np.asarray(digits.image(5, 1)) / 255 * 16, stored.images[5], atol=0.04)
    assert np.asarray(digits.image(5, 3)).shape == (8, 8, 3)
    assert digits.name(5) == "digits[5]"


def idx(array: np.ndarray) -> bytes:
    """MNIST's file format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("data", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_mnist_and_its_kin(tmp_path, data, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    for name, part in (("train", images), ("t10k", images[:4])):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(part))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(len(part))))
    parts = open_parts(data, tmp_path)
    assert {part: len(source) for part, source in parts.items()} == {"train": 6, "test": 4}
    assert np.array_equal(np.asarray(parts["test"].image(3, 1)), images[3]) and len(parts["train"].classes) == 10
    assert parts["train"].labels.tolist() == list(range(6)) and parts["test"].name(3) == f"{data}:test[3]"


def test_cifar10(tmp_path, monkeypatch):
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in ("one", "two"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 1, 0, 2]}))
    (folder / "meta").write_bytes(pickle.dumps({"label_names": list("abcd")}))
    monkeypatch.setattr(kind, "train_list", [["one", None]])
    monkeypatch.setattr(kind, "test_list", [["two", None]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    parts = open_parts("cifar10", tmp_path)
    assert parts["train"].labels.tolist() == [3, 1, 0, 2] and parts["test"].classes == list("abcd")
    assert np.array_equal(np.asarray(parts["train"].image(1, 3)), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(("data", "place"), [("cifar10", "cifar-10-batches-py"), ("mnist", "MNIST/raw")])
def test_a_set_that_is_not_there(tmp_path, data, place):
    wanted = rf"no whole {data} in {tmp_path}/{place} .*--data.download true.*data.root"
    with pytest.raises(FileNotFoundError, match=wanted):
        open_parts(data, tmp_path)


def test_what_is_prepared(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "download", lambda self: asked.append(self.root))
    prepare("cifar100", tmp_path, download=False)
    prepare("digits", tmp_path, download=True)
    prepare("nowhere", tmp_path, download=True)
    assert asked == []
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        prepare("cifar100", tmp_path, download=True)
    assert asked == [tmp_path]
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_img_train.tar"):
        prepare("imagenet", tmp_path, download=False)


def test_imagenet_is_unpacked_by_torchvision(plant, tmp_path, monkeypatch):
    plant({"val/n01440764": 2}, name="root")

    def unpack(folder, part):
        assert part == "train"
        plant({"train/n01440764": 3}, name="root")

    monkeypatch.setattr(torchvision.datasets, "ImageNet", unpack)
    parts = open_parts("imagenet", tmp_path / "root")
    assert {part: len(source) for part, source in parts.items()} == {"train": 3, "validation": 2}


def test_imagenet(plant, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"neither the folder train nor the archives .*ILSVRC2012_img_train.tar"
    ):
        open_parts("imagenet", tmp_path)
    root = plant({f"{part}/{name}": 2 for part in ("train", "val") for name in ("n01440764", "n01443537")})
    parts = open_parts("imagenet", root)
    assert list(parts) == ["train", "validation"] and parts["validation"].classes == ["n01440764", "n01443537"]


def encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(NOISE, "JPEG")[:-400], "truncated"),
        (encoded(NOISE, "PNG")[:-400], "truncated"),
        (encoded(NOISE, "WEBP")[:-400], ""),
        (encoded(NOISE, "TIFF")[:-400], "truncated"),
        (b"<html>404</html>", "no image of a kind Pillow knows"),
        (b"", "no image of a kind Pillow knows"),
    ],
    ids=["jpeg", "png", "webp", "tiff", "html", "empty"],
)
def test_a_broken_image_is_named(plant, pack, content, reason, kind):
    root = plant({"a": 2})
    (root / "a/1.png").write_bytes(content)
    path = root if kind == "folder" else pack(root, kind)
    source = open_parts(str(path))["train"]
    assert source.image(0, 3)
    message = rf"image {path}/a/1.png cannot be decoded \(.*{reason}.*\); mend or remove it, or set corrupt to skip"
    with pytest.raises(ImageError, match=message):
        source.image(1, 3)


def test_sixteen_bits_are_refused(plant):
    root = plant({"a": 1})
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(root / "a/0.png")
    with pytest.raises(ImageError, match=r"a/0.png has more than 8 bits a sample; convert it to 8 bits"):
        open_parts(str(root))["train"].image(0, 3)


def test_grey_is_the_luma_of_bt601(plant):
    source = open_parts(str(plant({"a": 1})))["train"]
    color, grey = (np.asarray(source.image(0, channels), dtype=float) for channels in (3, 1))
    assert np.abs(grey - color @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_image_comes_as_rgb(plant, mode):
    root = plant({"a": 1})
    (root / "a/0.png").write_bytes(encoded(NOISE.convert(mode), "TIFF"))
    source = open_parts(str(root))["train"]
    assert source.image(0, 3).mode == "RGB" and source.image(0, 1).mode == "L"


def test_a_workers_error_is_one_sentence():
    told = (
        "Caught ImageError in DataLoader worker process 0.\nOriginal Traceback:\n  File\nx.ImageError: image y is bad\n"
    )
    assert str(ImageError(told)) == str(ImageError("image y is bad")) == "image y is bad"
