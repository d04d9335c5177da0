"""Everything at once on one GPU: right first, then the time of each operator and of whole models beside their peers.

    python benchmarks/run.py                                        # every part but million
    python benchmarks/run.py --only scan conv --shapes lm vim_tiny  # some parts, some shapes
    python benchmarks/run.py --json figures.json --chart time_against_length.png

Parts: scan, conv, norm, loss, updates (operators, each checked against float64 in poisoned memory before it is timed);
accuracy (the scan's errors by dtype and length, and beyond 2^31 elements); sweep (time against length: scan, attention,
vectorised PyTorch); train and generate (whole models); million (1,048,576 tokens forward and backward through a 130M
backbone). Peers that are installed (mamba_ssm, causal_conv1d, fla, mambapy) run beside ours, after their results have
been compared with ours; on an H200 the recorded times of mamba_ssm and causal-conv1d are shown, too.

Inputs are drawn afresh each time; ``--seed`` repeats a run. A ratio is a peer's time over ours: above 1 we are faster.
``of floor`` is the time that no kernel on this GPU goes below (see each part's file) over ours. ``harness.py`` says how
times are taken.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from pathlib import Path
from typing import Any

import chart
import conv
import loss
import norm
import scan
import torch
import updates
import whole
from harness import BOTH, FORWARD, SHORT, Ceilings, describe_machine, each_alone, measure, measure_ceilings

OPERATORS = {"scan": scan, "conv": conv, "norm": norm, "loss": loss, "updates": updates}
PARTS = (*OPERATORS, "accuracy", "sweep", "train", "generate", "million")
RARE = ("million",)


def run_operators(parts: list[str], shapes: list[str], device: str, ceilings: Ceilings, record: dict[str, Any]) -> None:
    print(f"{'':>46}   forward (graph)   of floor    both (graph)   of floor     MiB   error: out, grad; first call")
    for part in parts:
        for work in each_alone(OPERATORS[part].works(shapes, device, ceilings)):
            row = measure(work)
            record["operators"].append(row)
            print(operator_lines(row), flush=True)
            del work


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
    title = (
        f"{row['operator']} {row['shape']}, {row['dtype']}"
        if "," not in row["shape"]
        else (f"{row['operator']} {row['shape']}")
    )
    lines = [f"{title:>46} {'   '.join(cells)} {ours['MiB']:8.0f}   {worst}; {row['first_call']:.1f} s"]
    for name, peer in (*row["recorded"].items(), *row["peers"].items()):
        cells = []
        for kind in (FORWARD, BOTH):
            cells.append(f"{peer[kind]:8.3f} {peer[kind] / ours[kind]:15.2f}x  " if kind in peer else " " * 27)
        memory = f"{peer['MiB']:8.0f}" if "MiB" in peer else ""
        lines.append(f"{name:>46} {'   '.join(cells)} {memory}")
    return "\n".join(lines)


def run_accuracy(record: dict[str, Any]) -> None:
    print("relative RMS error against float64, each below its bound")
    for row in scan.accuracy():
        record["accuracy"].append(row)
        errors = row["errors"]
        worst = max((name for name in errors if name != "out"), key=errors.__getitem__)
        title = f"{row['operator']} {row['shape']}, {row['dtype']}"
        print(f"{title:>46}   out {errors['out']:.1e}   worst gradient {errors[worst]:.1e} ({worst[5:]})", flush=True)


def run_sweep(record: dict[str, Any]) -> None:
    print(f"time against length, {scan.SWEEP_TOKENS} tokens in all (one sequence beyond), forward / both, ms")
    for row in scan.sweep():
        record["sweep"].append(row)
        figures = [f"{name} {row[name][FORWARD]:.3f} / {row[name][BOTH]:.3f}" for name in list(row)[2:]]
        print(f"{'L ' + str(row['length']):>12}   {'   '.join(figures)}", flush=True)


def run_whole(part: str, device: str, record: dict[str, Any]) -> None:
    for row in whole.PARTS[part]():
        record["models"].append(row)
        print(whole.line(row, device), flush=True)
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE", help="of the operators: lm, vim_tiny, ...")
    parser.add_argument("--json", type=Path, help="write every figure here, after each part")
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


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    parts = options.only or [part for part in PARTS if part not in RARE]
    ceilings = measure_ceilings()
    record: dict[str, Any] = describe_machine(options.seed, options.commit)
    record |= {"ceilings": vars(ceilings), "operators": [], "accuracy": [], "sweep": [], "models": []}
    device = record["device"]
    print(f"{device}, {record['versions']}, seed {options.seed}, commit {record['commit']}")
    print(
        f"copies {ceilings.bytes / 1e12:.2f} TB/s, bfloat16 products {ceilings.flops / 1e12:.0f} TFLOP/s, "
        f"{ceilings.exponentials / 1e12:.2f}e12 exponentials/s; medians in ms, replayed graphs too under {SHORT}"
    )
    operators = [part for part in parts if part in OPERATORS]
    stages: list[tuple[str, Any]] = [
        ("operators", lambda: run_operators(operators, options.shapes, device, ceilings, record))
    ]
    stages += [("accuracy", lambda: run_accuracy(record)), ("sweep", lambda: run_sweep(record))]
    stages += [(part, lambda part=part: run_whole(part, device, record)) for part in whole.PARTS]
    for name, stage in stages:
        if name not in parts and not (name == "operators" and operators):
            continue
        start = time.monotonic()
        stage()
        print(f"-- {name}: {time.monotonic() - start:.0f} s", flush=True)
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.chart and record["sweep"]:
        chart.draw(record, options.chart)
        print(f"drawn to {options.chart}")


if __name__ == "__main__":
    main()
