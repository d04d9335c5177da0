"""Of long words those have a vector that two training sequences share, and they stay what they are through training."""

import itertools
from collections import Counter

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from mambakit import Backbone
from mambakit.callbacks import LearnWords
from mambakit.datamodules.genomics import GenomicsDataModule, Motifs
from mambakit.datamodules.genomics.alphabet import decode, encode
from mambakit.embeddings import KmerEmbedding
from mambakit.optim import OptimConfig
from mambakit.tasks import Classify

SHARED = "GATTACAGATTACAGATTACAGATTACATGC"  # 31 letters


def ids(*sequences: str) -> torch.Tensor:
    return torch.stack([torch.tensor(encode(one)).long() for one in sequences])


def number(word: str) -> int:
    return sum("ACGT".index(letter) * 4 ** (len(word) - 1 - i) for i, letter in enumerate(word))


def spelled(sequences, k: int) -> Counter:
    """In how many sequences each word of k letters stands, told without the code under test."""
    found = Counter()
    for one in sequences:
        found.update({one[i : i + k] for i in range(len(one) - k + 1) if "N" not in one[i : i + k]})
    return found


def test_the_words_of_two_sequences_have_a_row_and_no_other():
    generator = torch.Generator().manual_seed(0)
    sequences = ["".join("ACGT"[i] for i in torch.randint(4, (60,), generator=generator)) for _ in range(20)]
    sequences += ["AAAAAAAAAA", "ACGTNACGTN", SHARED, "T" + SHARED]
    embedding = KmerEmbedding(4, words=[2], known=[3, 5, 31], rows=1000)
    found = embedding.learn(ids(one)[0] for one in sequences)
    for k in (3, 5, 31):
        expected = sorted(number(word) for word, times in spelled(sequences, k).items() if times > 1)
        assert embedding.known[str(k)].words[: len(expected)].tolist() == expected and found[k] == len(expected)
        assert (embedding.known[str(k)].words[len(expected) :] == 2**62).all()
    assert found[31] == 1 and found[5] > 20


def test_where_rows_do_not_suffice_they_go_to_the_words_of_most_sequences():
    embedding = KmerEmbedding(4, words=[2], known=[3], rows=2)
    embedding.learn(ids(one)[0] for one in ("TTTNAAA", "TTTNAAANCCC", "TTTNCCC"))
    assert embedding.known["3"].words.tolist() == [number("AAA"), number("TTT")]  # AAA before CCC, of equals


def test_a_known_word_adds_its_vector_where_it_ends_and_an_unknown_one_nothing():
    embedding = KmerEmbedding(4, words=[2], known=[4, 6], rows=9).double()
    embedding.learn(ids("ACGTAC", "ACGTAC"))
    for k in ("4", "6"):
        torch.nn.init.normal_(embedding.known[k].weight)
    given = "TACGTACTNCGTACGT"
    vectors = embedding(ids(given))[0] - embedding.weight[ids(given)[0]]
    rows = {k: embedding.known[str(k)].words.tolist() for k in (4, 6)}
    for t in range(len(given)):
        expected = torch.zeros(4, dtype=torch.float64)
        for k in (4, 6):
            word = given[max(0, t - k + 1) : t + 1]
            if len(word) == k and "N" not in word and number(word) in rows[k]:
                expected += embedding.known[str(k)].weight[rows[k].index(number(word))]
        torch.testing.assert_close(vectors[t], expected)
    assert (vectors[6] != 0).all() and (vectors[7] == 0).all()  # ACGTAC ends at 6; nothing known ends at 7


def data(**options) -> GenomicsDataModule:
    motifs = Motifs(train_sequences=48, validation_sequences=16, test_sequences=16, length=40)
    return GenomicsDataModule(data="motifs", motifs=motifs, batch_size=16, **options)


