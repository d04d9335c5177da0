"""A vector is of the letter, the words that end there and the place; unknown words say nothing; no future is seen."""

import itertools

import pytest
import torch

from mambakit import Backbone
from mambakit.datamodules.genomics.alphabet import NUCLEOTIDES, encode
from mambakit.embeddings import KmerEmbedding
from mambakit.optim import OptimConfig
from mambakit.tasks import Classify, MaskedLM

WORDS = {k: ["".join(word) for word in itertools.product("ACGT", repeat=k)] for k in (2, 3)}


def ids(*sequences: str) -> torch.Tensor:
    return torch.stack([torch.tensor(encode(one)).long() for one in sequences])


def filled(**options) -> KmerEmbedding:
    torch.manual_seed(0)
    embedding = KmerEmbedding(4, **options)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter)
    return embedding.double()


def test_a_vector_is_the_sum_of_the_letter_its_words_and_the_placed_word():
    embedding = filled(words=[3, 2], length=7, placed=2, span=3)
    sequences = ["ACGTTNA", "TTTTTTT", "GANTCAG"]
    vectors = embedding(ids(*sequences))
    for row, letters in enumerate(sequences):
        for t in range(7):
            expected = embedding.weight["ACGTN".index(letters[t]) + 7].clone()
            for k, all_words in WORDS.items():
                word = letters[max(0, t - k + 1) : t + 1]
                if word in all_words:
                    expected += embedding.tables[str(k)][all_words.index(word)]
                    if k == 2:
                        expected += embedding.places[t // 3, all_words.index(word)]
            torch.testing.assert_close(vectors[row, t], expected)


def test_at_the_start_only_letters_speak_and_only_words_that_came_are_moved():
    torch.manual_seed(0)
    embedding = KmerEmbedding(4, words=[2], length=4, placed=1)
    given = ids("ACAC")
    torch.testing.assert_close(embedding(given), embedding.weight[given])
    embedding(given).sum().backward()
    moved = embedding.tables["2"].grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [WORDS[2].index("AC"), WORDS[2].index("CA")]
    assert embedding.places.grad.abs().sum(-1).nonzero().tolist() == [[0, 0], [0, 1]]


def test_no_vector_depends_on_what_comes_later():
    embedding, generator = filled(words=[2, 5, 8], length=20), torch.Generator().manual_seed(1)
    given = torch.randint(NUCLEOTIDES[0], NUCLEOTIDES[-1] + 2, (3, 20), generator=generator)
    other = given.clone()
    other[:, 11:] = torch.randint(0, 12, (3, 9), generator=generator)
    assert torch.equal(embedding(given)[:, :11], embedding(other)[:, :11])
    assert not torch.equal(embedding(given)[:, 11:], embedding(other)[:, 11:])


def test_dropout_is_of_training_alone():
    embedding = filled(words=[2], dropout=0.5)
    given = ids("ACGTACGT")
    assert (embedding(given) == 0).any() and not (embedding.eval()(given) == 0).any()


def test_it_serves_a_classifier_and_masked_pretraining_but_no_stream():
    task = Classify(Backbone(8, 1, embedding=KmerEmbedding(8, words=[2, 3])), 2, optim=OptimConfig())
    assert task(ids("ACGTAC")).shape == (1, 2)
    with pytest.raises(ValueError, match="KmerEmbedding embeds whole inputs only"):
        task.init_state(1)
    model = MaskedLM(12, Backbone(8, 1, embedding=KmerEmbedding(8, words=[2]))).model
    assert model(ids("ACGTAC")).shape == (1, 6, 12) and model.lm_head.weight is model.backbone.embedding.weight


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"words": []}, r"words=\[\], expected lengths from 2 to 10, each once"),
        ({"words": [4, 4]}, r"words=\[4, 4\], expected"),
        ({"words": [11]}, r"words=\[11\], expected"),
        ({"words": [1]}, r"words=\[1\], expected"),
        ({"placed": 0}, "placed=0, expected 1 to 10"),
        ({"length": 0}, "length=0, span=4, expected at least 1"),
        ({"span": 0}, "length=None, span=0, expected at least 1"),
        ({"first": 9}, "first=9, expected 0 to 8"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(ValueError, match=f"KmerEmbedding: {said}"):
        KmerEmbedding(4, **options)


def test_longer_sequences_and_what_is_no_id_are_named():
    with pytest.raises(ValueError, match="sequences of 6, expected at most 5 places"):
        KmerEmbedding(4, length=5)(ids("ACGTAC"))
    with pytest.raises(TypeError, match=r"ids have dtype torch.float32"):
        KmerEmbedding(4)(torch.zeros(1, 3))
