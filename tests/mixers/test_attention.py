"""Attention against an independent formula, its cache, its window, its errors."""

import cmath
import math

import pytest
import torch

from mambakit.kernels.testing import assert_close
from mambakit.mixers import Attention
from mambakit.mixers.attention import ROOM, AttentionState


def by_loops(model, x, window=None):
    """The docstring's equation, query by query, with each rotation a complex number: x (L, D) to (L, D)."""
    length, P, H, G = len(x), model.d_head, model.n_heads, model.n_kv_heads
    rows = model.in_proj(x)
    if model.conv1d is not None:
        weight, earlier = model.conv1d.weight, torch.cat([torch.zeros(3, rows.shape[1], dtype=x.dtype), rows])
        taps = [weight[:, 0, -1 - k] * earlier[3 - k : 3 - k + length] for k in range(weight.shape[2])]
        rows = sum(taps) + model.conv1d.bias
    rows = rows.reshape(length, H + 2 * G, P)
    q, k, v = rows[:, :H], rows[:, H : H + G], rows[:, H + G :]
    half, outputs = model.d_rotary // 2, torch.zeros(length, H, P, dtype=x.dtype)
    for t in range(length):
        seen = range(0 if window is None else max(0, t - window + 1), t + 1)
        for h in range(H):
            scores = []
            for s in seen:
                query, key = q[t, h], k[s, h // (H // G)]
                score = (query[2 * half :] * key[2 * half :]).sum().item()
                for i in range(half):
                    turn = cmath.exp(1j * (t - s) * model.rotary_base ** (-2 * i / model.d_rotary))
                    one = complex(query[i].item(), query[i + half].item()) * turn
                    score += (one * complex(key[i].item(), -key[i + half].item())).real
                scores.append(score / math.sqrt(P))
            weights = torch.tensor(scores, dtype=x.dtype).softmax(0)
            outputs[t, h] = sum(w * v[s, h // (H // G)] for w, s in zip(weights, seen, strict=True))
    return model.out_proj(outputs.flatten(1))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"n_heads": 2},
        {"n_heads": 4, "n_kv_heads": 2, "d_head": 6, "d_rotary": 4, "bias": True},
        {"n_heads": 2, "d_rotary": 0, "window": 1},
        {"n_heads": 2, "n_kv_heads": 1, "window": 3, "rotary_base": 100.0},
        {"n_heads": 2, "n_kv_heads": 1, "d_conv": 3},
    ],
    ids=["plain", "grouped", "unrotated", "window", "convolved"],
)
def test_the_equation(options):
    torch.manual_seed(0)
    model = Attention(8, **options).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    assert_close("output", model(x)[0], by_loops(model, x[0], options.get("window")), 1e-12)


