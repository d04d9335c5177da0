"""The fused decoding step beside the model's own step, and the graph that replays it."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mambakit import Backbone
from mambakit.generation import generate, graph, plain, release_graphs, stream
from mambakit.generation.fused import VECTOR_ROWS, FusedStep, obstacle
from mambakit.generation.plain import GrowingState, ModelStep
from mambakit.generation.sampling import sample
from mambakit.kernels import use_backend
from mambakit.kernels.testing import assert_close
from mambakit.mixers import S5, Attention, Mamba1, Mamba2
from mambakit.models import LanguageModel

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # without a GPU the kernels run in Triton's interpreter
VOCABULARY = 21
# Rounding of the activations between operators grows along the layers.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


SMALL_HEADS: dict[str, Any] = {"kind": Mamba2, "headdim": 8, "d_state": 5}


def language_model(seed: int = 0, kind: Any = Mamba1, **mixer: object) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LanguageModel(VOCABULARY, Backbone(24, n_layers=2, mixer=partial(kind, **mixer)))
        for parameter in model.parameters():  # no ones or zeros, which would hide a weight read wrongly
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("batch", [1, 3, VECTOR_ROWS + 1])
@pytest.mark.parametrize(
    ("mixer", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"d_state": 5, "d_conv": 3, "dt_rank": 3, "bias": True, "conv_bias": False}, torch.float32),
        ({"d_conv": 2, "expand": 3}, torch.float16),
        (SMALL_HEADS, torch.float32),
        (SMALL_HEADS, torch.bfloat16),
        (SMALL_HEADS | {"ngroups": 2, "rmsnorm": False, "dt_limit": (0.3, 0.9), "bias": True}, torch.float32),
        (SMALL_HEADS | {"headdim": 3, "D_has_hdim": True, "d_conv": 2, "conv_bias": False}, torch.float16),
    ],
)
def test_a_fused_triton_step_is_the_models_step(mixer: dict, dtype: torch.dtype, batch: int) -> None:
    model = language_model(**mixer).to(DEVICE, dtype)
    _, state = model.prefill(tokens(batch, 3))
    step = FusedStep(model, batch, dtype)
    step.load(state)
    with use_backend("reference"):
        for ids in tokens(2, batch, seed=1):
            want, state = model.step(ids, state)
            step.ids.copy_(ids)
            with use_backend("auto"):
                assert_close("logits", step(), want, TOLERANCE[dtype])
    for got, wanted in zip(step.state.tensors(), state.tensors(), strict=True):
        assert_close("state", got, wanted, TOLERANCE[dtype])


def test_layers_of_several_kinds_and_sizes_share_a_step() -> None:
    kinds = {"x": partial(Mamba1, d_state=4, expand=3), "y": partial(Mamba2, headdim=8, d_state=5)}
    model = LanguageModel(VOCABULARY, Backbone(24, n_layers=3, pattern="mxy", letters=kinds)).to(DEVICE)
    for batch in (2, VECTOR_ROWS + 1):
        step, state = FusedStep(model, batch, torch.float32), model.init_state(batch)
        step.load(state)
        with torch.no_grad():
            for ids in tokens(2, batch):
                want, state = model.step(ids, state)
                step.ids.copy_(ids)
                assert_close("logits", step(), want, TOLERANCE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("mixer", [{}, SMALL_HEADS, {"kind": S5}])
def test_the_models_own_step_on_fixed_buffers(mixer: dict) -> None:
    """In place or not, its state ends where a graph expects it; in another dtype than the parameters' as autocast."""
    model = language_model(**mixer).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        step, state = ModelStep(model, 3, dtype), model.init_state(3)
        step.load(state)
        places = [tensor.data_ptr() for tensor in step.state.tensors()]
        for ids in tokens(3, 3):
            with torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
                want, state = model.step(ids, state)
            step.ids.copy_(ids)
            got = step()
            assert torch.equal(got, want) and got.dtype == dtype
        assert places == [tensor.data_ptr() for tensor in step.state.tensors()]
        for one, other in zip(step.state.tensors(), state.tensors(), strict=True):
            assert torch.equal(one, other)


