"""Sampling filters and the generation loop, over a model small enough to check by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mambakit.generation import filter_logits, generate, sample, stream

VOCABULARY = 11
SEEDS = st.integers(0, 2**31)


class Recurrence(nn.Module):
    """h_t = a h_{t-1} + E[id_t], logits = W h_t: the interface of a language model, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, 8, generator=draw))
        self.head = nn.Parameter(torch.randn(8, VOCABULARY, generator=draw))
        self.dropout = nn.Dropout(0.5)
        self.steps = 0

    def forward(self, input_ids: Tensor, *, mask: Tensor | None = None, return_state: bool = False):
        state, rows = input_ids.new_zeros(len(input_ids), 8, dtype=torch.float32), []
        for t in range(input_ids.shape[1]):
            new = 0.7 * state + self.dropout(self.embedding[input_ids[:, t]])
            state = new if mask is None else torch.where(mask[:, t, None], new, state)
            logits_t = state @ self.head
            rows.append(logits_t if mask is None else logits_t * mask[:, t, None])  # zeros at padding, as our models
        logits = torch.stack(rows, dim=1)
        return (logits, state) if return_state else logits

    def prefill(self, input_ids: Tensor, *, mask: Tensor | None = None):
        logits, state = self(input_ids, mask=mask, return_state=True)
        if mask is None:
            return logits[:, -1], state
        return torch.stack([row[real][-1] for row, real in zip(logits, mask, strict=True)]), state

    def step(self, ids_t: Tensor, state: Tensor):
        self.steps += 1
        state = 0.7 * state + self.dropout(self.embedding[ids_t])
        return state @ self.head, state


def random_logits(seed: int, rows: int = 3) -> Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def test_filter_without_options_is_the_identity_of_the_distribution():
    logits = random_logits(0)
    torch.testing.assert_close(filter_logits(logits).softmax(-1), logits.softmax(-1))


def test_temperature_divides_the_logits():
    logits = random_logits(1)
    torch.testing.assert_close(filter_logits(logits, temperature=0.5).softmax(-1), (2 * logits).softmax(-1))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, VOCABULARY + 3))
def test_top_k_keeps_the_k_most_probable(seed, k):
    logits = random_logits(seed)
    kept = filter_logits(logits, top_k=k).isfinite()
    assert kept.sum(-1).tolist() == [min(k, VOCABULARY)] * 3
    assert (logits.masked_fill(~kept, torch.inf).amin(-1) >= logits.masked_fill(kept, -torch.inf).amax(-1)).all()


def test_top_k_keeps_k_of_equal_logits():
    assert filter_logits(torch.zeros(2, VOCABULARY), top_k=4).isfinite().sum(-1).tolist() == [4, 4]


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed, p):
    logits = random_logits(seed)
    probabilities = logits.double().softmax(-1)
    for row, kept in zip(probabilities, filter_logits(logits, top_p=p).isfinite(), strict=True):
        total = row[kept].sum().item()
        assert total >= p - 1e-6
        assert kept.sum() == 1 or total - row[kept].min().item() < p + 1e-6
        assert kept.all() or row[kept].min() >= row[~kept].max()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.0, 1.0))
def test_min_p_compares_probabilities_row_by_row(seed, share):
    logits = random_logits(seed) + torch.tensor([[0.0], [50.0], [-50.0]])  # a shift changes no probability
    probabilities = logits.double().softmax(-1)
    kept = filter_logits(logits, min_p=share).isfinite()
    ratio = probabilities / probabilities.amax(-1, keepdim=True)
    clear = (ratio - share).abs() > 1e-5
    assert torch.equal(kept[clear], (ratio >= share)[clear])
    assert kept.any(-1).all()


def test_min_p_of_a_known_row():
    logits = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).log()
    assert filter_logits(logits, min_p=0.45).isfinite().tolist() == [[True, True, False, False]]


def test_filters_compose_in_the_documented_order():
    # top-k leaves 0.4, 0.3, 0.2 (renormalised 0.44, 0.33, 0.22), of which top-p 0.7 needs two.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert filter_logits(logits, top_k=3, top_p=0.7).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.71).isfinite().tolist() == [[True, True, True, False]]


