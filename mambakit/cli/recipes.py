"""``mambakit recipes``: list, show, copy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mambakit.recipes import catalogue


def run(arguments: Sequence[str]) -> None:
    """List the packaged recipes, print one, or copy one to edit."""
    parser = argparse.ArgumentParser(prog="mambakit recipes", description=run.__doc__)
    actions = parser.add_subparsers(dest="action", metavar="list|show|copy")
    actions.add_parser("list", help="names, and what each is (the default)")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name")
    copy = actions.add_parser("copy", help="copy a recipe, to edit it and run it with --config FILE")
    copy.add_argument("name")
    copy.add_argument("destination", nargs="?", type=Path, default=Path(), help="file or folder (default: here)")
    copy.add_argument("--force", action="store_true", help="overwrite the file where it exists")
    options = parser.parse_args(arguments)
    if options.action == "show":
        print(catalogue.find(options.name).read_text(encoding="utf-8"), end="")
    elif options.action == "copy":
        target = catalogue.copy(options.name, options.destination, options.force)
        print(f"{target}\nrun it with: mambakit fit --config {target}")
    else:
        width = max(map(len, catalogue.names()), default=0)
        for name in catalogue.names():
            print(f"{name:{width}}  {next(iter(catalogue.header(name)), '')}")
