"""Time one training step of DNA models at windows of 1,024 to 1,048,576 nucleotides, batch x length constant.

    PYTHONPATH=. python3 benchmarks/dna_lengths.py --json lengths.json --chart lengths.png
    PYTHONPATH=. python3 benchmarks/dna_lengths.py --models caduceus_ps --lengths 131072 1048576 --n-layers 16

A step is loss, backward and fused AdamW under bfloat16 autocast, each layer recomputed in the backward pass: of
``caduceus_ps`` and ``caduceus_ph`` with masked labels at 15 % of the places, of ``mamba1``, ``hyena`` (its filters as
long as the window) and ``attention`` with the next nucleotide everywhere. Random weights and nucleotides. Times are
wall-clock medians of whole steps, the device idle at the start of each; nucleotides are those of the window, once,
whether a model reads one strand or both. Peak memory is PyTorch's largest allocation over a step, optimiser included.

Before that each model of two layers is compared in float32 at 300 nucleotides, loss and every gradient, with the
definitions in float64, and Caduceus-PS on the other strand with itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import git_commit
from torch import Tensor, nn

from mambakit.backbone import Backbone
from mambakit.kernels import use_backend
from mambakit.kernels.testing import assert_close
from mambakit.mixers import Hyena
from mambakit.models import Caduceus, LanguageModel, MaskedLanguageModel

IDS = 16
COLOURS = {
    "caduceus_ps": "#0b2f52",
    "caduceus_ph": "#1f6fb4",
    "mamba1": "#8fbce0",
    "hyena": "#2c8a4b",
    "attention": "#d1602a",
}


def make(name: str, d_model: int, n_layers: int, length: int) -> nn.Module:
    """The model of a name; of Caduceus-PS ``d_model`` is the width of each strand."""
    if name in ("caduceus_ps", "caduceus_ph"):
        backbone = Caduceus(d_model, n_layers, rcps=name == "caduceus_ps", gradient_checkpointing=True)
        return MaskedLanguageModel(12, backbone)
    mixer: Any = (lambda width: Hyena(width, l_max=length)) if name == "hyena" else name
    return LanguageModel(IDS, Backbone(d_model, n_layers, mixer, gradient_checkpointing=True))


def windows(name: str, batch: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids and labels (B, L) of random nucleotides; id 3 stands where one is hidden."""
    ids = torch.randint(7, 11, (batch, length + 1), device=device)
    if not name.startswith("caduceus"):
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    ids = ids[:, :-1]
    hidden = torch.rand(ids.shape, device=device) < 0.15
    hidden[:, 0] = True
    return ids.masked_fill(hidden, 3), ids.masked_fill(~hidden, -100)


def check(name: str, d_model: int, device: str, length: int = 300) -> None:
    """Loss and every gradient of two layers in float32, beside the definitions in float64; both strands."""
    torch.manual_seed(1)
    model = make(name, d_model, 2, length).to(device)
    exact = copy.deepcopy(model).double()
    ids, labels = windows(name, 2, length, device)
    loss = model.loss(ids, labels)  # type: ignore[operator]
    loss.backward()
    with use_backend("reference"):
        want = exact.loss(ids, labels)  # type: ignore[operator]
        want.backward()
    assert_close("loss", loss, want, 1e-4)
    for (part, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert_close(part, parameter.grad, other.grad, 1e-3)
    if name == "caduceus_ps":
        table = model.backbone.embedding.complement_map  # type: ignore[union-attr]
        with torch.no_grad():
            assert_close("other strand", model(table[ids.flip(1)]).flip(1)[..., table], model(ids), 1e-4)


def measure(
    name: str, length: int, tokens: int, d_model: int, n_layers: int, steps: int, device: str
) -> dict[str, Any]:
    """``milliseconds`` a step (median), ``nucleotides_per_second`` and ``peak_gb`` (10^9 bytes) at one length."""
    torch.manual_seed(0)
    model = make(name, d_model, n_layers, length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = max(1, tokens // length)
    ids, labels = windows(name, batch, length, device)

    def step() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model.loss(ids, labels)  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    cuda = device == "cuda"
    loss = step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if not torch.isfinite(loss):
        raise RuntimeError(f"dna_lengths: the loss of {name} at {length:,} is {loss.item()}")
    return {
        "model": name,
        "length": length,
        "batch": batch,
        "d_model": d_model,
        "n_layers": n_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "milliseconds": 1e3 * median(times),
        "milliseconds_all": [1e3 * seconds for seconds in times],
        "nucleotides_per_second": batch * length / median(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def draw(record: dict[str, Any], target: Path) -> None:
    """Nucleotides a second and peak memory against the length of a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharex=True, layout="constrained")
    fields = {"nucleotides_per_second": (1e-6, "million nucleotides a second"), "peak_gb": (1.0, "peak memory, GB")}
    for panel, (field, (scale, said)) in zip(panels, fields.items(), strict=True):
        for name, colour in COLOURS.items():
            rows = [row for row in record["rows"] if row["model"] == name and row[field] is not None]
            points = [(row["length"], scale * row[field]) for row in rows]
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name)
        panel.set(xlabel="nucleotides a window", ylabel=said, yscale="log")
        panel.set_xscale("log", base=2)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[0].legend(fontsize=8)
    sizes = f"{record['n_layers']} layers of {record['d_model']}, {record['tokens']:,} nucleotides a step"
    figure.suptitle(f"{record['device']}, {sizes}, {record['date'][:10]}, commit {record['commit'][:7]}", fontsize=9)
    figure.savefig(target, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=COLOURS, default=["caduceus_ps", "caduceus_ph", "mamba1", "hyena"]
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2**power for power in range(10, 21)])
    parser.add_argument("--tokens", type=int, default=2**20, help="batch x length; a longer window is a batch of 1")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--json", type=Path, help="write every figure here, after each")
    parser.add_argument("--chart", type=Path, help="draw nucleotides a second and memory against length")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; give --device cpu for a try at small sizes")
    sizes = {name: getattr(options, name) for name in ("d_model", "n_layers", "tokens")}
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": options.commit or git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **sizes,
        "rows": [],
    }
    for name in options.models:
        check(name, options.d_model, options.device)
        for length in options.lengths:
            row = None
            try:
                row = measure(name, length, steps=options.steps, device=options.device, **sizes)
            except torch.cuda.OutOfMemoryError:
                print(f"{name:12} {length:9,}: out of memory", flush=True)
            torch.cuda.empty_cache()  # not in the handler, where the failed step is still alive
            if row is None:
                continue
            record["rows"].append(row)
            memory = "" if row["peak_gb"] is None else f", peak {row['peak_gb']:.1f} GB"
            print(
                f"{name:12} {row['batch']:5} x {length:9,}: {row['milliseconds']:9.1f} ms, "
                f"{row['nucleotides_per_second']:12,.0f} nucleotides/s{memory}",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.chart:
        draw(record, options.chart)


if __name__ == "__main__":
    main()
