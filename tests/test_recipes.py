"""Every packaged recipe: its header tells what it must, its options exist, and it trains two steps on tiny data."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mambakit.cli import main
from mambakit.recipes import catalogue

TINY = {
    "text": [
        *("--model.backbone.d_model", "16", "--model.backbone.n_layers", "1"),
        *("--data.root", ".", "--data.context", "16", "--data.batch_size", "2", "--data.num_workers", "0"),
        *("--data.validation_batch_size", "2"),
    ],
    "vision": [
        *("--data.data", "digits", "--data.test_data", "null", "--data.test_fraction", "0.1", "--data.color", "rgb"),
        *("--data.image_size", "8", "--data.batch_size", "2", "--data.validation_batch_size", "2"),
        *("--data.num_workers", "0"),
    ],
    "audio": [
        *("--data.root", ".", "--data.batch_size", "2", "--data.validation_batch_size", "2"),
        *("--data.test_fraction", "0"),
        *("--data.num_workers", "0", "--model.backbone.d_model", "8", "--model.backbone.n_layers", "1"),
    ],
    "genomics": [
        *("--data.data", "motifs", "--data.motifs", '{"train_sequences": 8, "validation_sequences": 4, "length": 40}'),
        *("--data.intervals", "null", "--data.reference", "null", "--data.split", "random"),
        *(f"--data.{part}_chromosomes=null" for part in ("train", "validation", "test")),
        *("--data.test_fraction", "0", "--data.too_long", "crop", "--data.samples_per_epoch", "8"),
        *("--data.length", "32", "--data.validation_length", "32"),
        *("--data.batch_size", "2", "--data.validation_batch_size", "2", "--data.num_workers", "0"),
        *("--model.backbone.d_model", "8", "--model.backbone.n_layers", "1"),
    ],
    "synthetic": [
        *("--data.problem.length", "40", "--data.train=null", "--data.validation=null", "--data.test=null"),
        *("--data.batch_size", "2", "--data.evaluation_examples", "2", "--data.num_workers", "0"),
        *("--model.backbone.d_model", "32", "--model.backbone.n_layers", "1"),
    ],
}
# A task of vision makes its model of a Backbone, or by timm's name.
TINY_BACKBONE = ["--model.backbone.d_model", "16", "--model.backbone.n_layers", "1"]
TINY_TIMM = ["--model.timm_options", '{"img_size": 8, "patch_size": 4, "depth": 1}', "--model.weights", "null"]
TINY_STEM = ["--model.backbone.embedding.d_model", "8"]
STEPS = [
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "2"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"),
]
TEXT = "ROMEO: But, soft! what light through yonder window breaks? " * 20


def test_names_are_paths():
    assert {"text/quickstart", "text/shakespeare", "vision/quickstart"} <= set(catalogue.names())
    for name in catalogue.names():
        assert catalogue.resolve(name) == catalogue.find(name)
        assert catalogue.name_of(catalogue.find(name)) == name


def test_a_file_comes_before_a_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text", "quickstart").write_text("mine")
    assert catalogue.resolve("text/quickstart") == Path("text/quickstart")


@pytest.mark.parametrize("name", catalogue.names())
def test_header_tells_what_to_expect(name):
    header = catalogue.header(name)
    assert header[0].endswith("."), "the first line is the sentence that the list shows"
    text = "\n".join(header)
    for part in ("What:", "Data:", "Hardware:", f"Command:   mambakit fit --config {name}", "Expected:", "Published:"):
        assert re.search(rf"^{re.escape(part)}", text, re.MULTILINE), part


def spoken_digits(rate: int = 200, seconds: float = 0.5) -> None:
    """Noise in files named as those of the Free Spoken Digit Dataset: three of each digit for training, one for each
    other part, at so low a rate that even what is drawn at the end of a fit is short."""
    Path("fsdd").mkdir()
    for digit in range(10):
        for index in (0, 5, 10, 11, 12):
            noise = np.random.default_rng((digit, index)).uniform(-0.5, 0.5, int(rate * seconds) + 7 * digit)
            soundfile.write(Path("fsdd", f"{digit}_nobody_{index}.wav"), noise, rate)


@pytest.mark.parametrize("name", catalogue.names())
def test_two_steps_on_tiny_data(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny, recipe = TINY[name.split("/")[0]], catalogue.find(name).read_text()
    if name.startswith("vision/"):
        by_name = re.search(r"^    backbone: \w", recipe, re.MULTILINE)
        tiny = [*tiny, *(TINY_TIMM if by_name else TINY_BACKBONE)]
    if name.startswith("audio/"):
        if re.search(r"^    window:", recipe, re.MULTILINE):
            tiny = [*tiny, "--data.window", "64"]
        if not re.search(r"^    data: dtmf$", recipe, re.MULTILINE):
            spoken_digits()
            tiny = [*tiny, "--data.data", "fsdd"]
    if re.search(r"mambakit\.embeddings\.(Waveform|Kmer|Motif)Embedding", recipe):
        tiny = [*tiny, *TINY_STEM]
    if "synthetic.Delay" in recipe:
        tiny = [*tiny, "--data.problem.lag", "10"]
    for file in re.findall(r"^\s+data: (\S+\.txt)$", recipe, re.MULTILINE):
        Path(file).write_text(TEXT)
    assert main(["fit", "--config", name, *tiny, *STEPS]) == 0, capsys.readouterr().err
    assert Path("runs", name, "version_0", "checkpoints", "last.ckpt").is_file()
