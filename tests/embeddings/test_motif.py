"""A vector says how well each motif fits best in its window, whatever is padded; and each place may have weights."""

import pytest
import torch
from torch import nn

from mambakit import Backbone
from mambakit.embeddings import MotifEmbedding
from mambakit.heads.classify import SequenceClassifier, flatten


def made(**options) -> MotifEmbedding:
    torch.manual_seed(0)
    embedding = MotifEmbedding(5, length=23, **options)
    nn.init.normal_(embedding.pos_embed)
    return embedding.double()


@pytest.mark.parametrize(("kernel", "window"), [(1, 1), (5, 4), (9, 23), (3, 8)])
def test_each_vector_is_the_best_fit_within_its_window_and_the_place_of_that(kernel, window):
    embedding = made(kernel=kernel, pool=window)
    ids = torch.randint(12, (2, 23), generator=torch.Generator().manual_seed(1))
    weight, bias = embedding.motifs.weight, embedding.motifs.bias
    vectors = embedding(ids)
    for row in range(2):
        for j in range(-(-23 // window)):
            fits = []
            for t in range(j * window, min(23, (j + 1) * window)):
                score = bias.clone()
                for m in range(kernel):
                    if 0 <= t + m - kernel // 2 < 23:
                        score = score + weight[:, ids[row, t + m - kernel // 2], m]
                fits.append(nn.functional.gelu(score))
            torch.testing.assert_close(vectors[row, j], torch.stack(fits).amax(0) + embedding.pos_embed[j])


@pytest.mark.parametrize("length", [1, 4, 9, 22])
def test_padding_changes_nothing_of_the_windows_that_are_real(length):
    embedding, generator = made(kernel=5, pool=4), torch.Generator().manual_seed(1)
    ids = torch.randint(12, (1, 23), generator=generator)
    mask = torch.arange(23)[None] < length
    kept = embedding.shorten(mask)[0]
    assert kept.tolist() == [4 * j < length for j in range(6)]
    alone = embedding(ids[:, :length])
    torch.testing.assert_close(embedding(ids, mask=mask)[:, kept], alone)
    assert not torch.allclose(embedding(ids)[:, kept], alone)
    assert embedding(ids, mask=mask).isfinite().all()


def test_flatten_gives_every_place_weights_of_its_own():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 3, [True, False, False]])
    flat = flatten(hidden, 5, mask).unflatten(1, (5, 4))
    torch.testing.assert_close(flat[:, :3], hidden * mask[..., None])
    assert (flat[:, 3:] == 0).all()
    with pytest.raises(ValueError, match="sequences of 3 vectors, expected at most places=2"):
        flatten(hidden, 2)


def test_dropout_is_of_training_alone_and_leaves_the_place():
    embedding = made(dropout=0.99)
    ids = torch.randint(7, 11, (8, 23))
    assert (embedding(ids) == embedding.pos_embed).double().mean() > 0.9
    assert not (embedding.eval()(ids) == embedding.pos_embed).any()


def test_bad_input():
    for options in ({"kernel": 4}, {"kernel": 0}, {"pool": 0}, {"pool": 24}):
        with pytest.raises(ValueError, match="MotifEmbedding: kernel=.*expected an odd kernel"):
            MotifEmbedding(4, length=23, **options)
    with pytest.raises(ValueError, match="sequences of 24, expected at most 23 places"):
        made()(torch.zeros(1, 24, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"ids have dtype torch.float32"):
        made()(torch.zeros(1, 3))
    for pool, places in (("flatten", None), ("mean", 4), ("flatten", 0)):
        with pytest.raises(ValueError, match=f"pool='{pool}' with places={places}; give places"):
            SequenceClassifier(Backbone(8, 1), 2, pool=pool, places=places)
    placed = SequenceClassifier(Backbone(8, 1), 2, vocab_size=12, pool="flatten", places=4)
    with pytest.raises(ValueError, match="pool='flatten' needs each vector at its place"):
        placed.init_state(1)
