"""The figures of docs/mixers.md are those of the code."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from mambakit import models
from mambakit.backbone import MixerName, mixer_factory

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "mixers.md").read_text(encoding="utf-8")
ROWS = {name: row.split(" | ") for name, row in re.findall(r"^\| `([a-z0-9]+)` \| (.*) \|$", PAGE, re.MULTILINE)}


def test_every_mixer_has_a_row():
    assert set(ROWS) == set(get_args(MixerName))


@pytest.mark.parametrize("name", ROWS)
def test_sizes(name):
    """Parameters and state of one layer, d_model 768, default options."""
    with torch.device("meta"):
        mixer = mixer_factory(name)(768)
        state = sum(tensor.numel() for tensor in mixer.init_state(1).tensors()) if mixer.causal else None
    parameters, printed = ROWS[name][3], ROWS[name][5]
    assert int(parameters.replace(",", "")) == sum(parameter.numel() for parameter in mixer.parameters())
    if state is None:
        assert printed == "none"
    elif name == "attention":
        assert printed == "grows" and state == 0
    else:
        assert int(printed.replace(",", "")) == state


def test_presets():
    (table,) = re.findall(r"\| Presets \|.*?\n\n", PAGE, re.DOTALL)
    rows = [row.split("|")[1:3] for row in table.strip().splitlines()[2:]]
    printed = {}
    for names, numbers in rows:
        counts = [int(number.replace(",", "")) for number in numbers.split(";")]
        printed |= dict(zip(re.findall(r"`(\w+)`", names), counts, strict=True))
    assert set(printed) == set(get_args(models.PresetName))
    with torch.device("meta"):
        for name, count in printed.items():
            assert sum(parameter.numel() for parameter in models.preset(name)().parameters()) == count, name