def classifier() -> Classify:
    torch.manual_seed(0)
    words = KmerEmbedding(8, words=[2], known=[5, 7], rows=500)
    return Classify(Backbone(8, 1, embedding=words), 2, optim=OptimConfig(lr=1e-2))


def fit(task, genomics, *callbacks, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    trainer = Trainer(**quiet, enable_checkpointing=False, max_epochs=2, callbacks=list(callbacks), **options)
    trainer.fit(task, genomics)
    return trainer


@pytest.mark.parametrize("rc", [False, True])
def test_a_fit_learns_the_words_of_every_training_sequence_and_of_no_other(rc):
    """Also those that a batch would drop or turn."""
    task, genomics = classifier(), data(rc=rc)
    fit(task, genomics, LearnWords())
    sequences = [decode(one) for one in genomics.training_sequences()]
    assert len(sequences) == 48
    for k in (5, 7):
        expected = sorted(number(word) for word, times in spelled(sequences, k).items() if times > 1)
        words = task.model.embedding.known[str(k)].words
        if len(expected) <= 500:
            assert words[: len(expected)].tolist() == expected and (words[len(expected) :] == 2**62).all()
        else:
            assert set(words.tolist()) <= set(expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_weights_come_with_the_same_words(first, buffers, tmp_path):
    """An average of integers is rounded: 0.99 n + 0.01 n in float32 is another number from 2^24 on."""
    task, average = classifier(), EMAWeightAveraging(decay=0.9, use_buffers=buffers)
    callbacks = [LearnWords(), average] if first else [average, LearnWords()]
    trainer = fit(task, data(), *callbacks)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    once = classifier().model.embedding
    once.learn(data().training_sequences())
    other = classifier()
    other.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"])
    for k in ("5", "7"):
        assert torch.equal(task.model.embedding.known[k].words, once.known[k].words)
        assert torch.equal(other.model.embedding.known[k].words, once.known[k].words)
    assert task.model.embedding.known["5"].weight.abs().sum() > 0


def test_words_that_were_learnt_before_are_kept():
    task = classifier()
    task.model.embedding.learn(ids("ACGTACG", "ACGTACG"))
    fit(task, data(), LearnWords())
    assert task.model.embedding.known["7"].words[:2].tolist() == [number("ACGTACG"), 2**62]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"known=\[5, 7\], but the words of these lengths have not been learnt; give"):
        fit(classifier(), data())
    plain = Classify(Backbone(8, 1), 2, vocab_size=12)
    with pytest.raises(ValueError, match="the model has no KmerEmbedding with known words"):
        fit(plain, data(), LearnWords())
    batches = torch.utils.data.DataLoader([{"inputs": ids("ACGTACGT")[0], "labels": torch.tensor(0)}])
    with pytest.raises(ValueError, match=r"the data is no datamodule, expected one with training_sequences\(\)"):
        fit(classifier(), batches, LearnWords())
    with pytest.raises(ValueError, match=r"among 2 sequences no two share a word of \[5, 7\] letters"):
        classifier().model.embedding.learn(ids("ACGTACG", "GGGGGGG"))


@pytest.mark.parametrize("options", [{"known": [32]}, {"known": [1]}, {"known": [9, 9]}, {"known": [9], "rows": 0}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=r"KmerEmbedding: known=\[.*\], rows=\d+, expected lengths from 2 to 31"):
        KmerEmbedding(4, **options)


def test_no_vector_depends_on_what_comes_later():
    torch.manual_seed(0)
    embedding = KmerEmbedding(4, words=[2], known=[3], rows=64).double()
    embedding.learn([torch.cat([ids("".join(word))[0] for word in itertools.product("ACGT", repeat=3)])] * 2)
    torch.nn.init.normal_(embedding.known["3"].weight)
    given = torch.randint(7, 11, (2, 20))
    other = given.clone()
    other[:, 11:] = torch.randint(7, 11, (2, 9))
    assert torch.equal(embedding(given)[:, :11], embedding(other)[:, :11])
