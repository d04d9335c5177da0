"""Turns an error into the one sentence that a user can act on."""

from __future__ import annotations

import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable

from mambakit.spelling import did_you_mean

# Lines of jsonargparse's report that only frame the ones which say what is wrong.
_FRAMES = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type:")


def one_sentence(error: Exception) -> str:
    """The error in one line. One that nobody here has worded is called by its class, and points to --traceback."""
    if isinstance(error, ArgumentError):
        return explain(error.message)
    if str(error).startswith(_FRAMES):  # what a class refused when jsonargparse made an object of it
        return explain(str(error))
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--traceback shows where)"


def explain(message: str, keys: Iterable[str] = ()) -> str:
    """A report of jsonargparse, which is a tree of classes and alternatives, as one sentence.

    Args:
        message: the report.
        keys: the options that exist, dotted, for what was misspelt at the top.
    """
    path, class_path, causes, given = _read_tree(message)
    cause = " or ".join(dict.fromkeys(causes)) or " ".join(message.split())
    keys = list(keys)
    if match := re.search(r"Option '([^']+)' is not accepted", cause):
        options = _options_of(class_path)
        return (
            f"--{'.'.join([*path, match[1]])}: {class_path} has no option {match[1]!r}"
            f"{did_you_mean(match[1], options)}; it takes {', '.join(options)}"
        )
    if match := re.search(r"unrecognized arguments: (\S+)", cause):
        return _unknown(".".join([*path, match[1].lstrip("-").split("=")[0]]), keys)
    if match := re.search(r"does not accept option '([^']+)'", cause):
        return _unknown(match[1], keys)
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", cause):
        names = dir(importlib.import_module(match[1]))
        return f"--{'.'.join(path)}: there is no class {match[1]}.{match[2]}{did_you_mean(match[2], names)}"
    if match := re.search(r"Expected '([^']+)' to be a subclass of <class '(?:\w+\.)*(\w+)'>", cause):
        return f"--{'.'.join(path)}: {match[1]} is not a {match[2]}"
    if match := re.search(r"arguments are required: (.+)", cause):
        missing = [name.split(".")[-1] for name in match[1].split(", ")]
        where = f"--{'.'.join(path)}: {class_path} needs" if path else "this command needs"
        return f"{where} {' and '.join(missing)}; take a recipe with --config NAME ('mambakit recipes' lists them)"
    # What a class says of its options comes before what other classes and names would have taken.
    refusals = dict.fromkeys(line for line in causes if not line.startswith("Expected a"))
    cause = _in_words(causes, given) or " or ".join(refusals) or cause
    return f"--{'.'.join(path)}: {cause}" if path else cause


def _in_words(causes: list[str], given: str) -> str:
    """``expected int or one of 'a', 'b'; got c`` of jsonargparse's lines; nothing where one has another form."""
    expected, choices = [], []
    for cause in causes:
        if cause.startswith("Expected a path but"):  # a file of options may stand for any class; nobody means one here
            continue
        match = re.fullmatch(r"Expected an? (.+?)(?:(?:\. Got value)?: (.*))?", cause)
        if match is None:
            return ""
        kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match[1])
        choices += re.findall(r"'([^']+)'", kind)
        expected.append(re.sub(r"(?:typing\.)?Literal\[(.*)\]", r"one of \1", kind))
        given = given or match[2] or ""
    return f"expected {' or '.join(expected)}; got {given}{did_you_mean(given, choices)}" if expected else ""


def _read_tree(message: str) -> tuple[list[str], str, list[str], str]:
    """(key parts, innermost class, causes, the value given) down the first branch of the report."""
    path: list[str] = []
    causes: list[str] = []
    class_path = ""
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if match := re.match(r"Type .*Callable\[.* expects a function or a callable class: (.*)", line):
            line = match[1]
            if not line.startswith("Expected a dot import"):  # a class was found: it is not meant as one of the names
                causes.clear()
        if match := re.match(r"(.*?)\.* Got value: Namespace\(class_path='([^']+)'", line):
            line, class_path = match[1], match[2]
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', line):
            path.append(match[1])
            line = match[2]
        elif match := re.match(r"Problem with given class_path '([^']+)':", line):
            class_path, line = match[1], ""
        elif match := re.match(r"Given value: (?!NestedArg|Namespace|\{)(.*)", line):
            return path, class_path, causes, match[1]
        elif line.startswith("Given value:"):
            break
        if line and not line.startswith(_FRAMES):
            causes.append(line)
    return path, class_path, causes, ""


def _options_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return [
        key for key in inspect.signature(getattr(importlib.import_module(module), name)).parameters if key != "self"
    ]


def _unknown(option: str, keys: list[str]) -> str:
    if option.startswith(("model.", "data.")) and f"{option.split('.')[0]}" in keys:
        part = option.split(".")[0]
        return f"--{option}: no {part} is chosen yet; take a recipe with --config NAME before this option"
    guess = did_you_mean(option, keys) or did_you_mean(option.split(".")[0], {key.split(".")[0] for key in keys})
    return f"--{option}: there is no such option{guess}"
