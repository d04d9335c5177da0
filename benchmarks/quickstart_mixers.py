"""text/quickstart with every causal mixer in turn, by one option and no other change: the table of docs/mixers.md.

    python benchmarks/quickstart_mixers.py
    python benchmarks/quickstart_mixers.py --only mamba1,s4d --json mixers.json -- --trainer.max_steps 60

What follows ``--`` goes to ``mambakit fit`` as it is. Each run is a process of its own in a temporary folder. With
``--json`` each result is written as soon as it is there, and what the file already holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from mambakit.backbone import MixerName, mixer_factory

ROOT = Path(__file__).resolve().parents[1]
CAUSAL = tuple(name for name in get_args(MixerName) if mixer_factory(name).causal)  # type: ignore[attr-defined]


def run(mixer: str, options: list[str]) -> dict[str, Any]:
    """Train once; bits per byte before and after, parameters, seconds of the whole command."""
    command = [sys.executable, "-m", "mambakit.cli", "fit", "--config", "text/quickstart"]
    command += [f"--model.backbone.mixer={mixer}", "--trainer.enable_progress_bar=false", *options]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    text = done.stdout + done.stderr
    match = re.search(r"bits per byte: (\S+) -> (\S+) \(after (\d+) steps\)", text)
    if done.returncode or match is None:
        raise SystemExit(f"{mixer}: status {done.returncode}\n{text[-3000:]}")
    decayed = [int(number.replace(",", "")) for number in re.findall(r"tensors, ([\d,]+) numbers", text)]
    return {
        "mixer": mixer,
        "parameters": sum(decayed),
        "before": float(match[1]),
        "after": float(match[2]),
        "steps": int(match[3]),
        "seconds": round(seconds, 1),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [f"| {r['mixer']} | {r['parameters']:,} | {r['before']:.2f} | {r['after']:.2f} |" for r in results]
    return "\n".join(["| Mixer | Parameters | Before | After |", "|---|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CAUSAL), help="mixers, separated by commas")
    parser.add_argument("--json", type=Path, help="file of the results, read first and written after each run")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="for mambakit fit")
    given = parser.parse_args()
    known = json.loads(given.json.read_text())["results"] if given.json and given.json.is_file() else []
    machine = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "options": given.options,
    }
    for mixer in given.only.split(","):
        if any(result["mixer"] == mixer for result in known):
            continue
        known.append(run(mixer, given.options))
        print(known[-1], flush=True)
        if given.json:
            given.json.write_text(json.dumps({**machine, "results": known}, indent=1) + "\n")
    print(table(known))


if __name__ == "__main__":
    main()
