"""``mambakit inspect`` from end to end, in process, on a model of toy size."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mambakit.cli import main
from mambakit.datamodules.vision import VisionDataModule
from mambakit.inspect import receptive_field, step_sizes
from mambakit.tasks import Classify

RECIPE = """
model:
  class_path: mambakit.tasks.Classify
  init_args:
    backbone: vim_tiny_patch16_224
    timm_options: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 6}
data:
  class_path: mambakit.datamodules.vision.VisionDataModule
  init_args: {data: digits, batch_size: 4}
trainer: {accelerator: cpu}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)
    return tmp_path


def trained() -> Classify:
    torch.manual_seed(1)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 6}
    return Classify("vim_tiny_patch16_224", num_classes=10, in_chans=1, timm_options=options)


def test_it_writes_what_the_functions_find(recipe, capsys):
    task = trained()
    torch.save({"state_dict": task.state_dict()}, "last.ckpt")
    arguments = ["--config", "tiny.yaml", "--ckpt_path", "last.ckpt", "--out", "seen", "--count", "6", "--image", "1"]
    assert main(["inspect", *arguments, "--device", "cpu"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert [Path(line) for line in written[-3:]] == [
        Path("seen", name) for name in ("receptive_field.png", "step_sizes.png", "arrays.npz")
    ]
    assert all(Path(line).is_file() for line in written[-3:])

    data = VisionDataModule(data="digits", batch_size=4)
    images = torch.cat([batch["inputs"] for batch in data.val_dataloader()])[:6]
    arrays = np.load("seen/arrays.npz")
    expected = receptive_field(task.model, images).contribution.numpy()
    np.testing.assert_allclose(arrays["receptive_field/trained"], expected, rtol=1e-4)
    assert not np.allclose(arrays["receptive_field/at the start"], expected, rtol=1e-2)
    np.testing.assert_array_equal(arrays["image"], images[1])
    deltas = {name for name in arrays.files if name.startswith("delta/")}
    assert deltas == {f"delta/layers.{i}.mixer/{way}" for i in (0, 2, 3, 5) for way in ("forwards", "backwards")}
    (last,) = step_sizes(task.model, images[1:2], layers=[-1])
    found = arrays["delta/layers.5.mixer/backwards"]
    np.testing.assert_allclose(found, last.directions["backwards"][0], rtol=1e-4)
    assert found.shape == (2, 2, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "3", "--count", "3"], "--image 3: expected 0 to 2"),
        (["--layers", "6"], "there is no layer 6, expected -6 to 5"),
        (["--ckpt_path", "none.ckpt"], "there is no file none.ckpt"),
        (["--data.batch_sise", "3"], "batch_sise"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(recipe, capsys, arguments, message):
    assert main(["inspect", "--config", "tiny.yaml", "--count", "4", "--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mambakit: ") and message in error


def test_a_checkpoint_of_another_model_is_named(recipe, capsys):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, "other.ckpt")
    arguments = ["--config", "tiny.yaml", "--count", "1", "--device", "cpu", "--ckpt_path", "other.ckpt"]
    assert main(["inspect", *arguments]) == 1
    assert "other.ckpt is of another model" in capsys.readouterr().err


def test_a_recipe_of_text_has_no_images(recipe, capsys):
    arguments = ["--config", "text/quickstart", "--model.backbone.d_model", "16", "--model.backbone.n_layers", "1"]
    assert main(["inspect", *arguments, "--device", "cpu"]) == 1
    assert "hold no images under 'inputs'" in capsys.readouterr().err
