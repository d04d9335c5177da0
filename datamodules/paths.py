"""Where a path of an option points."""

from __future__ import annotations

from pathlib import Path


def path_in(root: str | Path, name: str) -> Path:
    """``name`` as an absolute path, a relative one against ``root``; a leading ~ is the home folder."""
    return (Path(root).expanduser() / Path(name).expanduser()).absolute()