@torch.no_grad()
def test_a_state_that_grows_and_modules_from_elsewhere_fit_no_graph() -> None:
    model = language_model(kind=Attention, n_heads=2).to(DEVICE)
    with pytest.raises(GrowingState):
        ModelStep(model, 2, torch.float32)()
    device = model.lm_head.weight.device
    model.backbone.dropout = type("Counting", (torch.nn.Dropout,), {"__module__": "elsewhere"})()
    assert "Counting is from elsewhere" in str(plain.obstacle(model, device, torch.float32))


def test_a_step_reads_new_values_of_the_parameters() -> None:
    model, other = language_model(), language_model(seed=1)
    steps = [FusedStep(one.to(DEVICE), 1, dtype) for one in (model, other) for dtype in (torch.float32, torch.bfloat16)]
    model.load_state_dict(other.state_dict())
    steps[1].refresh()
    with torch.no_grad():
        first, first_half, want, want_half = (step().clone() for step in steps)
    assert torch.equal(first, want)
    assert torch.equal(first_half, want_half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_argmax_takes_the_first_of_the_largest(dtype: torch.dtype) -> None:
    from mambakit.kernels.decode.triton_launch import argmax

    rows = torch.randn(4, 20_016, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)[:, :20_001]
    rows[0, [19_000, 3]] = 9.0  # two of them, in two of the blocks a row is read in
    rows[1] = -torch.inf
    rows[2, 20_000] = torch.inf
    rows[3, 16_384] = 8.0  # the first of the second block
    out = torch.full((4,), -1, device=DEVICE)
    argmax(rows, out)
    assert out.tolist() == [3, 0, 20_000, 16_384]
    argmax(torch.full((4, 7), torch.nan, device=DEVICE), out)
    assert ((out >= 0) & (out < 7)).all(), "an id, for the embedding to read, even where the logits are none"


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prompt_read_in_chunks_is_a_prompt_read_at_once(side: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "CHUNK", 4)
    model, ids, mask = language_model().to(DEVICE), tokens(3, 11), None
    if side is not None:
        lengths = torch.tensor([[11], [2], [5]], device=DEVICE)
        place = torch.arange(11, device=DEVICE)
        mask = (place if side == "right" else 10 - place) < lengths
    want, state = model.prefill(ids, mask=mask)
    reader = graph.PromptReader(model.init_state(3), torch.full_like(want, torch.nan), ids[:, 0])
    for other in (tokens(3, 7, seed=1), ids):  # the second prompt begins from an empty memory
        got = reader(model, other, None if other is not ids else mask, torch.float32)
    assert_close("logits", got, want)
    for one, wanted in zip(reader.state.tensors(), state.tensors(), strict=True):
        assert_close("state", one, wanted)


def test_a_prompt_that_cannot_be_captured_is_read_by_plain_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "captured", refuse)
    model, ids = language_model().to(DEVICE), tokens(2, 5)
    want, _ = model.prefill(ids)
    reader = graph.PromptReader(model.init_state(2), torch.full_like(want, torch.nan), ids[:, 0])
    reader.captures = True
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        assert_close("logits", reader(model, ids, None, torch.float32), want)
    assert_close("logits", reader(model, ids, None, torch.float32), want)  # and does not ask again


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.double(), "float64"),
        (lambda model: model.backbone.layers[1].mixer.register_forward_hook(print), "hooks"),
        (lambda model: setattr(model.backbone.layers[1].mixer, "in_proj", torch.nn.Bilinear(1, 1, 1)), "projection"),
        (lambda model: setattr(model.backbone.layers[1], "mixer", Attention(24, n_heads=2)), "Attention"),
        (lambda model: setattr(model.backbone.layers[1], "mixer", Mamba1(24, b_c_dt_rms="weighted")), "norms"),
        (lambda model: setattr(model.backbone.layers[1], "mixer", Mamba2(24, headdim=8, d_ssm=40)), "MLP"),
        (lambda model: setattr(model.backbone.layers[1], "mixer", Mamba2(24, headdim=8, ngroups=2)), "groups"),
        (lambda model: setattr(model.backbone, "embedding", torch.nn.Embedding(VOCABULARY, 24)), "embedding"),
        (
            lambda model: model.backbone.register_parameter("meta", torch.nn.Parameter(torch.ones(1, device="meta"))),
            "meta",
        ),
    ],
)
def test_models_that_only_their_own_step_can_serve_are_known(change: Any, named: str) -> None:
    model = language_model().to(DEVICE)
    device = model.lm_head.weight.device
    change(model)
    assert named in str(obstacle(model, device, model.lm_head.weight.dtype))
    assert "Linear" in str(obstacle(torch.nn.Linear(2, 2), device, torch.float32))


