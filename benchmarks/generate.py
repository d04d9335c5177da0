"""Generation with a language model of Mamba-1 or Mamba-2, random weights, one GPU: right first, then tokens a second.

    PYTHONPATH=. python3 benchmarks/generate.py                       # the table of the peers
    PYTHONPATH=. python3 benchmarks/generate.py --only 130m_b1 --profile
    PYTHONPATH=. python3 benchmarks/generate.py --json out.json

First the fused decoding step is compared with the model's own ``step``, logits and states, along the same ids. Then
``generate`` is timed as a user calls it, prompt included, between two synchronisations: the median of ``repeats``
calls after one that compiles and captures. The time of a token alone is a graph replay's. Greedy, vocabulary 50,277,
weights in bfloat16. ``of floor``: the time to read every matrix once a token, at 4.3e12 bytes a second, over the
replay's time; with many rows the states' reading and writing counts too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mambakit import Backbone
from mambakit.backbone import MixerName
from mambakit.generation import generate, release_graphs
from mambakit.generation.fused import FusedStep, obstacle
from mambakit.generation.graph import Decoder
from mambakit.generation.sampling import SamplingOptions
from mambakit.models import LanguageModel

VOCABULARY = 50_277
BYTES_A_SECOND = 4.3e12  # an H200's device-to-device copy, reading and writing counted


class Work(NamedTuple):
    """A model's size and what it is asked to generate; ``peer``: tokens a second of mamba_ssm 2.3.2 on an H200."""

    d_model: int
    n_layers: int
    batch: int
    prompt: int
    new: int
    peer: float | None
    mixer: MixerName = "mamba1"


WORKS = {
    "130m_b1": Work(768, 24, 1, 128, 128, 1_160),
    "1.4b_b1": Work(2048, 48, 1, 128, 128, 413),
    "130m_b64": Work(768, 24, 64, 2048, 128, 33_972),
    "1.4b_b128": Work(2048, 48, 128, 2048, 128, 6_680),
    "mamba2_130m_b1": Work(768, 24, 1, 128, 128, 925, "mamba2"),
    "mamba2_130m_b64": Work(768, 24, 64, 2048, 128, 29_388, "mamba2"),
}


def measure(
    name: str = "130m_b1", *, dtype: torch.dtype = torch.bfloat16, temperature: float = 0.0, repeats: int = 5
) -> dict[str, Any]:
    """Check, then time, one of ``WORKS`` on the current CUDA device.

    Args:
        name: a key of ``WORKS``.
        dtype: of the parameters.
        temperature: of the draws; 0 is greedy.
        repeats: timed calls.

    Returns:
        Figures by name: tokens_per_second (prompt included), step_milliseconds (one replay), step_of_floor,
        prompt_milliseconds, peak_bytes, logits_error (relative RMS against ``model.step``), peer_tokens_per_second.

    Raises:
        RuntimeError: the fused step cannot serve here, or disagrees with ``model.step``.
    """
    work = WORKS[name]
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    model = build(work, dtype, device)
    reason = obstacle(model, device, dtype)
    if reason is not None:
        raise RuntimeError(f"generate: the fused step cannot serve here: {reason}")
    error = check(model, dtype)
    prompt = torch.randint(VOCABULARY, (work.batch, work.prompt), device=device)
    torch.cuda.reset_peak_memory_stats()

    def call() -> None:
        generate(model, prompt, work.new, temperature=temperature)

    call()
    seconds = statistics.median(seconds_of(call) for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated()
    release_graphs(model)
    with torch.inference_mode():
        graphed = Decoder(FusedStep(model, work.batch, dtype), SamplingOptions(temperature))
        graphed.read(model, prompt, None)
        reading = statistics.median(seconds_of(lambda: graphed.read(model, prompt, None)) for _ in range(repeats))
        step = seconds_of(lambda: [graphed.graph.replay() for _ in range(100)]) / 100
        floor = step_bytes(graphed.step) / BYTES_A_SECOND
    return {
        "work": name,
        **work._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "temperature": temperature,
        "tokens_per_second": work.batch * work.new / seconds,
        "step_milliseconds": 1e3 * step,
        "step_of_floor": floor / step,
        "prompt_milliseconds": 1e3 * reading,
        "peak_bytes": peak,
        "logits_error": error,
        "peer_tokens_per_second": work.peer,
    }


def build(work: Work, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    with device:
        model = LanguageModel(VOCABULARY, Backbone(work.d_model, work.n_layers, work.mixer))
    return model.to(dtype).eval().requires_grad_(False)


@torch.inference_mode()
def check(model: LanguageModel, dtype: torch.dtype, batch: int = 3, length: int = 8) -> float:
    """Relative RMS of the fused step's logits against ``model.step``'s, few rows and many, along random ids.

    Raises:
        RuntimeError: an error above 3 % (bfloat16's, along a stack of layers), or not finite.
    """
    worst = 0.0
    for rows in (batch, 8 * batch):
        ids = torch.randint(VOCABULARY, (rows, length), device=model.lm_head.weight.device)
        _, state = model.prefill(ids)
        step = FusedStep(model, rows, dtype)
        step.load(state)
        for column in ids.t():
            want, state = model.step(column, state)
            step.ids.copy_(column)
            got, want = step().double(), want.double()
            error = float((got - want).norm() / want.norm())
            if not error < 0.03:
                raise RuntimeError(f"generate: the fused step's logits are {error:.3g} off those of model.step")
            worst = max(worst, error)
    return worst


def seconds_of(function: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def step_bytes(step: FusedStep) -> int:
    """What one step must move: every matrix once, the states in and out."""
    matrices = [step.head] + [matrix for layer in step.layers for matrix in layer.matrices]
    states = step.state.tensors()
    return sum(m.numel() * m.element_size() for m in matrices) + 2 * sum(s.numel() * s.element_size() for s in states)


def profile(name: str) -> None:
    """Print the kernels of 20 replays by time."""
    work, device = WORKS[name], torch.device("cuda", torch.cuda.current_device())
    model = build(work, torch.bfloat16, device)
    with torch.inference_mode():
        graphed = Decoder(FusedStep(model, work.batch, torch.bfloat16), SamplingOptions(0.0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(20):
                graphed.graph.replay()
            torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=16, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the most probable id")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step by time instead")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = []
    for name in options.only:
        if options.profile:
            profile(name)
            continue
        figures.append(one := measure(name, temperature=options.temperature))
        print(
            f"{name:15} {one['tokens_per_second']:9,.0f} tokens/s (peer {one['peer_tokens_per_second']:,.0f})   "
            f"step {one['step_milliseconds']:.3f} ms, {one['step_of_floor']:.0%} of floor   "
            f"prompt {one['prompt_milliseconds']:.1f} ms   peak {one['peak_bytes'] / 2**30:.2f} GiB   "
            f"logits {one['logits_error']:.2g}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
