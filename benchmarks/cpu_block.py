"""A stack of Mamba-1 blocks on the CPU: ours beside mambapy and transformers, in one process, on the same weights.

    python benchmarks/cpu_block.py
    python benchmarks/cpu_block.py --peers mambapy,transformers --repeats 9

First the gate: every peer gets our weights, and its output and all its gradients must agree with ours, or nothing is
timed. Then the repeats of all systems are interleaved, and the median of each is taken: on a shared machine only ratios
within one run mean anything. Memory is what the resident set grows by, at its peak, over one forward and backward pass,
in a fresh process for each system. transformers' backward pass without compiled extras takes minutes:
it is timed once, and runs once more for its memory.

"forward" is inference, under ``torch.no_grad``; "forward + backward" takes gradients to every weight and to the input.
The result is printed and written as JSON with the CPU, versions, threads, commit, date and seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import mambakit
from mambakit.kernels.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
GATE_LENGTH = 64  # long enough to tell a wrong recurrence, short enough for transformers' backward pass
GATE_TOLERANCE = 1e-4  # relative RMS in float32


@dataclass
class Sizes:
    """Defaults: the project's reference case, with Mamba's ordinary d_state 16, expand 2 and d_conv 4."""

    batch: int = 4
    length: int = 512
    d_model: int = 256
    layers: int = 4


@dataclass
class Contender:
    """A module, how to call it on (B, L, d_model), and how often to time its two passes."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    backward_repeats: int | None = None  # None: as often as asked for


def ours(sizes: Sizes) -> Contender:
    torch.manual_seed(SEED)
    backbone = mambakit.Backbone(d_model=sizes.d_model, n_layers=sizes.layers, mixer="mamba1")
    return Contender(backbone, backbone)


def mambapy(sizes: Sizes) -> Contender:
    """mamba.py's ``Mamba`` with its parallel scan. It ends without a norm: ours, in plain PyTorch, is put behind it."""
    from mambapy.mamba import Mamba, MambaConfig

    module = Mamba(MambaConfig(d_model=sizes.d_model, n_layers=sizes.layers))
    module.norm_f = nn.RMSNorm(sizes.d_model, eps=1e-5)
    module.load_state_dict(ours(sizes).module.state_dict())
    return Contender(module, lambda x: module.norm_f(module(x)))


def transformers(sizes: Sizes) -> Contender:
    """transformers' ``MambaModel`` on the path it takes without compiled extras, a loop over time."""
    with root_off_the_path():
        from transformers import MambaConfig, MambaModel

        config = MambaConfig(vocab_size=1, hidden_size=sizes.d_model, num_hidden_layers=sizes.layers, use_cache=False)
        module = MambaModel(config)
    weights = ours(sizes).module.state_dict()
    module.load_state_dict({"embeddings.weight": module.embeddings.weight.detach(), **weights})
    module.embeddings.weight.requires_grad_(False)
    return Contender(module, lambda x: module(inputs_embeds=x).last_hidden_state, backward_repeats=1)


@contextmanager
def root_off_the_path() -> Iterator[None]:
    """transformers looks for a package called "kernels", and must not take our folder of that name for it."""
    before = sys.path[:]
    sys.path[:] = [entry for entry in before if Path(entry or os.curdir).resolve() != ROOT]
    try:
        yield
    finally:
        sys.path[:] = before


CONTENDERS = {"mambakit": ours, "mambapy": mambapy, "transformers": transformers}


def inputs(sizes: Sizes, length: int | None = None) -> tuple[Tensor, Tensor]:
    """x (B, L, d_model), and the gradient of the output to start the backward pass from."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (sizes.batch, length or sizes.length, sizes.d_model)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def forward(contender: Contender, x: Tensor) -> Tensor:
    with torch.no_grad():
        return contender.call(x)


def forward_backward(contender: Contender, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the weights by name and of the input."""
    x = x.detach().requires_grad_()
    contender.module.zero_grad(set_to_none=True)
    y = contender.call(x)
    y.backward(dy)
    gradients = {name: p.grad for name, p in contender.module.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **gradients}


