"""TextDataModule: text of any source as batches for a language model."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.data import DataLoader

from mambakit.datamodules.base import DataModule
from mambakit.datamodules.samplers import ResumableDataLoader
from mambakit.datamodules.text import sources, splits
from mambakit.datamodules.text.sources import Document
from mambakit.datamodules.text.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer, tokenizer_from_file
from mambakit.datamodules.text.windows import EveryWindow, RandomWindows, ShuffledWindows, TokenRun, Windows


class TextDataModule(DataModule):
    """Text as packed windows of tokens, with the next token as label.

    Documents are laid end to end and cut into windows of ``context`` tokens; nothing is padded. A batch is a dict:

    - ``input_ids`` (B, L) int64;
    - ``labels`` (B, L) int64: the next token, or -100 where that belongs to another document;
    - ``seq_idx`` (B, L) int32: the document within the window, from 0 (only where there is more than one document);
    - ``n_bytes`` (B,) int64: UTF-8 bytes of the labels that are not -100, for bits per byte.

    Everything follows from ``seed``, whatever ``num_workers`` is, and a run stopped in the middle of an epoch goes on
    with the batches it would have seen. Under several processes each takes its share, ``batch_size`` windows a step.
    The tokenizer's state goes into the checkpoint, under ``TextDataModule``, ``tokenizer``.

    Args:
        data: the text: a file, a folder (its ``*.txt``, sorted), a glob, ``python-docs`` (the English text of the
            standard library's ``pydoc_data.topics``, no download), or ``hf:NAME[:CONFIG[:SPLIT]]`` (a Hugging Face
            dataset).
        root: folder against which relative paths (of data and of a tokenizer file) are resolved.
        tokenizer: ``bytes`` (256 ids), ``characters``, or the path of a Hugging Face ``tokenizers`` JSON file.
        alphabet: for ``characters``: the characters of the ``train`` part alone, or those of the ``whole`` text, as
            nanoGPT does.
        context: tokens in a window, L.
        batch_size: windows in a training batch of one process, B.
        validation_context: tokens in a window of validation and test; ``context`` unless given.
        validation_batch_size: windows in a batch of validation and test; ``batch_size`` unless given.
        sampling: ``contiguous``: windows side by side, shuffled, from another offset each epoch; ``random``: windows
            that begin anywhere, as nanoGPT does.
        samples_per_epoch: windows in an epoch of ``random`` sampling; as many as lie side by side unless given.
        validation_fraction: the part of the text (in characters, at its end) held out for validation; of no effect
            with validation_data.
        test_fraction: the part after that held out for test.
        split_at: the cuts fall at a ``character``, or at the end of a ``document``.
        validation_data: a source of its own for validation, instead of a cut.
        test_data: a source of its own for test, instead of a cut.
        text_column: the column of a Hugging Face dataset that holds the text.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        seed: decides the order of training windows.

    Raises:
        ValueError: an option outside its range, or a text that is empty, not UTF-8 or shorter than one window.
        FileNotFoundError: no such text; says where it looked.
    """

    def __init__(
        self,
        data: str = sources.PYTHON_DOCS,
        root: str = ".",
        tokenizer: str = "bytes",
        alphabet: Literal["train", "whole"] = "train",
        context: int = 256,
        batch_size: int = 16,
        validation_context: int | None = None,
        validation_batch_size: int | None = None,
        sampling: Literal["contiguous", "random"] = "contiguous",
        samples_per_epoch: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_at: Literal["character", "document"] = "character",
        validation_data: str | None = None,
        test_data: str | None = None,
        text_column: str = "text",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data = data
        self.root = root
        self.tokenizer_name = tokenizer
        self.alphabet = alphabet
        self.context = context
        self.batch_size = batch_size
        self.validation_context = context if validation_context is None else validation_context
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.sampling = sampling
        self.samples_per_epoch = samples_per_epoch
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.split_at = split_at
        self.validation_data = validation_data
        self.test_data = test_data
        self.text_column = text_column
        self.num_workers = num_workers
        self.seed = seed
        self._check_options()
        self._parts: dict[str, list[Document]] = {}
        self._runs: dict[str, TokenRun] = {}
        self._tokenizer: Tokenizer | None = None

    def _check_options(self) -> None:
        self.check_least(context=1, batch_size=1, validation_context=1, validation_batch_size=1, num_workers=0, seed=0)
        if self.samples_per_epoch is not None:
            self.check_least(samples_per_epoch=1)
        self.check_choices(
            alphabet=("train", "whole"), sampling=("contiguous", "random"), split_at=("character", "document")
        )
        self.check_fractions("a tenth of the text")
        self.check_rest(self._fractions())
        if self.samples_per_epoch is not None and self.sampling != "random":
            raise ValueError("samples_per_epoch: only random sampling has a choice; set sampling to random")

    def _fractions(self) -> dict[str, float]:
        """The parts that are cut from the end of ``data``, in their order there."""
        cut_off = {} if self.validation_data is not None else {"validation": self.validation_fraction}
        return cut_off | ({"test": self.test_fraction} if self.test_fraction else {})

    @property
    def tokenizer(self) -> Tokenizer:
        """Made on first use; the alphabet of ``characters`` needs the text, the others only their own file."""
        if self._tokenizer is None:
            if self.tokenizer_name == "bytes":
                self._tokenizer = ByteTokenizer()
            elif self.tokenizer_name == "characters":
                parts = self._documents()
                chosen = parts.values() if self.alphabet == "whole" else [parts["train"]]
                letters = {letter for part in chosen for document in part for letter in set(document.text)}
                self._tokenizer = CharacterTokenizer("".join(letters))
            else:
                self._tokenizer = tokenizer_from_file(self.tokenizer_name, self.root)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of token ids, before ``setup`` too: a model is built with it."""
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        """Fetch Hugging Face datasets into their cache, in one process; other sources need nothing."""
        for data in (self.data, self.validation_data, self.test_data):
            if data is not None and data.startswith(sources.HUB_PREFIX):
                sources.read_documents(data, self.root, self.text_column)

    def setup(self, stage: str | None = None) -> None:
        """Read, cut and encode the parts that ``stage`` (fit, validate, test, predict; None for all) needs."""
        parts = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}
        for part in parts.get(stage or "", ["validation"] if stage == "predict" else list(self._documents())):
            self._run(part)

    def train_dataloader(self) -> ResumableDataLoader:
        run = self._run("train")
        order: RandomWindows | ShuffledWindows
        if self.sampling == "random":
            length = self.samples_per_epoch or (len(run) - 1) // self.context
            order = RandomWindows(len(run), self.context, length, self.seed)
        else:
            order = ShuffledWindows(len(run), self.context, self.seed)
        items = f"window(s) of {self.context} tokens"
        mend = "lower batch_size or context, or give more text"
        return self.training_loader(Windows(run, self.context), order, items, mend)

    def evaluation(self, part: str) -> DataLoader:
        """The windows of a part."""
        run = self._run(part)
        order = EveryWindow(len(run), self.validation_context)
        return self.evaluation_loader(Windows(run, self.validation_context), order, len(order))

    def describe(self) -> str:
        """One line: documents, characters, tokens and vocabulary."""
        parts = self._documents()
        told = []
        for name, documents in parts.items():
            characters = sum(len(document.text) for document in documents)
            told.append(
                f"{name} {len(documents):,} document(s), {characters:,} characters, {len(self._run(name)):,} tokens"
            )
        return f"{self.data}: {'; '.join(told)}; vocabulary {self.vocab_size:,} ({self.tokenizer_name})"

    def state_dict(self) -> dict[str, Any]:
        """What generation needs beside the model: the tokenizer's state."""
        return {"tokenizer": self.tokenizer.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint speaks of the same tokens.

        Raises:
            ValueError: the checkpoint's tokenizer is another one.
        """
        if state_dict["tokenizer"] != self.tokenizer.state():
            raise ValueError(
                f"tokenizer: the checkpoint was trained with another one ({state_dict['tokenizer']['kind']}) than "
                f"{self.tokenizer_name} of {self.data}, so its ids mean other things; give the data and tokenizer "
                f"it was trained with"
            )

    def _documents(self) -> dict[str, list[Document]]:
        """The documents of each part there is, read once."""
        if not self._parts:
            read = partial(sources.read_documents, root=self.root, text_column=self.text_column)
            fractions = self._fractions()
            pieces = splits.cut(read(self.data), list(fractions.values()), self.split_at)
            parts = dict(zip(["train", *fractions], pieces, strict=True))
            for name, data in (("validation", self.validation_data), ("test", self.test_data)):
                if data is not None:
                    parts[name] = read(data)
                    for other in [part for part in parts if part != name]:
                        if (common := splits.shared(parts[other], parts[name])) is not None:
                            raise ValueError(
                                f"{name}_data: {common} is also in the {other} part; give text that is nowhere else"
                            )
            self._parts = parts
        return self._parts

    def _run(self, part: str) -> TokenRun:
        """The tokens of a part, encoded once, at least one window of them."""
        if part not in self._runs:
            documents = self._documents()
            if part not in documents:
                raise ValueError(f"{part}: there is no {part} part; set {part}_fraction or {part}_data")
            try:
                run = TokenRun(documents[part], self.tokenizer)
            except ValueError as error:
                hint = "; alphabet 'whole' takes the characters of all parts" if self.alphabet == "train" else ""
                raise ValueError(f"the {part} part: {error}{hint}") from None
            option = "context" if part == "train" else "validation_context"
            context = getattr(self, option)
            if len(run) <= context:
                raise ValueError(
                    f"{option}: the {part} part of {self.data} has {len(run)} token(s), one window needs "
                    f"{option} + 1 = {context + 1}; lower {option} or give more text"
                )
            self._runs[part] = run
        return self._runs[part]
