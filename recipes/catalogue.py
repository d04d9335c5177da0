"""Finds the packaged recipes: a recipe's name is its path in this folder without ``.yaml``, such as text/quickstart.

Nothing here imports torch, so that listing recipes is quick.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from mambakit.spelling import did_you_mean

ROOT = Path(str(files("mambakit.recipes")))


def names() -> list[str]:
    """Every packaged recipe's name, sorted."""
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))


def find(name: str) -> Path:
    """The file of a packaged recipe.

    Raises:
        ValueError: no recipe has this name; the nearest that exists is named.
    """
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}{nearest(name)}; 'mambakit recipes' lists them")
    return ROOT / f"{name}.yaml"


def resolve(config: str) -> Path:
    """The file that ``--config`` means: a path where there is such a file, else a packaged recipe's name.

    Raises:
        ValueError: neither a file nor a recipe; the nearest recipe is named.
    """
    path = Path(config)
    if path.is_file():
        return path
    if config in names():
        return ROOT / f"{config}.yaml"
    raise ValueError(
        f"--config {config}: there is no such file, and no packaged recipe of this name{nearest(config)}; "
        "'mambakit recipes' lists them"
    )


def name_of(path: Path) -> str:
    """A recipe's name: as packaged where the file lies in this folder, else the file's name without its suffix."""
    if path.resolve().is_relative_to(ROOT.resolve()):
        return path.resolve().relative_to(ROOT.resolve()).with_suffix("").as_posix()
    return path.stem


def header(name: str) -> list[str]:
    """The lines of the comment a recipe opens with, without their marks."""
    lines = []
    for line in find(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def copy(name: str, destination: Path, force: bool = False) -> Path:
    """Copy a recipe to a file, or into a folder under its own last name; nothing is overwritten unless ``force``.

    Returns:
        the file written.

    Raises:
        ValueError: no such recipe.
        FileExistsError: the file exists and ``force`` is not set.
    """
    source = find(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists and is left as it is; name another file, or give --force to overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def nearest(name: str) -> str:
    """``" (did you mean X?)"`` for the packaged recipe closest to ``name``, or nothing where none is close."""
    return did_you_mean(name.removesuffix(".yaml"), names())
