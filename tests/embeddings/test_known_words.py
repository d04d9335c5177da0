"""Long words tell the classes of the training sequences that have them, but never a sequence its own."""

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


def shown(*labelled):
    return [(ids(letters)[0], label) for letters, label in labelled]


def number(word: str) -> int:
    return sum("ACGT".index(letter) * 4 ** (len(word) - 1 - i) for i, letter in enumerate(word))


def classes_of(labelled, k: int) -> dict[str, list[int]]:
    """The classes of the sequences that have each word of k letters, told without the code under test."""
    found: dict[str, list[int]] = {}
    for letters, label in labelled:
        for word in {letters[i : i + k] for i in range(len(letters) - k + 1)}:
            if "N" not in word:
                found.setdefault(word, []).append(label)
    return found


def some(seed=0) -> list[tuple[str, int]]:
    generator = torch.Generator().manual_seed(seed)
    letters = ["".join("ACGT"[i] for i in torch.randint(4, (60,), generator=generator)) for _ in range(20)]
    more = ["AAAAAAAAAA", "ACGTNACGTN", SHARED, "T" + SHARED]
    return [(one, i % 3) for i, one in enumerate(letters + more)]


@pytest.mark.parametrize("training", [True, False])
def test_a_word_tells_the_classes_of_other_training_sequences(training):
    labelled = some()
    embedding = KmerEmbedding(4, words=[2], known=[3, 5, 31], classes=3, rows=2000).double().train(training)
    learnt = embedding.learn(shown(*labelled))
    assert learnt == {k: len(classes_of(labelled, k)) for k in (3, 5, 31)}
    for letters in (labelled[0][0], labelled[23][0], "TTTTTACGTAAAAN" + SHARED, some(seed=1)[3][0]):
        told = embedding(ids(letters))[0] - embedding.weight[ids(letters)[0]]
        for t in range(len(letters)):
            expected = torch.zeros(4, dtype=torch.float64)
            for k in (3, 5, 31):
                owners = classes_of(labelled, k).get(letters[max(0, t - k + 1) : t + 1], [])
                if len(owners) > (1 if training else 0):
                    expected += embedding.known[str(k)].weight[owners[0] if len(set(owners)) == 1 else 3]
            torch.testing.assert_close(told[t], expected)


def test_in_training_no_sequence_is_told_its_own_class():
    """What a training sequence sees is the same, had its own label been another; all it knows is of others."""
    one, other = some(), some()
    for labelled in (one, other):
        labelled.append((SHARED[:20] + "CCC", 0))
    other[4] = (other[4][0], (other[4][1] + 1) % 3)  # shares no word of 9 letters or more with another sequence
    own = ids(one[4][0])
    seen = []
    for labelled in (one, other):
        torch.manual_seed(0)
        embedding = KmerEmbedding(4, words=[2], known=[9, 12], classes=3, rows=2000)
        embedding.learn(shown(*labelled))
        seen.append((embedding.train()(own), embedding.eval()(own)))
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


def test_some_training_sequences_are_told_nothing_and_in_evaluation_all_are():
    torch.manual_seed(0)
    embedding = KmerEmbedding(4, words=[2], known=[9], forget=0.25)
    embedding.learn(shown((SHARED, 0), (SHARED, 0)))
    given = ids(SHARED).expand(1000, -1)
    told = (embedding(given) - embedding.weight[given]).detach()
    rows = (told[:, 8:] != 0).all((1, 2))
    assert 0.7 < rows.double().mean() < 0.8 and (told[~rows] == 0).all()
    assert (embedding.eval()(given) != embedding.weight[given])[:, 8:].all()
    with pytest.raises(ValueError, match="KmerEmbedding: forget=1.5, expected a probability, 0 to 1"):
        KmerEmbedding(4, forget=1.5)