def test_temperature_zero_is_argmax_and_tiny_temperature_is_finite():
    logits = random_logits(2)
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(sample(logits * 1e4, temperature=1e-6), logits.argmax(-1))


def test_seeds_repeat_and_differ():
    def draw(seed: int) -> list[int]:
        return sample(random_logits(4, rows=64), generator=torch.Generator().manual_seed(seed)).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_sample_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    ids = sample(probabilities.log().expand(20000, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ids.bincount(minlength=3) / 20000, probabilities, atol=0.015, rtol=0)


def test_a_row_does_not_depend_on_the_others():
    logits, others = random_logits(5), random_logits(6)
    others[0] = logits[0]
    for seed in range(20):
        one, two = (sample(x, top_p=0.9, generator=torch.Generator().manual_seed(seed)) for x in (logits, others))
        assert one[0] == two[0]
    torch.testing.assert_close(filter_logits(logits, top_p=0.5)[:1], filter_logits(logits[:1], top_p=0.5))


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 1.1}],
)
def test_an_option_out_of_range_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(random_logits(0), **options)


def greedy_by_full_forward(model: Recurrence, prompt: Tensor, count: int) -> Tensor:
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompt.shape[1] :]


def prompts(rows: int = 3, length: int = 5) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def test_generate_equals_the_full_forward_at_every_step():
    model = Recurrence().eval()
    assert torch.equal(generate(model, prompts(), 12, temperature=0), greedy_by_full_forward(model, prompts(), 12))
    assert model.steps == 11, "one step for each new id after the first, which the prompt's pass gives"


def test_dropout_is_off_while_generating_and_the_mode_returns():
    model = Recurrence()
    ids = generate(model, prompts(), 8, temperature=0)
    assert model.training
    assert torch.equal(ids, greedy_by_full_forward(model.eval(), prompts(), 8))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_generate_as_alone(side):
    model, ids, lengths = Recurrence().eval(), prompts(), [5, 2, 1]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(5 - length, 5) if side == "left" else slice(0, length)
        padded[row, where], mask[row, where] = ids[row, :length], True
    together = generate(model, padded, 6, mask=mask, temperature=0)
    for row, length in enumerate(lengths):
        assert torch.equal(together[row], generate(model, ids[row : row + 1, :length], 6, temperature=0)[0])


def test_a_finished_row_repeats_its_stop_and_all_finished_ends():
    model = Recurrence().eval()
    free = generate(model, prompts(), 12, temperature=0)
    stop = int(free[0, 3])
    stopped = generate(model, prompts(), 12, temperature=0, stop_ids=[stop])
    for row in range(3):
        hits = (free[row] == stop).nonzero().flatten().tolist()
        end = hits[0] if hits else 12
        assert stopped[row, : end + 1].tolist() == free[row, : end + 1].tolist()[: stopped.shape[1]]
        assert set(stopped[row, end:].tolist()) <= {stop}
    assert generate(model, prompts(1), 12, temperature=0, stop_ids=[stop]).shape[1] == free[0].tolist().index(stop) + 1


def test_stream_hands_out_what_generate_returns_and_leaks_no_mode():
    model = Recurrence().eval()
    one = generate(model, prompts(), 5, top_k=3, generator=torch.Generator().manual_seed(7))
    ids = []
    for new in stream(model, prompts(), 5, top_k=3, generator=torch.Generator().manual_seed(7)):
        assert not torch.is_inference_mode_enabled()
        ids.append(new)
    assert torch.equal(torch.stack(ids, dim=1), one)


def test_nothing_asked_for_gives_nothing():
    assert generate(Recurrence(), prompts(), 0).shape == (3, 0)


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "prompt_ids"),
        (torch.zeros(3, dtype=torch.int64), {}, "prompt_ids"),
        (torch.zeros(1, 4), {}, "prompt_ids"),
        (prompts(), {"mask": torch.ones(3, 4, dtype=torch.bool)}, "mask"),
        (prompts(), {"mask": torch.ones(3, 5)}, "mask"),
        (prompts(), {"mask": torch.zeros(3, 5, dtype=torch.bool)}, "row 0"),
        (prompts(), {"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_arguments_are_named_at_the_call(prompt, options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        stream(Recurrence(), prompt, 3, **options)
