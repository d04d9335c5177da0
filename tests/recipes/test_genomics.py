"""The commands in the headers of the genomics recipes, on tiny files named as those that they are for."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from mambakit.cli import main
from mambakit.datamodules.genomics import GenomicsDataModule
from mambakit.mixers import Hyena
from mambakit.recipes import catalogue

STEPS = [
    *("--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"),
    *("--trainer.num_sanity_val_steps", "0", "--data.num_workers", "0", "--data.batch_size", "2"),
]
SMALL = ["--model.backbone.d_model", "8", "--model.backbone.n_layers", "1"]
PROMOTERS = re.findall(r"--data\.data '(\{[^']+\})'", catalogue.find("genomics/promoters_eukaryotes").read_text())


NAMES = [*map(str, range(1, 23)), "X", "Y", "Z", "W"]


def fasta(path: str, records: int, length: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    letters = ["".join(draw.choice(list("ACGT"), length)) for _ in range(records)]
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(f">chr{name}\n{one}\n" for name, one in zip(NAMES, letters, strict=False)))


def test_promoters_of_eukaryotes_are_three_tasks_in_which_promoters_are_class_1():
    assert len(PROMOTERS) == 2
    names = ("genomics/promoters", "genomics/promoters_eukaryotes")
    recipes = [yaml.safe_load(catalogue.find(name).read_text())["data"]["init_args"]["data"] for name in names]
    for data in (*recipes, *map(yaml.safe_load, PROMOTERS)):
        assert sorted(data) == ["background", "promoter"]  # classes are sorted, and the second is what metrics are of
    assert len({data["promoter"] for data in (*recipes, *map(yaml.safe_load, PROMOTERS))}) == 4


@pytest.mark.parametrize("name", ["promoters", "promoters_eukaryotes"])
@pytest.mark.parametrize("split", ["groups", "random"])
def test_promoters_runs_and_is_tested_on_files_of_these_names(name, split, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(catalogue.find(f"genomics/{name}").read_text())["data"]["init_args"]
    for seed, path in enumerate(recipe["data"].values()):
        fasta(f"data/{path}", 24, 60, seed)
    command = ["--config", f"genomics/{name}", "--data.split", split]
    small = ["--model.backbone.embedding.known", "[3, 9]"] if name == "promoters" else []
    assert main(["fit", *command, *STEPS, *small]) == 0, capsys.readouterr().err
    assert "validation mcc: " in capsys.readouterr().out
    checkpoint = f"runs/genomics/{name}/version_0/checkpoints/last.ckpt"
    assert main(["test", *command, *STEPS, *small, "--ckpt_path", checkpoint]) == 0, capsys.readouterr().err
    assert "test/mcc" in capsys.readouterr().out


HYENA = re.compile(r"--model\.backbone\.mixer Hyena --model\.backbone\.mixer\.l_max (\d+)")


@pytest.mark.parametrize("hyena", [False, True], ids=["mamba1", "hyena"])
def test_the_warm_up_of_the_length_runs_without_intervals_as_its_header_says(hyena, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fasta("data/mine.fa", 4, 2000, 0)
    header = _one_line("genomics/hg38_length_warmup")
    more = re.search(r"--data\.data FILE\.fa.*?validation_chromosomes '\[1\]'", header)
    words = re.findall(r"'[^']*'|\S+", more[0].replace("FILE.fa", "mine.fa").replace("[2, 4, X]", "[2, 4]"))
    lengths = '[{"class_path": "mambakit.callbacks.LengthWarmup", "init_args": {"lengths": [16, 64], "steps": 1}}]'
    options = [
        *("--data.length", "16", "--data.validation_length", "64", "--data.max_length", "64"),
        *("--trainer.callbacks", lengths, "--trainer.limit_val_batches", "1"),
    ]
    steps = [*STEPS, "--trainer.max_epochs", "-1", "--trainer.max_steps", "2"]
    arguments = [word.strip("'") for word in words] + (HYENA.search(header)[0].split() if hyena else [])
    status = main(["fit", "--config", "genomics/hg38_length_warmup", *arguments, *options, *steps, *SMALL])
    assert status == 0, capsys.readouterr().err
    assert "length 64: 1 windows a batch" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hg38_pretrain", "hg38_length_warmup"])
def test_hyena_hears_as_far_back_as_the_longest_window(name):
    """What the headers give it; and without, the windows of hg38_pretrain are no longer than its filters."""
    recipe, header = yaml.safe_load(catalogue.find(f"genomics/{name}").read_text()), _one_line(f"genomics/{name}")
    if name == "hg38_pretrain":
        longest = int(re.search(r"--data\.length (\d+)", header)[1])
        assert recipe["data"]["init_args"]["length"] <= Hyena(4).l_max
    else:
        longest = recipe["data"]["init_args"]["max_length"]
        assert longest == recipe["trainer"]["callbacks"][0]["init_args"]["lengths"][-1]
    assert int(HYENA.search(header)[1]) == longest


def test_benchmarks_takes_caduceus_ph_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {name: f"{name}.fa" for name in ("a", "b", "c")}
    for seed, path in enumerate(files.values()):
        fasta(f"data/{path}", 20, 40, seed)
    options = ["--data.data", str(files).replace("'", '"'), "--data.reference", "null"]
    more = re.search(r"--model\.backbone\.rcps false \S+ true --model\.conjoin true", _one_line("genomics/benchmarks"))
    status = main(["fit", "--config", "genomics/benchmarks", *options, *more[0].split(), *STEPS, *SMALL])
    assert status == 0, capsys.readouterr().err
    assert "validation mcc: " in capsys.readouterr().out


def test_species_are_classes_and_chromosomes_hold_the_parts_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(catalogue.find("genomics/species").read_text())["data"]["init_args"]
    for seed, name in enumerate(recipe["data"].values()):
        fasta(f"data/{name.removesuffix('.gz')}", 24, 60, seed)
    files = {species: name.removesuffix(".gz") for species, name in recipe["data"].items()}
    options = ["--data.data", str(files).replace("'", '"'), "--data.length", "32", "--data.samples_per_epoch", "10"]
    options += ["--data.evaluation_windows", "10", "--data.validation_batch_size", "5"]
    status = main(["fit", "--config", "genomics/species", *options, *STEPS, *SMALL])
    assert status == 0, capsys.readouterr().err
    held = {part: recipe[f"{part}_chromosomes"] for part in ("train", "validation", "test")}
    assert len({str(name) for names in held.values() for name in names}) == sum(map(len, held.values())) == 24
    data = GenomicsDataModule(**{**recipe, "data": files, "length": 32, "num_workers": 0})
    assert data.classes == ["hippo", "human", "lemur", "mouse", "pig"]


def _one_line(name: str) -> str:
    return " ".join(line.removeprefix("#").strip() for line in catalogue.find(name).read_text().splitlines())
