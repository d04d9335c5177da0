"""Print the JSON of ``run.py`` as Markdown tables.

python benchmarks/table.py figures.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PASSES = ("forward", "forward + backward")


def operators(record: dict[str, Any]) -> list[str]:
    """One row an operator and shape, beside the fastest peer of each pass; graph replays in brackets."""
    head = ["Operator, shape"]
    for name in PASSES:
        head += [f"{name.capitalize()}, ms", "Fastest peer", "Ratio", "Of floor"]
    lines = [_row([*head, "MiB", "Peers' least"]), _row(["---"] + ["---:"] * (len(head) + 1))]
    for row in record["operators"]:
        ours, peers = row["mambakit"], {**row["recorded"], **row["peers"]}
        cells = [f"{row['operator']} {row['shape']}" + ("" if "float" in row["shape"] else f", {row['dtype']}")]
        for name in PASSES:
            if name not in ours:
                cells += [""] * 4
                continue
            graph = ours.get(f"{name}, graph")
            cells.append(f"{ours[name]:.3f}" + (f" ({graph:.3f})" if graph else ""))
            best = min(
                (peer for peer in peers if name in peers[peer]), key=lambda peer: peers[peer][name], default=None
            )
            if best is None:
                cells += ["", ""]
            else:
                cells += [f"{peers[best][name]:.3f} {best}", f"{peers[best][name] / ours[name]:.2f}"]
            cells.append(f"{row['floor'][name] / ours[name]:.0%}")
        memory = [peer["MiB"] for peer in peers.values() if "MiB" in peer]
        lines.append(_row([*cells, f"{ours['MiB']:.0f}", f"{min(memory):.0f}" if memory else ""]))
    return lines


def accuracy(record: dict[str, Any]) -> list[str]:
    lines = [_row(["Relative RMS error", "Output", "Worst gradient"]), _row(["---", "---:", "---:"])]
    for row in record["accuracy"]:
        errors = dict(row["errors"])
        out = errors.pop("out")
        lines.append(_row([f"{row['shape']}, {row['dtype']}", f"{out:.1e}", f"{max(errors.values()):.1e}"]))
    return lines


def models(record: dict[str, Any]) -> list[str]:
    lines = [_row(["Work", "Tokens/s", "mamba_ssm (recorded)", "Ratio", "Peak, GB"])]
    lines.append(_row(["---"] + ["---:"] * 4))
    for row in record["models"]:
        speed, peer = row["tokens_per_second"], row.get("peer_tokens_per_second")
        beside = [f"{peer:,}", f"{speed / peer:.2f}"] if peer else ["", ""]
        lines.append(_row([row["work"], f"{speed:,.0f}", *beside, f"{row['peak_gb']:.2f}"]))
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the JSON that run.py wrote")
    record = json.loads(parser.parse_args().record.read_text())
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    print(f"{record['device']}; {versions}; commit {record['commit']}; {record['date']}; seed {record['seed']}")
    print(f"{record['clock']}. In brackets: CUDA-graph replay.")
    for name, table in (("operators", operators), ("accuracy", accuracy), ("models", models)):
        if record[name]:
            print("\n" + "\n".join(table(record)))


if __name__ == "__main__":
    main()
