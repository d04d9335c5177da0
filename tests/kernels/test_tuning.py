"""The rule decides unless autotune() is asked for; what it finds is kept, and kept apart from other kernels' finds."""

import json
import time
import timeit
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mambakit.kernels import autotune, tuning
from mambakit.kernels.tuning import choose_config

TritonError = pytest.importorskip("triton.errors").TritonError


class Config(NamedTuple):
    block: int
    num_warps: int


RULE, SLOW, FAST = Config(64, 4), Config(32, 4), Config(128, 8)
KEY = ("scan_forward", 8, 2048, "bfloat16", True, None)
TIMES = {RULE: 1.0, SLOW: 2.0, FAST: 0.5}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    """The configurations that were timed, on a GPU whose times are made up."""
    calls: list[Config] = []

    def milliseconds(run, config):
        run(config)
        calls.append(config)
        return TIMES[config]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_may_time", lambda: True)
    monkeypatch.setattr(tuning, "_winners", {})
    monkeypatch.setattr(tuning, "cache_file", lambda device: tmp_path / "deep" / "gpu.json")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return calls


def nothing(config: Config) -> None:
    """A launch."""


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_winners", {})


def test_the_rule_decides_by_default_and_nothing_is_timed(timed):
    assert choose_config(KEY, (RULE, FAST), nothing) is RULE
    with autotune():
        assert choose_config(KEY, (RULE, FAST), nothing) is FAST
    assert choose_config(KEY, (RULE, FAST), nothing) is RULE
    assert timed == [RULE, FAST]


def test_each_key_is_timed_once(timed):
    with autotune():
        for _ in range(3):
            assert choose_config(KEY, (RULE, SLOW, FAST), nothing) is FAST
            assert choose_config((*KEY, 2), (RULE, SLOW), nothing) is RULE
    assert timed == [RULE, SLOW, FAST, RULE, SLOW]


def test_a_later_process_reads_the_file(timed, monkeypatch):
    with autotune():
        choose_config(KEY, (RULE, FAST), nothing)
        forget(monkeypatch)
        assert choose_config(KEY, (RULE, FAST), nothing) == FAST
        assert timed == [RULE, FAST]
        # A winner that is no candidate any more is not taken.
        assert choose_config(KEY, (RULE, SLOW), nothing) is RULE
    assert timed == [RULE, FAST, RULE, SLOW]


def test_what_other_processes_wrote_stays(timed, tmp_path, monkeypatch):
    with autotune():
        choose_config(KEY, (RULE, FAST), nothing)
        (tmp_path / "deep" / "gpu.json").write_text('{"[\\"theirs\\"]": [1, 2]}')
        choose_config((*KEY, 2), (RULE, FAST), nothing)
    assert json.loads((tmp_path / "deep" / "gpu.json").read_text()) == {
        '["theirs"]': [1, 2],
        json.dumps(KEY): list(FAST),
        json.dumps((*KEY, 2)): list(FAST),
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a"'])
def test_a_broken_file_is_written_anew(timed, tmp_path, content):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "gpu.json").write_text(content)
    with autotune():
        assert choose_config(KEY, (RULE, FAST), nothing) is FAST
    assert json.loads((tmp_path / "deep" / "gpu.json").read_text()) == {json.dumps(KEY): list(FAST)}


def test_a_cache_that_cannot_be_written_warns_and_serves_this_process(timed, tmp_path):
    (tmp_path / "deep").write_text("a file where a folder should be")
    with autotune(), pytest.warns(UserWarning, match=r"gpu\.json could not be written"):
        assert choose_config(KEY, (RULE, FAST), nothing) is FAST
        assert choose_config(KEY, (RULE, FAST), nothing) is FAST
    assert timed == [RULE, FAST]


def test_noise_does_not_beat_the_rule(timed, monkeypatch):
    monkeypatch.setitem(TIMES, FAST, 1 - tuning.MARGIN / 2)
    with autotune():
        assert choose_config(KEY, (RULE, FAST), nothing) is RULE


def test_a_candidate_that_cannot_be_launched_is_passed_over_and_the_rule_is_not(timed):
    def launch(config: Config) -> None:
        if config in broken:
            raise TritonError("out of shared memory")

    broken = {FAST}
    with autotune():
        assert choose_config(KEY, (RULE, FAST, SLOW), launch) is RULE
        broken = {RULE}
        with pytest.raises(TritonError):
            choose_config((*KEY, 2), (RULE, FAST), launch)


def test_at_most_four_candidates_within_the_budget(timed, monkeypatch):
    many = tuple(Config(block, 1) for block in range(6))
    monkeypatch.setitem(TIMES, RULE, 1.0)
    for config in many:
        monkeypatch.setitem(TIMES, config, 1.0)
    with autotune():
        choose_config(KEY, many, nothing)
        assert timed == list(many[:4])
        timed.clear()
        # Each takes 40 % of the budget: the third, which would end beyond it, is not begun.
        monkeypatch.setattr(tuning, "BUDGET", 0.1)
        choose_config((*KEY, 2), many, lambda config: time.sleep(0.04))
    assert timed == list(many[:2])


def test_nothing_is_timed_where_the_gpu_cannot_be_waited_for(timed, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with autotune():
        assert choose_config(KEY, (RULE, FAST), nothing) is RULE
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert tuning._may_time()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose_config(KEY, (RULE, FAST), nothing) is RULE


def test_the_file_is_named_after_gpu_triton_and_source(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H{device}00 NVL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning.sys, "platform", "linux")
    source = tmp_path / "kernels"
    source.mkdir()
    (source / "a.py").write_text("x = 1")
    monkeypatch.setattr(tuning, "__file__", str(source / "tuning.py"))
    names = []
    for device, text in ((1, "x = 1"), (2, "x = 1"), (1, "x = 2")):
        (source / "a.py").write_text(text)
        tuning.cache_file.cache_clear()
        names.append(tuning.cache_file(device))
    tuning.cache_file.cache_clear()
    assert len(set(names)) == 3
    assert names[0].parent == tmp_path / "mambakit" / "kernels"
    assert names[0].name.startswith("NVIDIA-H100-NVL-triton-")


@pytest.mark.parametrize(
    ("platform", "variable", "ending"),
    [
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", "", "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ],
)
def test_the_cache_lies_where_the_platform_wants_it(monkeypatch, tmp_path, platform, variable, ending):
    monkeypatch.setattr(tuning.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv(variable, raising=False) if variable else None
    assert tuning.cache_directory() == tmp_path / ending / "mambakit" / "kernels"
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
        assert tuning.cache_directory() == tmp_path / "elsewhere" / "mambakit" / "kernels"


def test_the_rule_costs_next_to_nothing():
    candidates = (RULE, FAST)
    fastest = min(timeit.repeat(lambda: choose_config(KEY, candidates, nothing), number=1000, repeat=20)) / 1000
    assert fastest < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_faster_launch_wins(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "cache_file", lambda device: tmp_path / "gpu.json")
    monkeypatch.setattr(tuning, "_winners", {})
    x = torch.ones(1 << 24, device="cuda")
    with autotune():
        assert choose_config(KEY, (RULE, FAST), lambda config: [x.mul(2) for _ in range(512 // config.block)]) is FAST