def check(contenders: dict[str, Contender], sizes: Sizes) -> None:
    """Raise AssertionError unless every peer gives our output and our gradients, each by its name."""
    x, dy = inputs(sizes, GATE_LENGTH)
    want, want_gradients = forward_backward(contenders["mambakit"], x, dy)
    for name, contender in contenders.items():
        got, gradients = forward_backward(contender, x, dy)
        assert_close(f"{name}: output", got, want, GATE_TOLERANCE)
        assert gradients.keys() == want_gradients.keys(), gradients.keys() ^ want_gradients.keys()
        for parameter, gradient in gradients.items():
            assert_close(f"{name}: gradient of {parameter}", gradient, want_gradients[parameter], GATE_TOLERANCE)


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def measure(contenders: dict[str, Contender], sizes: Sizes, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Times in ms of every repeat, system by system; one untimed pass of each comes first, where it is cheap."""
    x, dy = inputs(sizes)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "forward_backward": []} for name in contenders}
    for repeat in range(-1, repeats):
        for name, contender in contenders.items():
            passes = {"forward": milliseconds(lambda c=contender: forward(c, x))}
            once = contender.backward_repeats
            if once is None or 0 <= repeat < once:
                passes["forward_backward"] = milliseconds(lambda c=contender: forward_backward(c, x, dy))
            if repeat >= 0:
                for kind, taken in passes.items():
                    times[name][kind].append(taken)
    return times


def peak_memory(name: str, sizes: Sizes, threads: int) -> float:
    """MB by which one forward and backward pass raises the resident set at its peak. Call in a fresh process; Linux.

    A short pass first loads what loads on first use. Then the kernel's high-water mark is reset, so that it does not
    still show what importing took.
    """
    torch.set_num_threads(threads)
    contender = CONTENDERS[name](sizes)
    forward_backward(contender, *inputs(sizes, 8))
    contender.module.zero_grad(set_to_none=True)
    x, dy = inputs(sizes)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    forward_backward(contender, x, dy)
    return (resident("VmHWM") - before) / 1e6


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (at the peak)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status).group(1))  # type: ignore[union-attr]


def describe_machine(threads: int, packages: list[str]) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    git = [
        subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "mambakit", "kernels"])
    ]
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {
            "mambakit": mambakit.__version__,
            **{package: version(package) for package in ["torch", *packages]},
        },
        "commit": git[0] + (" with changes" if git[1] else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": SEED,
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """One line a system; behind each figure, how many times ours it is."""
    columns = {"forward": "forward, ms", "forward_backward": "forward + backward, ms", "memory": "peak memory, MB"}
    lines = ["| system | " + " | ".join(columns.values()) + " |", "|---|---:|---:|---:|"]
    for name, row in results.items():
        cells = [
            f"{row[key]:,.1f} ({row[key] / results['mambakit'][key]:.2f}x)" if key in row else "-" for key in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="mambapy", help="comma-separated: mambapy, transformers")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each system")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--json", type=Path, default=Path("cpu_block.json"), help="where the result is written")
    for field, default in asdict(Sizes()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    arguments = parser.parse_args()
    peers = [peer for peer in arguments.peers.split(",") if peer]
    for peer in peers:
        if peer not in CONTENDERS:
            parser.error(f"--peers names {peer!r}; expected mambapy, transformers or both")
    sizes = Sizes(**{field: getattr(arguments, field) for field in asdict(Sizes())})
    torch.set_num_threads(arguments.threads)

    names = ["mambakit", *peers]
    contenders = {name: CONTENDERS[name](sizes) for name in names}
    check(contenders, sizes)
    print(f"{', '.join(names)}: outputs and gradients agree within {GATE_TOLERANCE:g} (relative RMS)", flush=True)

    times = measure(contenders, sizes, arguments.repeats)
    results = {name: {kind: statistics.median(taken) for kind, taken in times[name].items()} for name in names}
    if sys.platform == "linux":
        for name in names:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                results[name]["memory"] = fresh.submit(peak_memory, name, sizes, arguments.threads).result()

    print("In brackets: times mambakit's figure of this run; above 1 is slower, or more.")
    print(table(results))
    record = {"sizes": asdict(sizes), **describe_machine(arguments.threads, peers), "median": results, "ms": times}
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
