"""Everything at once on one GPU: right first, then the time of each operator and of whole models beside their peers.

    python benchmarks/run.py                                        # every part but million
    python benchmarks/run.py --only scan conv --shapes lm vim_tiny  # some parts, some shapes
    python benchmarks/run.py --json figures.json --chart time_against_length.png

Parts: scan, conv, ssd, trapezoid, norm, loss, updates, s4 (operators, each checked against float64 in poisoned memory
before it is timed); accuracy (the scan's errors by dtype and length, and beyond 2^31 elements); sweep (time against
length: scan, attention, vectorised PyTorch); train and generate (whole models); vim (Vision Mamba); million (1,048,576
tokens forward and backward through a 130M backbone). Peers that are installed (mamba_ssm, causal_conv1d, fla, mambapy)
run beside ours, after their results have been compared with ours; on an H200 the recorded times of mamba_ssm and
causal-conv1d are shown, too.

Inputs are drawn afresh each time; ``--seed`` repeats a run. A ratio is a peer's time over ours: above 1 we are faster.
``of floor`` is the time that no kernel on this GPU goes below (see each part's file) over ours. ``harness.py`` says how
times are taken.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chart
import conv
import kernels_s4
import loss
import norm
import scan
import ssd
import torch
import trapezoid
import updates
import vision_block
import whole
from harness import BOTH, FORWARD, SHORT, Ceilings, describe_machine, measure, measure_ceilings

OPERATORS = {
    "scan": scan,
    "conv": conv,
    "ssd": ssd,
    "trapezoid": trapezoid,
    "norm": norm,
    "loss": loss,
    "updates": updates,
    "s4": kernels_s4,
}
PARTS = (*OPERATORS, "accuracy", "sweep", "train", "generate", "vim", "million")
RARE = ("million",)
COLUMNS = (
    "ms: forward (graph), of floor; both (graph), of floor; MiB; relative RMS error out, worst gradient; first call"
)
HEADINGS = {part: f"{part}; {COLUMNS}" for part in OPERATORS} | {
    "accuracy": "accuracy: relative RMS error against float64",
    "sweep": f"sweep: {scan.SWEEP_TOKENS} tokens in all, one sequence where it is longer; forward / both, ms",
    "train": "train",
    "generate": "generate",
    "vim": "vim",
    "million": "million",
}


class Job(NamedTuple):
    """One row of the record: under which key it goes, what it is called, how it is measured, how it is printed."""

    key: str
    name: str
    run: Callable[[], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]


def jobs(part: str, shapes: list[str], device: str, ceilings: Ceilings) -> Iterator[Job]:
    if part in OPERATORS:
        for name, build in OPERATORS[part].works(shapes, device, ceilings):
            yield Job("operators", f"{part}, {name}", lambda build=build: measure(build()), operator_lines)
    elif part == "accuracy":
        for shape in scan.accuracy_shapes():
            yield Job("accuracy", f"{shape.name}, {shape.dtype}", partial(scan.accuracy, shape), accuracy_line)
    elif part == "sweep":
        for length in scan.SWEEP_LENGTHS:
            yield Job("sweep", f"L {length}", partial(scan.sweep, length), sweep_line)
    elif part == "vim":
        for name, run in vision_block.WORKS.items():
            yield Job("models", f"vim, {name} pixels", run, partial(vision_block.line, device=device))
    else:
        for name, run in whole.PARTS[part].items():
            yield Job("models", name, run, partial(whole.line, device=device))


def operator_lines(row: dict[str, Any]) -> str:
    """Ours on one line, and each peer on a line below."""
    ours, floor = row["mambakit"], row["floor"]
    gradients = [error for name, error in row["errors"].items() if name.startswith("grad ")]
    results = [error for name, error in row["errors"].items() if not name.startswith("grad ")]
    cells = []
    for name in (FORWARD, BOTH):
        if name not in ours:
            cells.append(" " * 27)
            continue
        graph = f"({ours[f'{name}, graph']:.3f})" if f"{name}, graph" in ours else ""
        cells.append(f"{ours[name]:8.3f} {graph:>8} {floor[name] / ours[name]:8.0%} ")
    worst = f"{max(results):.1e}" + (f", {max(gradients):.1e}" if gradients else "")
    title = f"{row['operator']} {row['shape']}"
    if row["dtype"] not in title:
        title += f", {row['dtype']}"
    lines = [f"{title:>46} {'   '.join(cells)} {ours['MiB']:8.0f}   {worst}; {row['first_call']:.1f} s"]
    for name, peer in (*row["recorded"].items(), *row["peers"].items()):
        cells = []
        for kind in (FORWARD, BOTH):
            cells.append(f"{peer[kind]:8.3f} {peer[kind] / ours[kind]:15.2f}x  " if kind in peer else " " * 27)
        memory = f"{peer['MiB']:8.0f}" if "MiB" in peer else ""
        lines.append(f"{name:>46} {'   '.join(cells)} {memory}")
    return "\n".join(lines)


def accuracy_line(row: dict[str, Any]) -> str:
    errors = row["errors"]
    worst = max((name for name in errors if name != "out"), key=errors.__getitem__)
    title = f"{row['operator']} {row['shape']}, {row['dtype']}"
    return f"{title:>46}   out {errors['out']:.1e}   worst gradient {errors[worst]:.1e} ({worst[5:]})"


def sweep_line(row: dict[str, Any]) -> str:
    figures = [f"{name} {row[name][FORWARD]:.3f} / {row[name][BOTH]:.3f}" for name in list(row)[2:]]
    return f"{'L ' + str(row['length']):>12}   {'   '.join(figures)}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE", help="of the operators: lm, vim_tiny, ...")
    parser.add_argument("--json", type=Path, help="write every figure here, as it comes")
    parser.add_argument("--chart", type=Path, help="draw the sweep here (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the inputs; fresh by default")
    parser.add_argument("--commit", help="named in the JSON where this is no git checkout")
    options = parser.parse_args()
    known = {name for module in OPERATORS.values() for name in shape_names(module)}
    if unknown := set(options.shapes) - known:
        parser.error(f"--shapes {' '.join(sorted(unknown))}: unknown; expected some of {', '.join(sorted(known))}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; this benchmark times GPU kernels")
    return options


def shape_names(module: Any) -> list[str]:
    return list(module.SHAPES) if isinstance(module.SHAPES, dict) else [shape.name for shape in module.SHAPES]


def save(record: dict[str, Any], target: Path | None) -> None:
    if target:
        target.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    parts = options.only or [part for part in PARTS if part not in RARE]
    ceilings = measure_ceilings()
    record: dict[str, Any] = describe_machine(options.seed, options.commit)
    record |= {"ceilings": vars(ceilings), "operators": [], "accuracy": [], "sweep": [], "models": [], "failures": []}
    device = record["device"]
    print(f"{device}, {record['versions']}, seed {options.seed}, commit {record['commit']}")
    print(
        f"copies {ceilings.bytes / 1e12:.2f} TB/s, bfloat16 products {ceilings.flops / 1e12:.0f} TFLOP/s, "
        f"{ceilings.exponentials / 1e12:.2f}e12 exponentials/s; medians in ms, replayed graphs too under {SHORT}"
    )
    for part in parts:
        print(f"-- {HEADINGS[part]}")
        start = time.monotonic()
        for job in jobs(part, options.shapes, device, ceilings):
            torch.cuda.empty_cache()
            try:
                row = job.run()
            except (AssertionError, RuntimeError) as error:
                record["failures"].append(f"{job.name}: {error}")
                print(f"FAILED {record['failures'][-1]}", flush=True)
                continue
            record[job.key].append(row)
            print(job.line(row), flush=True)
            save(record, options.json)
        print(f"   {part} took {time.monotonic() - start:.0f} s", flush=True)
    save(record, options.json)
    if options.chart and record["sweep"]:
        chart.draw(record, options.chart)
        print(f"drawn to {options.chart}")
    if record["failures"]:
        raise SystemExit(f"{len(record['failures'])} failed")


if __name__ == "__main__":
    main()
