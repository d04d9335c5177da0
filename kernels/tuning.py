"""Choosing a launch's configuration: a rule by default, a short measurement where the user asks for one.

Every kernel's launch code has a rule, written down beside it and measured on an H200, that gives its tile sizes and
warps for a shape. The rule alone decides by default, so that results are the same bits from run to run and the first
call on a new shape costs nothing but its compilation. Inside ``with autotune():`` each new shape is timed once with
at most ``MOST_CANDIDATES`` configurations, the rule's among them, within ``BUDGET`` seconds, and the fastest is kept:
in memory, and in a small file in the user's cache directory that later ``autotune()`` blocks read. That file's name
holds the GPU, Triton's version and a hash of the kernels' source, so a winner never outlives what it was measured on.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

MOST_CANDIDATES = 4
BUDGET = 10.0  # seconds for one key, compilation included: a candidate that may not fit into the rest is not tried
REPEATS = 25
MARGIN = 0.03  # a candidate must be this much faster than the rule: less is noise, and the rule is the steadier choice

Config = TypeVar("Config", bound=NamedTuple)
Key = tuple[str | int | bool | None, ...]

_active = False
_winners: dict[Path, dict[str, list[int]]] = {}  # of each file read or written: a key's JSON to the winner's fields


@contextmanager
def autotune() -> Iterator[None]:
    """Inside, each kernel times a few configurations on every new shape, once, and keeps the fastest.

    >>> with autotune():
    ...     train_one_step(model, batch)     # then train inside, too: outside, the rule is back

    What is fastest is found by timing, so two runs may settle on different configurations, whose results differ by
    rounding; with the winners in the cache file they settle on the same. Nothing is timed while a CUDA graph is
    captured or torch.compile traces. It holds for all threads, since backward passes run in threads of their own.
    """
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


def is_tuning() -> bool:
    """Whether an :func:`autotune` block is open: outside one, launch code need not ask for more than its rule."""
    return _active


def choose_config(key: Key, candidates: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """``candidates[0]``, the rule's choice; inside :func:`autotune` the fastest of the first ``MOST_CANDIDATES``.

    Args:
        key: what the best choice depends on: the kernel's name, the shape, the dtypes, the options.
        candidates: named tuples of integers.
        run: launches the kernel with a configuration, into buffers that may be overwritten as often as wished. One
            whose launch fails in Triton (too much shared memory, say) is passed over; an error of the rule's is raised.
    """
    if not _active or len(candidates) < 2 or not _may_time():
        return candidates[0]
    candidates = candidates[:MOST_CANDIDATES]
    file = cache_file(torch.cuda.current_device())
    winners = _read(file)
    name = json.dumps(key)
    known = [config for config in candidates if list(config) == winners.get(name)]
    if known:
        return known[0]
    best = _fastest(candidates, run)
    winners[name] = list(best)
    _write(file)
    return best


def _may_time() -> bool:
    """Timing waits for the GPU, which a capture forbids and which fake tensors do not have."""
    return not (
        torch.compiler.is_compiling() or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()
    )


def _fastest(candidates: Sequence[Config], run: Callable[[Config], object]) -> Config:
    from triton.errors import TritonError

    best, least, longest = candidates[0], float("inf"), 0.0
    start = last = time.monotonic()
    for config in candidates:
        if last - start + longest > BUDGET:
            break
        try:
            took = _milliseconds(run, config)
        except TritonError:
            if config is candidates[0]:
                raise
            took = float("inf")
        if config is candidates[0]:
            least = (1 - MARGIN) * took
        elif took < least:
            best, least = config, took
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return best


def _milliseconds(run: Callable[[Config], object], config: Config) -> float:
    """The median of ``REPEATS`` launches by CUDA events, the first, which compiles, left out."""
    run(config)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(REPEATS)]
    for begin, end in events:
        begin.record()
        run(config)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


@cache
def cache_file(device: int) -> Path:
    """Where the winners of a CUDA device are kept: one file for each GPU model, Triton version and kernel source."""
    import triton

    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return cache_directory() / f"{gpu}-triton-{triton.__version__}-{source.hexdigest()[:12]}.json"


def cache_directory() -> Path:
    """``mambakit/kernels`` in the place the platform has for caches."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mambakit" / "kernels"


def _read(file: Path) -> dict[str, list[int]]:
    """The winners of ``file``, read at the first need."""
    if file not in _winners:
        _winners[file] = load(file)
    return _winners[file]


def load(file: Path) -> dict[str, list[int]]:
    """What ``file`` keeps: a key's JSON to the winner's fields; nothing where it is missing or broken."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path) -> None:
    """Add this process's winners to those that others have written since; whole or not at all."""
    winners = load(file) | _winners[file]
    scratch = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(winners, indent=1) + "\n", encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        warnings.warn(
            f"autotune: {file} could not be written ({error}); its winners last for this process", stacklevel=2
        )
