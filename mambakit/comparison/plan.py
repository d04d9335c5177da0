"""What a comparison runs: every mixer, value and seed, and the options of each run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mambakit.backbone import LETTERS, MIXER_HOMES
from mambakit.spelling import did_you_mean

MIXER = "model.backbone.mixer"
PATTERN = "model.backbone.pattern"

Group = tuple[str, "str | None"]  # a mixer's label, and the value of the varied option


@dataclass(frozen=True)
class Mixer:
    """A mixer of every layer, or a hybrid: ``letters`` repeated over the layers, in which "m" is the mixer.

    The letters are those of :class:`mambakit.Backbone`'s ``pattern``.
    """

    name: str
    letters: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.letters is None else f"{self.name}:{self.letters}"


@dataclass(frozen=True)
class Choice:
    """An option of fit without its dashes, and the values it takes, as they would stand on the command line."""

    option: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of the option, for headings: ``d_model`` of ``model.backbone.d_model``."""
        return self.option.rpartition(".")[2]


@dataclass(frozen=True)
class Run:
    """One training: a mixer, a seed, and the values of the options that ``--vary`` and ``--tune`` name."""

    mixer: Mixer
    seed: int
    varied: str | None = None
    tuned: str | None = None

    @property
    def group(self) -> Group:
        return self.mixer.label, self.varied


@dataclass(frozen=True)
class Plan:
    """All that a comparison runs."""

    mixers: tuple[Mixer, ...]
    seeds: tuple[int, ...] = (0,)
    vary: Choice | None = None
    tune: Choice | None = None

    def groups(self) -> Iterator[tuple[Mixer, str | None]]:
        """Every mixer at every value of the varied option: a line of the table each."""
        for mixer in self.mixers:
            for varied in self.vary.values if self.vary else (None,):
                yield mixer, varied

    def begin(self) -> list[Run]:
        """The runs that need no choice: all of them, or, where an option is tuned, the first seed with each value.

        One seed of everything comes before the next, so that an interrupted comparison has something of each mixer.
        """
        if self.tune is not None:
            first = self.seeds[0]
            return [Run(*self._named(group, first), tuned) for group in self.groups() for tuned in self.tune.values]
        return [Run(*self._named(group, seed)) for seed in self.seeds for group in self.groups()]

    def after(self, chosen: Mapping[Group, str]) -> list[Run]:
        """The other seeds with the chosen values; none of a group of which no value could be chosen."""
        if self.tune is None:
            return []
        return [
            Run(*self._named(group, seed), chosen[group[0].label, group[1]])
            for seed in self.seeds[1:]
            for group in self.groups()
            if (group[0].label, group[1]) in chosen
        ]

    def options(self, run: Run) -> dict[str, str]:
        """What this run changes in the recipe. A mixer alone stands in every layer, whatever pattern the recipe has."""
        own = {choice.option: value for choice, value in self._values(run) if value is not None}
        options = {MIXER: run.mixer.name, PATTERN: run.mixer.letters or "m", **own}
        return {**options, "seed_everything": str(run.seed)}

    def folder(self, run: Run) -> str:
        """Where the run writes, below the folder of all runs."""
        values = [re.sub(r"[^\w.+-]", "_", f"{choice.name}_{value}") for choice, value in self._values(run)]
        return "/".join([run.mixer.label.replace(":", "_"), *values, f"seed_{run.seed}"])

    def describe(self, run: Run) -> str:
        """``mamba1, d_model 64, lr 1e-3, seed 0``."""
        values = [f"{choice.name} {value}" for choice, value in self._values(run)]
        return ", ".join([run.mixer.label, *values, f"seed {run.seed}"])

    def _values(self, run: Run) -> list[tuple[Choice, str | None]]:
        """The options varied and tuned, with this run's value of each."""
        both = (self.vary, run.varied), (self.tune, run.tuned)
        return [(choice, value) for choice, value in both if choice is not None]

    @staticmethod
    def _named(group: tuple[Mixer, str | None], seed: int) -> tuple[Mixer, int, str | None]:
        return group[0], seed, group[1]


def parse_mixers(text: str) -> tuple[Mixer, ...]:
    """``mamba1,attention,mamba1:mmma``: names of mixers, and after a colon the letters of a hybrid's layers.

    Raises:
        ValueError: an unknown name, the nearest beside it; a letter without a meaning; the same mixer twice.
    """
    mixers = []
    for word in split_values(text):
        name, colon, letters = word.partition(":")
        if name not in MIXER_HOMES:
            hint = did_you_mean(name, MIXER_HOMES)
            raise ValueError(
                f"--mixers: there is no mixer {name!r}{hint}; expected names among {', '.join(MIXER_HOMES)}, or "
                "NAME:LETTERS for a hybrid, such as mamba1:mmma"
            )
        unknown = [letter for letter in letters if letter not in ("m", *LETTERS)]
        if unknown or (colon and not letters):
            known = ", ".join(f"{letter} {meaning}" for letter, meaning in LETTERS.items())
            raise ValueError(
                f"--mixers {word}: expected letters behind the colon, m for {name}, and {known}"
                + (f"; got {unknown[0]!r}" if unknown else "")
            )
        mixers.append(Mixer(name, letters or None))
    _refuse_repetition("--mixers", [mixer.label for mixer in mixers])
    return tuple(mixers)


def parse_seeds(text: str) -> tuple[int, ...]:
    """``0,1,2``.

    Raises:
        ValueError: no whole numbers from 0 up, or one twice.
    """
    words = split_values(text)
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"--seeds {text}: expected whole numbers from 0 up with commas between, such as 0,1,2")
    _refuse_repetition("--seeds", words)
    return tuple(int(word) for word in words)


def parse_choice(flag: str, text: str) -> Choice:
    """``OPTION=VALUE,VALUE`` of ``--vary`` or ``--tune``, the option with or without its dashes.

    Raises:
        ValueError: another form, a value twice, or an option that the comparison sets itself.
    """
    option, _, values = text.removeprefix("--").partition("=")
    words = split_values(values)
    if not option or not words:
        raise ValueError(f"{flag} {text}: expected OPTION=VALUE,VALUE, such as model.optim.lr=1e-3,3e-3")
    if option in OWNED:
        raise ValueError(f"{flag} {option}: this is for {OWNED[option]} to say; name another option of fit")
    _refuse_repetition(flag, words)
    return Choice(option, tuple(words))


def split_values(text: str) -> list[str]:
    """The words between commas that stand in no brackets: ``[1, 2],[3]`` gives ``[1, 2]`` and ``[3]``."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


# Options of fit that a comparison sets for every run, and what sets them.
OWNED = {
    MIXER: "--mixers",
    PATTERN: "--mixers",
    "seed_everything": "--seeds",
    "trainer.default_root_dir": "--output",
    "trainer.devices": "compare, which trains each run on one device,",
    "trainer.num_nodes": "compare, which trains each run on one device,",
    "ckpt_path": "compare, which trains from nothing,",
}


def refuse_owned(arguments: list[str]) -> None:
    """Raise ValueError where one of fit's options that a comparison sets is among ``arguments``."""
    for word in arguments:
        option = word.removeprefix("--").partition("=")[0]
        owner = OWNED.get(option)
        if owner is not None and word.startswith("--"):
            raise ValueError(f"--{option}: this is for {owner} to say; leave it out")


def _refuse_repetition(flag: str, words: list[str]) -> None:
    if not words:
        raise ValueError(f"{flag}: is empty, expected at least one value")
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"{flag}: {word} is given twice; give each once")