def test_the_race_of_exponentials_draws_as_multinomial_does() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        ours = sample(logits, temperature=0.7, generator=torch.Generator().manual_seed(seed))
        p = (logits / 0.7).softmax(-1)
        theirs = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
        assert torch.equal(ours, theirs)


gpu = pytest.mark.skipif(not CUDA, reason="a CUDA graph needs a CUDA device")


def ids_of_plain_steps(model: LanguageModel, prompt: Tensor, count: int, **options: Any) -> Tensor:
    with use_backend("torch"):  # for which there is no fused step
        return generate(model, prompt, count, **options)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, VECTOR_ROWS + 1])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9, "min_p": 0.02}])
@pytest.mark.parametrize("mixer", [{}, SMALL_HEADS, {"kind": S5}])
def test_a_graph_generates_what_plain_steps_do(batch: int, options: dict, mixer: dict) -> None:
    model, prompt = language_model(**mixer).to(DEVICE), tokens(batch, 4)
    for seed in (0, 1):  # the second call replays what the first captured
        draw = [torch.Generator(DEVICE).manual_seed(seed) for _ in range(2)]
        want = ids_of_plain_steps(model, prompt, 12, generator=draw[0], **options)
        assert torch.equal(generate(model, prompt, 12, generator=draw[1], **options), want)
    assert len(graph._kept[model]) == 1


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("mlp", [None, "moe"])
def test_attention_and_experts_generate_what_plain_steps_do(mlp: str | None) -> None:
    mixer = partial(Mamba1, d_state=4) if mlp else partial(Attention, n_heads=2)
    model = LanguageModel(VOCABULARY, Backbone(24, n_layers=2, mixer=mixer, mlp=mlp)).to(DEVICE).eval()
    want = ids_of_plain_steps(model, tokens(2, 4), 12, temperature=0)
    for _ in range(2):
        assert torch.equal(generate(model, tokens(2, 4), 12, temperature=0), want)


@gpu
@pytest.mark.gpu
def test_a_graph_keeps_finished_rows_and_lets_two_streams_interleave() -> None:
    model = language_model().to(DEVICE)
    free = [generate(model, tokens(3, 4, seed), 12, temperature=0) for seed in (0, 1)]
    both = zip(*(stream(model, tokens(3, 4, seed), 12, temperature=0) for seed in (0, 1)), strict=True)
    for column, ids in enumerate(both):
        for one, want in zip(ids, free, strict=True):
            assert torch.equal(one, want[:, column])
    stop = int(free[0][0, 5])
    want = ids_of_plain_steps(model, tokens(3, 4), 12, temperature=0, stop_ids=[stop])
    assert torch.equal(generate(model, tokens(3, 4), 12, temperature=0, stop_ids=[stop]), want)


@gpu
@pytest.mark.gpu
def test_a_graph_follows_the_model() -> None:
    model, other, prompt = language_model().to(DEVICE), language_model(seed=1).to(DEVICE), tokens(2, 4)
    generate(model, prompt, 8, temperature=0)
    model.load_state_dict(other.state_dict())
    want = ids_of_plain_steps(other, prompt, 8, temperature=0)
    assert torch.equal(generate(model, prompt, 8, temperature=0), want)
    model.cpu().to(DEVICE)  # other addresses
    assert torch.equal(generate(model, prompt, 8, temperature=0), want)
    with torch.autocast(DEVICE, torch.bfloat16):
        generate(model, prompt, 8, temperature=0)
    assert sorted(str(key.dtype) for key in graph._kept[model]) == ["torch.bfloat16", "torch.float32"]
    release_graphs(model)
    assert model not in graph._kept
    generate(model, prompt, 8, temperature=0)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None, "a kept graph prolongs the life of its model"