def test_where_rows_do_not_suffice_they_go_to_the_words_of_most_sequences():
    embedding = KmerEmbedding(4, words=[2], known=[3], rows=2)
    found = embedding.learn(shown(("TTTNAAA", 0), ("TTTNAAANCCC", 0), ("TTTNCCC", 1)))
    assert embedding.known["3"].words.tolist() == [number("AAA"), number("TTT")]  # AAA before CCC, of equals
    assert found == {3: 2} and embedding.known["3"].owners.tolist() == [[True, False], [True, True]]


def data(**options) -> GenomicsDataModule:
    motifs = Motifs(train_sequences=48, validation_sequences=16, test_sequences=16, length=40)
    return GenomicsDataModule(data="motifs", motifs=motifs, batch_size=32, **options)


def classifier() -> Classify:
    torch.manual_seed(0)
    words = KmerEmbedding(8, words=[2], known=[5, 13], rows=2000)
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
    labelled = [(decode(one), label) for one, label in genomics.training_sequences()]
    assert len(labelled) == 48 and {label for _, label in labelled} == {0, 1}
    for k in (5, 13):
        words = sorted(number(word) for word in classes_of(labelled, k))
        known = task.model.embedding.known[str(k)].words
        assert known[: len(words)].tolist() == words and (known[len(words) :] == 2**62).all()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_weights_come_with_the_same_words(first, buffers, tmp_path):
    """An average of integers is rounded: 0.99 n + 0.01 n in float32 is another number from 2^24 on."""
    task, average = classifier(), EMAWeightAveraging(decay=0.9, use_buffers=buffers)
    callbacks = [LearnWords(), average] if first else [average, LearnWords()]
    trainer = fit(task, data(), *callbacks)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    once = classifier().model.embedding
    once.learn((torch.as_tensor(one), label) for one, label in data().training_sequences())
    other = classifier()
    other.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"])
    for k in ("5", "13"):
        assert (once.known[k].words > 2**24).any()
        for name in ("words", "owners", "alone"):
            assert torch.equal(getattr(task.model.embedding.known[k], name), getattr(once.known[k], name))
            assert torch.equal(getattr(other.model.embedding.known[k], name), getattr(once.known[k], name))


def test_words_that_were_learnt_before_are_kept():
    task = classifier()
    task.model.embedding.learn(shown(("ACGTA", 1)))
    fit(task, data(), LearnWords())
    assert task.model.embedding.known["5"].words[:2].tolist() == [number("ACGTA"), 2**62]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"known=\[5, 13\], but the words of these lengths have not been learnt; give"):
        fit(classifier(), data())
    plain = Classify(Backbone(8, 1), 2, vocab_size=12)
    with pytest.raises(ValueError, match="the model has no KmerEmbedding with known words"):
        fit(plain, data(), LearnWords())
    batches = torch.utils.data.DataLoader([{"inputs": ids("ACGTACGT")[0], "labels": torch.tensor(0)}])
    with pytest.raises(ValueError, match=r"the data is no datamodule, expected one with training_sequences\(\)"):
        fit(classifier(), batches, LearnWords())
    with pytest.raises(ValueError, match=r"of 2 sequences none has a word of \[5, 13\] letters"):
        classifier().model.embedding.learn(shown(("ACG", 0), ("NNNNNNN", 1)))
    with pytest.raises(ValueError, match="a sequence of class 2, expected 0 to 1"):
        classifier().model.embedding.learn(shown(("ACGTAC", 2)))


@pytest.mark.parametrize(
    "options",
    [{"known": [32]}, {"known": [1]}, {"known": [9, 9]}, {"known": [9], "rows": 0}, {"known": [9], "classes": 1}],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=r"KmerEmbedding: known=\[.*\], classes=\d+, rows=\d+, expected lengths"):
        KmerEmbedding(4, **options)


def test_no_vector_depends_on_what_comes_later():
    torch.manual_seed(0)
    embedding = KmerEmbedding(4, words=[2], known=[3], classes=3, rows=64).double()
    embedding.learn(shown(*some()))
    given = torch.randint(7, 11, (2, 20))
    other = given.clone()
    other[:, 11:] = torch.randint(7, 11, (2, 9))
    assert torch.equal(embedding(given)[:, :11], embedding(other)[:, :11])
