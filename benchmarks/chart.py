"""Draw time against length from the JSON of ``run.py``.

python benchmarks/chart.py figures.json time_against_length.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from peers import CUDA_SCAN, SCAN

TOKENS = 16384
PASSES = ("forward", "forward + backward")
SYSTEMS = {  # colour, marker
    "selective_scan": ("#1f6fb4", "o"),
    "SDPA (flash)": ("#d1602a", "s"),
    "vectorised PyTorch": ("#7a7a7a", "^"),
}
# The recorded shapes that fill a GPU, as (length, B L D): their times are scaled to 16,384 tokens of 2,048 channels.
RECORDED = {"lm": (2048, 8 * 2048 * 2048), "long64k": (65536, 65536 * 1024), "long1m": (1048576, 1048576 * 256)}


def draw(record: dict[str, Any], target: Path) -> None:
    """Two log-log panels, forward and forward plus backward: milliseconds for 16,384 tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    for index, (panel, name) in enumerate(zip(panels, PASSES, strict=True)):
        for system, (colour, marker) in SYSTEMS.items():
            points = [
                (row["length"], row[system][name] * TOKENS / (row["length"] * row["batch"]))
                for row in record["sweep"]
                if system in row
            ]
            if points:
                label = "selective_scan (mambakit)" if system == "selective_scan" else system
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)
        if "H200" in record["device"]:
            peer = [(length, SCAN[shape][index] * TOKENS * 2048 / work) for shape, (length, work) in RECORDED.items()]
            panel.plot(
                *zip(*peer, strict=True), "D", color="#2c8a4b", markersize=6, label=f"{CUDA_SCAN}, scaled to this work"
            )
        panel.set(title=name, xlabel="sequence length", xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[0].set_ylabel("milliseconds for 16,384 tokens, d_model 1,024")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{record['device']}, bfloat16, {record['date'][:10]}, commit {record['commit'][:7]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the JSON that run.py wrote, its sweep included")
    parser.add_argument("target", type=Path, help="the picture to write")
    options = parser.parse_args()
    draw(json.loads(options.record.read_text()), options.target)


if __name__ == "__main__":
    main()
