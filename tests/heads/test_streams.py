"""A classifier that hears a sequence in pieces says what it says of the whole; and embeddings that shorten."""

from functools import partial

import pytest
import torch
from torch import nn

from mambakit import Backbone
from mambakit.embeddings import MotifEmbedding, PatchEmbedding, WaveformEmbedding
from mambakit.heads import SequenceClassifier
from mambakit.mixers import S4D, Mamba1
from mambakit.models.sashimi import SaShiMi
from mambakit.tasks import Classify

BACKBONES = {
    "mamba1": partial(Backbone, n_layers=2, mixer=partial(Mamba1, d_state=4)),
    "s4d": partial(Backbone, n_layers=2, mixer=partial(S4D, d_state=8)),
    "hybrid": partial(Backbone, n_layers=2, pattern="4a"),
    "sashimi": partial(SaShiMi, n_layers=1, pool=(2, 3), mixer=partial(S4D, d_state=4)),
}


def classifier(backbone="mamba1", pool="mean", embedding=True, dtype=torch.float64):
    """A seeded classifier of one channel whose answers differ between inputs, as a trained one's do."""
    torch.manual_seed(3)
    waveform = WaveformEmbedding(8, kernel=[5, 3], stride=[3, 2]) if embedding else None
    model = SequenceClassifier(BACKBONES[backbone](8, embedding=waveform), 3, pool=pool)
    nn.init.normal_(model.head.weight)
    return model.to(dtype).eval()


def cuts(length, seed):
    """Random lengths of pieces that sum to ``length``, many of them of one sample."""
    draw, pieces = torch.Generator().manual_seed(seed), []
    while sum(pieces) < length:
        piece = 1 if torch.rand((), generator=draw) < 0.4 else int(torch.randint(1, 40, (), generator=draw))
        pieces.append(min(piece, length - sum(pieces)))
    return pieces


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pool", ["mean", "max", "last"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("embedding", [True, False])
def test_after_each_piece_the_logits_are_those_of_all_so_far(backbone, pool, embedding, seed):
    model = classifier(backbone, pool, embedding)
    wave = torch.randn(2, 131, 1, dtype=torch.float64)
    state, at = model.init_state(2), 0
    with torch.no_grad():
        for size in cuts(131, seed):
            logits, state = model.extend(wave[:, at : at + size], state)
            at += size
            torch.testing.assert_close(logits, model(wave[:, :at]), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3), "the two streams are to be told apart"


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("backbone", ["mamba1", "s4d"])
def test_a_long_stream_in_float32_stays_within_1e_4_of_the_whole(backbone, device):
    model = classifier(backbone, dtype=torch.float32).to(device)
    wave = torch.randn(1, 16_000, 1, device=device)
    state = model.init_state(1)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for piece in wave.split(160, dim=1):
            logits, state = model.extend(piece, state)
        torch.testing.assert_close(logits, model(wave), rtol=1e-4, atol=1e-4)


def test_ids_come_in_pieces_too():
    torch.manual_seed(0)
    task = Classify(Backbone(8, 1), num_classes=3, vocab_size=7).double().eval()
    ids = torch.randint(7, (2, 20))
    state = task.init_state(2)
    for piece in ids.split([1, 12, 7], dim=1):
        logits, state = task.extend(piece, state)
    torch.testing.assert_close(logits, task(ids))


def test_streams_can_be_chosen_from_and_a_state_kept():
    model = classifier()
    wave = torch.randn(2, 60, 1, dtype=torch.float64)
    _, state = model.extend(wave[:, :25], model.init_state(2))
    kept = state.clone()
    logits, _ = model.extend(wave[1:, 25:], state.index_select(torch.tensor([1])))
    torch.testing.assert_close(logits, model(wave)[1:])
    torch.testing.assert_close(model.extend(wave[:, 25:], kept)[0], model(wave))


def padding_is_left_out(task, inputs, lengths):
    """Each row is classified as it is alone, and would not be, were its padding taken for real."""
    together = task.predict_step({"inputs": inputs, "lengths": lengths}, 0)
    for row, length in enumerate(lengths):
        alone = task.predict_step({"inputs": inputs[row : row + 1, :length]}, 0)
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(together, task.predict_step({"inputs": inputs}, 0), atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
@pytest.mark.parametrize("mixer", ["mamba1", "bidirectional"])
def test_padding_is_left_out_behind_an_embedding_that_shortens(mixer, pool):
    torch.manual_seed(0)
    backbone = Backbone(8, 1, mixer=mixer, embedding=WaveformEmbedding(8, kernel=6, stride=4))
    task = Classify(backbone, num_classes=3, pool=pool).double().eval()
    nn.init.normal_(task.model.head.weight)
    padding_is_left_out(task, torch.randn(3, 41, 1, dtype=torch.float64), torch.tensor([41, 24, 1]))


@pytest.mark.parametrize("mixer", ["mamba1", "bidirectional"])
def test_padding_is_left_out_where_every_place_has_weights_of_its_own(mixer):
    torch.manual_seed(0)
    backbone = Backbone(8, 1, mixer=mixer, embedding=MotifEmbedding(8, length=20, kernel=5, pool=4))
    task = Classify(backbone, num_classes=3, pool="flatten", places=5).double().eval()
    nn.init.normal_(task.model.head.weight)
    assert task.model.head.weight.shape == (3, 40)
    padding_is_left_out(task, torch.randint(7, 11, (3, 20)), torch.tensor([20, 9, 1]))


def test_bad_input():
    both = Classify(Backbone(8, 1, mixer="bidirectional"), num_classes=3, in_chans=1)
    with pytest.raises(ValueError, match="outputs see later elements as well.*causal mixer such as mamba1"):
        both.init_state(1)
    patches = SequenceClassifier(Backbone(8, 1, embedding=PatchEmbedding(8, 8, 4)), 3)
    with pytest.raises(ValueError, match="PatchEmbedding embeds whole inputs only; take .*WaveformEmbedding"):
        patches.init_state(1)
    with pytest.raises(ValueError, match="init_state: of effect only where backbone is a mambakit.Backbone.*a Flatten"):
        Classify(nn.Flatten(), 4).init_state(1)
    model = classifier(embedding=False)
    with pytest.raises(ValueError, match=r"inputs have shape \(1, 5, 2\).*\(batch, length, 1\)"):
        model.extend(torch.zeros(1, 5, 2, dtype=torch.float64), model.init_state(1))
