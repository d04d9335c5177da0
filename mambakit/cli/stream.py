"""``mambakit predict --stream FILE``: classify a recording while it is read, or spot keywords in it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambakit.checkpoints import check_fits, data_state, load_task, read_checkpoint
from mambakit.cli.training import check_accelerator
from mambakit.datamodules.audio.files import AudioError, AudioFile, open_audio
from mambakit.datamodules.audio.quantization import quantizer
from mambakit.heads import SequenceClassifier
from mambakit.inspect.command import BuildCLI
from mambakit.keywords import KeywordSpotter
from mambakit.recipes import catalogue
from mambakit.spelling import did_you_mean
from mambakit.tasks import Classify

SPOTTING = ("hop", "threshold", "smooth", "refractory", "floor", "ignore")  # options of a KeywordSpotter
TOLERANCE = 1e-3  # of probabilities: a stream and the whole file add up in another order


@dataclass
class Hearing:
    """A trained classifier, and what its data left in the checkpoint: how sound reaches it and what labels mean."""

    task: Classify
    classes: list[str]
    sample_rate: int
    channels: int
    quantization: str | None
    device: str

    def inputs(self, samples: np.ndarray) -> Tensor:
        """Samples (k, C) as the model takes them: (1, k, C) float32, or codes (1, k) int64."""
        wave = torch.from_numpy(samples)
        if self.quantization is not None:
            wave = quantizer(self.quantization, stream=True).encode(wave[:, 0])
        return wave[None].to(self.device)

    def describe(self, probabilities: Tensor) -> tuple[str, float]:
        """Name and probability of the most probable class of (K,)."""
        best = int(probabilities.argmax())
        return self.classes[best], float(probabilities[best])


def run(arguments: Sequence[str]) -> None:
    """Classify a recording while it is read, and say how the decision changes and how long it took.

    With --window, spot keywords: the last so many seconds are classified again and again, and each word is told once.

    Raises:
        ValueError: a recording of another sampling rate or number of channels, a broken one, a model that cannot
            stream, a checkpoint of another task.
        FileNotFoundError: no such recording, checkpoint or recipe.
    """
    options, rest = _parser().parse_known_args(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    check_accelerator(device)
    given = {name: getattr(options, name) for name in SPOTTING if getattr(options, name) is not None}
    if given and options.window is None:
        raise ValueError(
            f"--{next(iter(given))}: of effect only in spotting keywords; give --window as well, or leave it out"
        )
    hearing = load(options.ckpt_path, options.config, rest, device)
    if options.rate is not None:
        hearing.task.set_rate(options.rate)
        hearing.sample_rate = round(hearing.sample_rate / options.rate)
    # By default cuDNN rounds what it convolves to TF32's 10 bits, block by block otherwise than the whole.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with open_audio(options.stream) as file, torch.inference_mode(), exact:
        check_sound(file, hearing)
        block = round(options.block * file.sample_rate)
        if block < 1:
            raise ValueError(f"--block {options.block}: expected at least one sample, 1/{file.sample_rate} s")
        seconds = file.frames / file.sample_rate
        print(f"{options.stream}: {seconds:.2f} s at {file.sample_rate} Hz, in blocks of {options.block} s", flush=True)
        if options.window is None:
            _classify(file, hearing, block, options.check)
        else:
            _spot(file, hearing, block, options.window, given)


def load(path: Path, config: str | None, overrides: Sequence[str], device: str) -> Hearing:
    """The classifier of a checkpoint, built as the checkpoint itself says, or as a recipe and overriding options do.

    Raises:
        ValueError: a checkpoint of another model or task, or one that knows nothing of sound; options without a recipe.
        FileNotFoundError: no such checkpoint or recipe.
    """
    if config is None:
        if overrides:
            known = [option for action in _parser()._actions for option in action.option_strings]
            raise ValueError(
                f"{overrides[0]}: there is no such option of predict --stream{did_you_mean(overrides[0], known)}; "
                "options of a recipe need --config NAME as well"
            )
        task, checkpoint = load_task(path)
    else:
        recipe = catalogue.resolve(config)
        task, checkpoint = (
            BuildCLI("predict", [f"--config={recipe}", *overrides], [recipe]).model,
            read_checkpoint(path),
        )
        check_fits(checkpoint, task, path)
        task.load_state_dict(checkpoint["state_dict"])
    sound = data_state(checkpoint, "sample_rate")
    if not isinstance(task, Classify) or not sound.get("classes"):
        raise ValueError(
            f"--ckpt_path {path}: holds a {type(task).__name__} of other data, and --stream needs a "
            "mambakit.tasks.Classify trained on labelled sound (mambakit.datamodules.audio.AudioDataModule)"
        )
    return Hearing(
        task.eval().to(device),
        sound["classes"],
        sound["sample_rate"],
        sound["channels"],
        sound.get("quantization"),
        device,
    )


def check_sound(file: AudioFile, hearing: Hearing) -> None:
    """Raise AudioError unless the recording is of the sampling rate and the channels that the model knows."""
    if file.sample_rate != hearing.sample_rate:
        raise AudioError(
            f"{file.name}: it is sampled at {file.sample_rate} Hz, and the model learnt {hearing.sample_rate} Hz; "
            f"resample it (torchaudio.functional.resample), or take a model of S4's family and --rate "
            f"{hearing.sample_rate / file.sample_rate:g}"
        )
    if file.channels != hearing.channels:
        raise AudioError(
            f"{file.name}: it has {file.channels} channels, and the model takes {hearing.channels}; mix or choose them "
            "first"
        )


def _classify(file: AudioFile, hearing: Hearing, block: int, check: bool) -> None:
    """Print the decision as it changes, the last one, and how long a block took."""
    task = hearing.task
    if isinstance(task.model, SequenceClassifier) and not task.model.backbone.causal:
        raise ValueError(
            "--stream: the model hears both directions, so it has no answer before the end; train it with a causal "
            "mixer (--model.backbone.mixer mamba1, or s4d), or give --window 1.0 to classify a second at a time"
        )
    # The first call of all prepares kernels and transforms, once in the life of a process.
    task.extend(hearing.inputs(file.read(0, min(block, file.frames))), task.init_state(1))
    state, said, at, seconds = task.init_state(1), None, 0, []
    for samples in file.blocks(block):
        start = time.perf_counter()
        logits, state = task.extend(hearing.inputs(samples), state)
        probabilities = logits[0].float().softmax(-1).cpu()  # which waits for a GPU
        seconds.append(time.perf_counter() - start)
        at += len(samples)
        label, probability = hearing.describe(probabilities)
        if label != said:
            print(f"{at / file.sample_rate:8.2f} s  {label}  {probability:.2f}", flush=True)
            said = label
    print(f"decision: {label}, probability {probability:.4f}")
    if check:
        whole = task(hearing.inputs(file.read()))[0].float().softmax(-1).cpu()
        difference = float((probabilities - whole).abs().max())
        if not difference < TOLERANCE:
            raise ValueError(
                f"--stream: block by block the probabilities differ by {difference:.2g} from those of the whole file, "
                f"{hearing.describe(whole)[0]}, where rounding explains {TOLERANCE:g}; please report it with the recipe"
            )
        print(f"the same result as the whole file at once: probabilities differ by {difference:.1g} at most")
    print(timing(seconds, block, file))


def _spot(file: AudioFile, hearing: Hearing, block: int, window: float, settings: dict[str, Any]) -> None:
    """Print each keyword when it is heard, and how long a block took."""
    ignored = settings.pop("ignore", [])
    unknown = [name for name in ignored if name not in hearing.classes]
    if unknown:
        raise ValueError(
            f"--ignore {unknown[0]}: the model has no such class{did_you_mean(unknown[0], hearing.classes)}; it knows "
            f"{', '.join(hearing.classes)}"
        )
    if window * file.sample_rate > file.frames:
        raise ValueError(
            f"--window {window}: {file.name} lasts {file.frames / file.sample_rate:.2f} s only; leave --window "
            "out to classify it whole"
        )

    def classify(windows: Tensor) -> Tensor:
        inputs = torch.cat([hearing.inputs(window.numpy()) for window in windows])
        return hearing.task(inputs).float().softmax(-1)

    spotter = KeywordSpotter(
        classify,
        file.sample_rate,
        window,
        ignore=[hearing.classes.index(name) for name in ignored],
        **settings,
    )
    classify(torch.zeros(1, spotter.windows.size, file.channels))
    seconds, count = [], 0
    for samples in file.blocks(block):
        start = time.perf_counter()
        detections = spotter.push(torch.from_numpy(samples))
        seconds.append(time.perf_counter() - start)
        for one in detections:
            print(f"{one.time:8.2f} s  {hearing.classes[one.label]}  {one.score:.2f}", flush=True)
        count += len(detections)
    print(f"{count} detections")
    print(timing(seconds, block, file))


def timing(seconds: list[float], block: int, file: AudioFile) -> str:
    """Latency of blocks that took so many seconds each, and their computing time over playing time."""
    median, late = 1e3 * np.quantile(seconds, [0.5, 0.99])
    return (
        f"latency: median {median:.2f} ms, 99th percentile {late:.2f} ms a block of "
        f"{1e3 * block / file.sample_rate:g} ms; real-time factor {sum(seconds) * file.sample_rate / file.frames:.3f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mambakit predict --stream", description=(run.__doc__ or "").split("\n\n    Raises")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--stream", type=Path, required=True, metavar="FILE", help="a wav or flac file")
    add("--ckpt_path", "--checkpoint", type=Path, required=True, help="a .ckpt file that 'mambakit fit' wrote")
    add("--config", help="build the model as this recipe says, and options after it (default: as the checkpoint says)")
    add("--block", type=float, default=0.02, metavar="S", help="seconds to read at a time (default: 0.02)")
    add("--rate", type=float, help="for S4's family: trained sampling rate over that of FILE, 2 for half of it")
    add("--no-check", dest="check", action="store_false", help="leave out the comparison with the whole file")
    add("--window", type=float, metavar="S", help="spot keywords: classify the last S seconds again and again")
    add("--hop", type=float, metavar="S", help="seconds from window to window (default: a quarter of the window)")
    add("--threshold", type=float, metavar="P", help="smoothed probability of a detection (default: 0.8)")
    add("--smooth", type=int, metavar="N", help="windows whose probabilities are averaged (default: 3)")
    add("--refractory", type=float, metavar="S", help="seconds without another detection (default: 0.5)")
    add("--floor", type=float, metavar="DB", help="quieter windows hold no keyword (default: -60)")
    add("--ignore", nargs="+", metavar="LABEL", help="classes that are no keywords, such as unknown")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    return parser
