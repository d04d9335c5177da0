"""The ``mambakit`` command.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's (:mod:`mambakit.cli.training`), but for ``predict
--stream`` (:mod:`mambakit.cli.stream`); ``compare``, ``generate``, ``inspect``, ``recipes`` and ``doctor`` are our own.
Each loads what it needs only when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

HELP = """\
usage: mambakit COMMAND [OPTIONS]

  fit        train: mambakit fit --config text/quickstart
  validate   measure a checkpoint on the validation data: --config NAME --ckpt_path FILE
  test       measure it on the test data
  predict    hand every batch of the predict data to the task; with --stream FILE.wav --ckpt_path FILE classify a
             recording while it is read
  compare    train several mixers of a recipe under one budget, for one table and one chart: compare text/quickstart
             --mixers mamba1,mamba2 --seeds 0,1,2
  generate   continue a prompt with a trained language model: --checkpoint FILE --prompt TEXT; or draw waveforms from a
             model of samples: --checkpoint FILE --seconds 1 --output FOLDER
  inspect    what a vision model reads of an image, as pictures: --config NAME --ckpt_path FILE; with sequences as the
             first word what a classifier of DNA goes by, with variants what a language model of DNA makes of a VCF
  recipes    list, show or copy the packaged recipes
  doctor     versions, devices, the backend that serves each operator, a short timing

--config takes a file or a packaged recipe's name; options after it override it: --trainer.max_steps 200.
mambakit COMMAND --help lists a command's options. --traceback shows where an error arose. --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 0 when all went well.

    An error is one sentence on stderr, with status 1 (2 for a command that does not exist). With ``--traceback`` it
    is raised as it came.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        return _run(arguments)
    except Exception as error:
        if traceback:
            raise
        from mambakit.cli.messages import one_sentence

        print(f"mambakit: {one_sentence(error)}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        import mambakit

        print(f"mambakit {mambakit.__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        from mambakit.spelling import did_you_mean

        hint = f"{did_you_mean(command, COMMANDS)}; 'mambakit --help' lists them"
        print(f"mambakit: there is no command {command!r}{hint}", file=sys.stderr)
        return 2
    COMMANDS[command](command, rest)
    return 0


def _train(command: str, rest: list[str]) -> None:
    from mambakit.cli.training import run

    run(command, rest)


def _predict(command: str, rest: list[str]) -> None:
    if not any(word.split("=")[0] == "--stream" for word in rest):
        return _train(command, rest)
    from mambakit.cli.stream import run

    run(rest)


def _compare(_: str, rest: list[str]) -> None:
    from mambakit.cli.compare import run

    run(rest)


def _generate(_: str, rest: list[str]) -> None:
    from mambakit.cli.generate import run

    run(rest)


def _inspect(_: str, rest: list[str]) -> None:
    from mambakit.inspect.command import run

    run(rest)


def _recipes(_: str, rest: list[str]) -> None:
    from mambakit.cli.recipes import run

    run(rest)


def _doctor(_: str, rest: list[str]) -> None:
    from mambakit.doctor import run

    run(rest)


COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    "fit": _train,
    "validate": _train,
    "test": _train,
    "predict": _predict,
    "compare": _compare,
    "generate": _generate,
    "inspect": _inspect,
    "recipes": _recipes,
    "doctor": _doctor,
}
