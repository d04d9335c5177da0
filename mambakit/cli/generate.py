"""``mambakit generate``: continue a prompt with a trained language model, from its checkpoint alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from mambakit.checkpoints import load_language_model
from mambakit.cli.training import check_accelerator
from mambakit.datamodules.text import Tokenizer
from mambakit.generation import stream
from mambakit.models import LanguageModel


def run(arguments: Sequence[str]) -> None:
    """Continue a prompt with a trained language model, printing as it goes."""
    options = _parser().parse_args(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    check_accelerator(device)
    model, tokenizer = load_language_model(options.checkpoint)
    model = model.to(device)
    draw = torch.Generator(device)
    draw.manual_seed(options.seed) if options.seed is not None else draw.seed()
    for number in range(1, options.samples + 1):
        if options.samples > 1:
            print(f"--- sample {number}", flush=True)
        write(model, tokenizer, options, draw)


def write(model: LanguageModel, tokenizer: Tokenizer, options: argparse.Namespace, draw: torch.Generator) -> None:
    """Print the prompt and one continuation, piece by piece unless ``options.no_stream``.

    Raises:
        ValueError: an empty prompt, one the tokenizer cannot encode, or a sampling option outside its range.
    """
    ids = tokenizer.encode(options.prompt)
    if not len(ids):
        raise ValueError("--prompt is empty; give at least one character to continue")
    prompt = torch.tensor(ids, dtype=torch.int64, device=draw.device)[None]
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    pieces = [options.prompt]
    decoder = tokenizer.stream()
    drawn = stream(model, prompt, options.max_new, generator=draw, **sampling)
    if not options.no_stream:
        print(options.prompt, end="", flush=True)
    for new in drawn:
        pieces.append(decoder.push(int(new)))
        if not options.no_stream:
            print(pieces[-1], end="", flush=True)
    pieces.append(decoder.finish())
    print("".join(pieces) if options.no_stream else pieces[-1], flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mambakit generate", description=run.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .ckpt file that 'mambakit fit' wrote")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--max-new", type=int, default=500, metavar="N", help="tokens to draw (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set that reaches P")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw from tokens at least P times the likeliest")
    parser.add_argument("--seed", type=int, help="the same seed draws the same text (default: another each time)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="how many continuations (default: 1)")
    parser.add_argument("--no-stream", action="store_true", help="print each sample when it is whole")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    return parser