@torch.no_grad()
def test_without_rotation_it_is_torchs_own_attention():
    torch.manual_seed(0)
    model = Attention(16, n_heads=2, d_rotary=0)
    x = torch.randn(2, 9, 16)
    q, k, v = model.in_proj(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert_close("output", model(x), model.out_proj(y), 1e-6)


def test_against_llama():
    """transformers' attention of Llama: rotary, grouped heads, weights copied."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = llama.LlamaConfig(**sizes, attn_implementation="eager")
    theirs = llama.LlamaAttention(config, layer_idx=0)
    ours = Attention(32, n_heads=4, n_kv_heads=2)
    with torch.no_grad():
        ours.in_proj.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.out_proj.weight.copy_(theirs.o_proj.weight)
        x = torch.randn(2, 11, 32)
        positions = llama.LlamaRotaryEmbedding(config)(x, torch.arange(11)[None])
        mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
        want = theirs(x, position_embeddings=positions, attention_mask=mask)[0]
    assert_close("output", ours(x), want, 1e-5)


@torch.no_grad()
def test_the_cache_of_a_window_stops_growing():
    model = Attention(8, n_heads=2, window=4)
    state, sizes = model.init_state(1), set()
    for x_t in torch.randn(3 * ROOM, 1, 8):
        _, state = model.step(x_t, state)
        sizes.add(state.keys.shape[1])
    assert sizes == {ROOM, ROOM + 3}
    _, state = model(torch.randn(1, 100, 8), return_state=True)
    assert state.keys.shape == (1, 3, 2, 4)
    assert state.keys.untyped_storage().nbytes() == 4 * state.keys.numel(), "a cut cache keeps what it was cut from"


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"window": 100}], ids=["all", "window"])
def test_the_cache_is_copied_seldom(options):
    """Thousand steps, a dozen copies; in between a step writes into the memory it was given."""
    model = Attention(8, n_heads=2, **options)
    x, state, places = torch.randn(1, 1000, 8), model.init_state(1), []
    want = model(x)
    for t in range(1000):
        y_t, state = model.step(x[:, t], state)
        if not places or places[-1] != state.keys.data_ptr():
            places.append(state.keys.data_ptr())
        if t % 111 == 0 or t == 999:
            assert_close(f"step {t}", y_t, want[:, t], 1e-5)
    assert len(places) <= 16


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [0, 3])
def test_an_older_state_still_ends_where_it_did(d_conv):
    """The state before a step shares memory with that after it: read on from there, it gives the same again."""
    model, x = Attention(8, n_heads=2, d_conv=d_conv), torch.randn(1, 4, 8)
    _, state = model.step(x[:, 0], model.init_state(1))
    first, _ = model.step(x[:, 1], state)
    again, _ = model.step(x[:, 1], state)
    assert torch.equal(first, again) and state.length == 1
    assert_close("another", model.step(x[:, 3], state)[0], model(x[:, [0, 3]])[:, 1], 1e-6)


@torch.no_grad()
def test_far_positions():
    """Distances decide: a sequence that begins a hundred million elements later has the same outputs."""
    model, x = Attention(8, n_heads=2), torch.randn(1, 6, 8)
    empty = model.init_state(1)
    far = AttentionState(empty.keys, empty.values, start=100_000_000)
    assert_close("outputs", model(x, state=far), model(x), 1e-5)


@torch.no_grad()
def test_the_cache_takes_the_computing_dtype():
    model, state = Attention(8, n_heads=2), Attention(8, n_heads=2).init_state(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = model.step(torch.randn(1, 8), state)
    assert state.keys.dtype == torch.bfloat16


def test_gradients_reach_a_filled_cache():
    """gradcheck with rows of unequal length: keys and values of the state are differentiable, gaps do not count."""
    torch.manual_seed(0)
    model = Attention(4, n_heads=2, n_kv_heads=1).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, False, True], [True, True, True]])
    _, state = model(torch.randn(2, 3, 4, dtype=torch.float64), mask=mask, return_state=True)
    assert state.real.tolist() == mask.tolist()
    leaves = [state.keys.detach().requires_grad_(), state.values.detach().requires_grad_()]

    def function(x, keys, values):
        y, end = model(x, state=AttentionState(keys, values, state.real), return_state=True)
        return y, end.keys, end.values

    assert torch.autograd.gradcheck(function, (x, *leaves), fast_mode=True)
    (gradient,) = torch.autograd.grad(function(x, *leaves)[0].sum(), leaves[1])
    assert bool((gradient[~mask] == 0).all()) and bool((gradient[mask] != 0).all())


@torch.no_grad()
def test_a_sequence_number_that_comes_back_is_another_sequence():
    model = Attention(8, n_heads=2)
    x = torch.randn(1, 6, 8)
    seq_idx = torch.tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32)
    assert_close("output", model(x, seq_idx=seq_idx)[:, 4:], model(x[:, 4:]), 1e-6)


@torch.no_grad()
def test_packing_after_a_state():
    """The cache belongs to the first sequence of the row alone."""
    model = Attention(8, n_heads=2)
    x = torch.randn(1, 9, 8)
    _, state = model(x[:, :3], return_state=True)
    seq_idx = torch.tensor([[4, 4, 5, 5, 5, 5]], dtype=torch.int32)
    y = model(x[:, 3:], state=state, seq_idx=seq_idx)
    assert_close("the first", y[:, :2], model(x[:, :5])[:, 3:], 1e-6)
    assert_close("the second", y[:, 2:], model(x[:, 5:]), 1e-6)


@pytest.mark.parametrize(("d_model", "heads"), [(8, 1), (64, 1), (160, 2), (768, 12), (100, 1), (200, 2), (5, 1)])
def test_default_heads(d_model, heads):
    model = Attention(d_model)
    assert (model.n_heads, model.n_heads * model.d_head) == (heads, d_model)
    assert model(torch.randn(1, 2, d_model)).shape == (1, 2, d_model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_heads": 3}, "d_model=8 .*n_heads=3"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"n_heads": 2, "n_kv_heads": 4}, "n_kv_heads=4.*n_heads=2"),
        ({"n_heads": 2, "d_rotary": 3}, "d_rotary=3.*even"),
        ({"n_heads": 2, "d_rotary": 6}, "d_rotary=6.*d_head=4"),
        ({"window": 0}, "window=0"),
        ({"d_conv": 5}, "d_conv=5"),
    ],
)
def test_sizes_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        Attention(8, **options)


def test_a_state_of_another_kind_or_batch():
    from mambakit.mixers import Mamba1

    model, x = Attention(8, n_heads=2), torch.randn(2, 3, 8)
    with pytest.raises(TypeError, match="Mamba1State.*AttentionState"):
        model(x, state=Mamba1(8).init_state(2))
    with pytest.raises(ValueError, match=r"batch size 3, x of 2"):
        model(x, state=model.init_state(3))
    with pytest.raises(ValueError, match=r"\(2, 0, 1, 8\).*n_kv_heads=2, d_head=4"):
        model(x, state=Attention(8, n_heads=1).init_state(2))
    with pytest.raises(ValueError, match="with a convolution, unlike this one"):
        model(x, state=Attention(8, n_heads=2, d_conv=2).init_state(2))
    with pytest.raises(ValueError, match="meta.*cpu"):
        model(x, state=model.init_state(2, device="meta"))
