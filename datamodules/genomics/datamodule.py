"""GenomicsDataModule: DNA of any source as batches, to label, to predict base by base, or to fill in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from mambakit.datamodules.base import DataModule
from mambakit.datamodules.genomics import kmers, parts, splits
from mambakit.datamodules.genomics.alphabet import VOCAB_SIZE, Ambiguous, SoftMasked
from mambakit.datamodules.genomics.dataset import Pretraining, Sequences, Shape, ShuffledItems, TaskName, widened
from mambakit.datamodules.genomics.fasta import Reading
from mambakit.datamodules.genomics.intervals import PastEnd
from mambakit.datamodules.genomics.labelled import Columns
from mambakit.datamodules.genomics.motifs import Motifs
from mambakit.datamodules.genomics.options import MOTIFS, check_together
from mambakit.datamodules.genomics.sources import Records, SequenceSource
from mambakit.datamodules.genomics.splits import RaiseOrDrop, SplitName
from mambakit.datamodules.samplers import ResumableDataLoader

_PARTS = ("train", "validation", "test")
# Bases in all parts up to which :meth:`GenomicsDataModule.describe` looks for near-copies between parts cut at random.
_COMPARED = 20_000_000


class GenomicsDataModule(DataModule):
    """DNA as ids of single nucleotides (:mod:`mambakit.datamodules.genomics.alphabet`), padded to batches.

    A batch is a dict; ``index`` (B,) int64, the sequence within its part (for :meth:`sequence_name`), is always there.
    By ``task``:

    - ``classify``: ``inputs`` (B, L) int64, ``labels`` (B,) int64, ``lengths`` (B,) int64, bases before padding;
    - ``next_token``: ``input_ids`` (B, L) int64; ``labels`` (B, L) int64, the base after each, -100 where nothing is
      asked;
    - ``masked``: ``input_ids`` (B, L) int64 with MASK, another nucleotide or itself at the bases asked (80, 10, 10 %);
      ``labels`` (B, L) int64, those bases, -100 elsewhere.

    The last two have ``mask`` (B, L) bool, True before padding, where sequences differ in length.

    Everything follows from ``seed``, whatever ``num_workers`` is: the order, and what is drawn for a sequence, which
    depends on the seed, the pass and the sequence alone. A run stopped in the middle of an epoch goes on with the
    batches it would have seen. Under several processes each takes its share, ``batch_size`` sequences a step. What is
    cut off for validation and test follows from ``split_seed``; a test part that the data has never serves for anything
    else. No place of a genome is in windows of two parts, and no sequence in two parts; with split ``groups`` sequences
    of two parts share no stretch of k bases either.

    ``length``, ``batch_size`` and ``samples_per_epoch`` may be set anew between epochs (a warm-up of length); they are
    read by ``train_dataloader``.

    Args:
        data: the DNA: ``motifs`` (generated, no download); a FASTA file for each class, by its name; the folder of one
            task of Genomic Benchmarks or of the Nucleotide Transformer (:func:`.labelled.from_folder`); a table (.csv,
            .tsv) with a row for each sequence; or one FASTA file without labels. With ``intervals`` or chromosomes, a
            genome: an indexed FASTA file, plain or packed by bgzip; or one for each species, by its name.
        root: the folder against which relative paths are resolved.
        task: ``classify``, ``next_token`` or ``masked``.
        intervals: a BED file (chromosome, start, end, split), as Basenji's and Enformer's: windows around these.
        train_chromosomes: names (``2``, ``X``) of the chromosomes of which windows are drawn at random for training.
        validation_chromosomes: likewise for validation.
        test_chromosomes: likewise for test.
        reference: of Genomic Benchmarks: the FASTA file that its places are of, or one for each class.
        sequence_column: of a table.
        label_column: of a table.
        split_column: of a table: train, validation or test.
        motifs: options of data motifs.
        soft_masked: of lower case: read as ``upper`` case, ``keep-as-N``, or ``error``.
        ambiguous: of IUPAC's letters for several nucleotides: read as ``N``, or ``error``.
        length: bases at most; of windows, bases exactly.
        validation_length: of validation and test; ``length`` unless given.
        max_length: the largest that ``length`` is going to be; intervals must not overlap between parts at that. The
            larger of both unless given.
        too_long: of longer sequences, ``raise`` names the first; ``crop`` takes a piece from anywhere in training and
            from the middle in evaluation.
        past_end: of an interval that grows past its chromosome's end: ``raise``, ``shift`` it inside, or ``pad`` it
            with N.
        overlap: where windows of two parts share a base, or sequences of two given parts a group: ``raise``, or
            ``drop`` those of training (and, against test, of validation). Test stays whole.
        most_n: fraction of N above which a random window of a chromosome is drawn anew.
        evaluation_windows: windows of chromosomes in validation and in test; always the same ones.
        pad_to_multiple: pad batches to a multiple of so many bases.
        rc: replace half of the training sequences, drawn anew each time, by their reverse complements.
        mask_fraction: of task masked: probability of a nucleotide to be asked.
        eos: of task next_token: SEP follows the last base, as in HyenaDNA.
        ignore_n: of task next_token: N is never asked.
        batch_size: sequences in a training batch of one process, B.
        validation_batch_size: of validation and test; ``batch_size`` unless given.
        samples_per_epoch: sequences in an epoch; all of them unless given, of chromosomes as many as lie side by side.
        split: how parts are cut: by ``groups`` of sequences that share ``k`` bases on either strand, each whole in one
            part; or at ``random``, as published figures on most sets are, near-copies in both parts.
        k: bases that no two parts may share, 1 to 31.
        validation_fraction: the part of the training sequences held out for validation, where the data has no part for
            it.
        test_fraction: likewise for test.
        split_seed: decides which sequences are held out, and those of motifs.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        seed: decides order, places, strands and masks.

    Raises:
        ValueError: an option outside its range, an unknown letter, parts that overlap, an index older than its FASTA
            file, an interval past its chromosome's end, a file that is not as it should be.
        FileNotFoundError: no such data; says what to give.
    """

    validation_data = None
    test_data = None

    def __init__(
        self,
        data: str | dict[str, str] = MOTIFS,
        root: str = ".",
        task: TaskName = "classify",
        intervals: str | None = None,
        train_chromosomes: list[str | int] | None = None,
        validation_chromosomes: list[str | int] | None = None,
        test_chromosomes: list[str | int] | None = None,
        reference: str | dict[str, str] | None = None,
        sequence_column: str = "sequence",
        label_column: str = "label",
        split_column: str | None = None,
        motifs: Motifs | None = None,
        soft_masked: SoftMasked = "upper",
        ambiguous: Ambiguous = "N",
        length: int | None = None,
        validation_length: int | None = None,
        max_length: int | None = None,
        too_long: Literal["raise", "crop"] = "raise",
        past_end: PastEnd = "raise",
        overlap: RaiseOrDrop = "raise",
        most_n: float = 0.5,
        evaluation_windows: int = 512,
        pad_to_multiple: int = 1,
        rc: bool = False,
        mask_fraction: float = 0.15,
        eos: bool = False,
        ignore_n: bool = True,
        batch_size: int = 32,
        validation_batch_size: int | None = None,
        samples_per_epoch: int | None = None,
        split: SplitName = "groups",
        k: int = kmers.MOST,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data = data
        self.root = root
        self.task = task
        self.intervals = intervals
        named = {"train": train_chromosomes, "validation": validation_chromosomes, "test": test_chromosomes}
        self.held = {part: [str(name) for name in names] for part, names in named.items() if names}
        self.reference = reference
        self.columns = Columns(sequence_column, label_column, split_column)
        self.motifs = motifs
        self.soft_masked = soft_masked
        self.ambiguous = ambiguous
        self.length = length
        self.validation_length = length if validation_length is None else validation_length
        self.max_length = max_length
        self.too_long = too_long
        self.past_end = past_end
        self.overlap = overlap
        self.most_n = most_n
        self.evaluation_windows = evaluation_windows
        self.pad_to_multiple = pad_to_multiple
        self.rc = rc
        self.mask_fraction = mask_fraction
        self.eos = eos
        self.ignore_n = ignore_n
        self.batch_size = batch_size
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.samples_per_epoch = samples_per_epoch
        self.split = split
        self.k = k
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.seed = seed
        self._check_options()
        # Parts are held apart at one length for good, whatever ``length`` is set to later.
        self._longest = max_length or max(length or 0, validation_length or 0)
        self._parts: dict[str, SequenceSource] = {}
        self._dropped = 0

    def _check_options(self) -> None:
        self.check_least(batch_size=1, validation_batch_size=1, num_workers=0, seed=0, split_seed=0)
        self.check_least(pad_to_multiple=1, evaluation_windows=1, k=1)
        for name in ("length", "validation_length", "max_length", "samples_per_epoch"):
            if getattr(self, name) is not None:
                self.check_least(**{name: 1})
        if self.k > kmers.MOST:
            raise ValueError(f"k: {self.k}, expected at most {kmers.MOST}")
        self.check_choices(
            task=("classify", "next_token", "masked"),
            soft_masked=("upper", "keep-as-N", "error"),
            ambiguous=("N", "error"),
            too_long=("raise", "crop"),
            past_end=("raise", "shift", "pad"),
            overlap=("raise", "drop"),
            split=("groups", "random"),
        )
        self.check_fractions("a tenth of each class")
        check_together(self)

    @property
    def windowed(self) -> bool:
        """Whether sequences are windows of a genome."""
        return self.intervals is not None or bool(self.held)

    @property
    def vocab_size(self) -> int:
        """The number of ids, 12."""
        return VOCAB_SIZE

    @property
    def classes(self) -> list[str]:
        """The names of the classes, sorted, in the order of their labels; none where nothing is labelled."""
        return self._part("train").classes

    @property
    def num_classes(self) -> int:
        """The number of classes, before ``setup`` too: a model is built with it. AttributeError for other tasks."""
        if self.task != "classify":
            raise AttributeError(f"num_classes: task {self.task} has no labels; set task to classify")
        return len(self.classes)

    def prepare_data(self) -> None:
        """Index genomes that have no index, in one process; other sources need nothing."""
        if self.windowed or self.reference is not None:
            self._all()

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the sequences; ``stage`` (fit, validate, test, predict; None for all) must have its parts."""
        wanted = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}
        for part in wanted.get(stage or "", ["validation"] if stage == "predict" else list(self._all())):
            self._part(part)

    def train_dataloader(self) -> ResumableDataLoader:
        if self.windowed and self.length is not None and self.length > self._longest:
            raise ValueError(
                f"max_length: windows of {self.length:,} bases are asked for, and parts were held apart at "
                f"{self._longest:,}; give the largest as max_length"
            )
        dataset = self._dataset("train", self.length, rc=self.rc, seed=self.seed)
        order = ShuffledItems(len(dataset), self.samples_per_epoch or len(dataset), self.seed)
        mend = "lower batch_size, or give more sequences or samples_per_epoch"
        return self.training_loader(dataset, order, "sequence(s)", mend)

    def evaluation(self, part: str) -> DataLoader:
        """The sequences of a part."""
        dataset = self._dataset(part, self.validation_length)
        every = np.arange(len(dataset))
        return self.evaluation_loader(dataset, lambda epoch: every, len(every))

    def training_sequences(self) -> Iterator[tuple[np.ndarray, int]]:
        """Ids (any length,) uint8 and label of each training sequence once: no strand is turned, nothing drawn."""
        source = self._part("train")
        for i in range(len(source)):
            yield source.ids(i, self.length, None), int(source.labels[i])

    def sequence_name(self, part: str, index: int) -> str:
        """The file and record (or place) of a sequence, by the ``index`` of a batch of train, validation or test."""
        return self._part(part).name(index)

    def describe(self) -> str:
        """One line: sequences and bases of each part, classes, what was dropped, and near-copies between parts."""
        told = []
        for part, source in self._all().items():
            bases = f" ({int(source.lengths.sum()):,} bases)" if isinstance(source, Records) else ""
            told.append(f"{part} {len(source):,}{bases}")
        named = self.data if isinstance(self.data, str) else ", ".join(self.data.values())
        classes = f"; {len(self.classes)} classes" if self.classes else ""
        dropped = f"; {self._dropped:,} dropped that overlap" if self._dropped else ""
        return f"{named}: sequences {', '.join(told)}{classes}{dropped}{self._near_copies()}"

    def state_dict(self) -> dict[str, Any]:
        """What prediction needs beside the model, as plain values."""
        return {"classes": self.classes if self.task == "classify" else []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint speaks of the same classes.

        Raises:
            ValueError: it was trained on others.
        """
        now = self.state_dict()["classes"]
        if state_dict["classes"] != now:
            before, after = (", ".join(names) or "none" for names in (state_dict["classes"], now))
            raise ValueError(
                f"classes: the checkpoint was trained with {before}, and the data has {after}; give the data options "
                f"it was trained with"
            )

    def _loader_options(self) -> dict[str, Any]:
        return {**super()._loader_options(), "collate_fn": widened}

    def _all(self) -> dict[str, SequenceSource]:
        """The parts there are, opened and cut once."""
        if not self._parts:
            found: Mapping[str, SequenceSource]
            if self.intervals is not None:
                assert isinstance(self.data, str)
                found, self._dropped = parts.open_intervals(
                    self.data, self.root, self.intervals, self._reading, self._longest, self.past_end, self.overlap
                )
            elif self.held:
                windows = dict.fromkeys(_PARTS, self.evaluation_windows) | {"train": self.samples_per_epoch}
                labels = self.task == "classify"
                found = parts.open_chromosomes(
                    self.data, self.root, self.held, windows, self._longest, self.most_n, self._reading, labels
                )
            elif self.data == MOTIFS:
                found = (self.motifs or Motifs()).parts(self.split_seed)
            else:
                found = self._cut(
                    parts.open_labelled(self.data, self.root, self.columns, self._reading, self.reference)
                )
            self._check(found)
            self._parts = {part: found[part] for part in _PARTS if part in found}
        return self._parts

    @property
    def _reading(self) -> Reading:
        return Reading(self.soft_masked, self.ambiguous)

    def _cut(self, found: dict[str, Records]) -> dict[str, Records]:
        """Cut from train what is not there by itself."""
        if "test" in found and self.test_fraction:
            raise ValueError(f"test_fraction: {self.data} has a test part of its own; leave test_fraction out")
        if "train" not in found:
            raise ValueError(f"data: {self.data} has no sequence to train on; give it a train part")
        found = {part: found[part] for part in _PARTS if part in found}
        if self.split == "groups" and len(found) > 1:
            found, self._dropped = splits.separate(found, self.k, self.overlap)
        fractions = {} if "validation" in found else {"validation": self.validation_fraction}
        fractions |= {"test": self.test_fraction} if self.test_fraction else {}
        self.check_rest(fractions)
        train = found["train"]
        if not fractions:
            return found
        if self.split == "groups":
            groups = kmers.groups(train.flat, train.offsets, self.k)
            pieces = splits.grouped(train.labels, groups, list(fractions.values()), self.split_seed, train.classes)
        else:
            pieces = splits.stratified(train.labels, list(fractions.values()), self.split_seed, train.classes)
        return found | {part: train.take(piece) for part, piece in zip(["train", *fractions], pieces, strict=True)}

    def _check(self, found: Mapping[str, SequenceSource]) -> None:
        """Raise ValueError where a task lacks its labels, or a sequence is too long."""
        if "train" not in found:
            raise ValueError(f"data: {self.data} has no train part; give it one")
        if self.task == "classify" and not found["train"].classes:
            raise ValueError(
                f"data: {self.data} has no labels, which task classify needs; give a FASTA file for each class, "
                f"or a table"
            )
        longest = self._longest
        for part, source in found.items():
            if isinstance(source, Records) and longest and self.too_long == "raise":
                over = np.flatnonzero(source.lengths > longest)
                if len(over):
                    raise ValueError(
                        f"length: {longest}, and {source.name(int(over[0]))} of the {part} part has "
                        f"{int(source.lengths[over[0]])} bases ({len(over)} such sequence(s)); raise length, or set "
                        f"too_long to crop"
                    )

    def _near_copies(self) -> str:
        """What describe says of sequences that parts cut at random share k bases with."""
        records = {part: source for part, source in self._all().items() if isinstance(source, Records)}
        bases = sum(int(source.lengths.sum()) for source in records.values())
        if self.split != "random" or self.data == MOTIFS or not records or bases > _COMPARED:
            return ""
        groups = splits.group_parts(records, self.k)
        told = [
            f"{int(np.isin(groups[part], groups['train']).sum()):,} of {len(groups[part]):,} in {part}"
            for part in records
            if part != "train"
        ]
        return f"; near-copies of training sequences (sharing {self.k} bases): {', '.join(told)}"

    def _part(self, part: str) -> SequenceSource:
        found = self._all()
        if part not in found:
            mend = f"give {part}_chromosomes" if self.held else f"set {part}_fraction, or give data with such a part"
            raise ValueError(f"{part}: {self.data} has no {part} part; {mend}")
        return found[part]

    def _dataset(self, part: str, length: int | None, **training: Any) -> Sequences:
        pretraining = Pretraining(self.mask_fraction, self.eos, self.ignore_n)
        shape = Shape(length, self.pad_to_multiple)
        return Sequences(self._part(part), self.task, shape, pretraining, **training)
