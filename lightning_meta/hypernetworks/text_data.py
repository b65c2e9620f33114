"""Texts for language models (Ha et al. 2016, sections 4.3 and 4.4): Penn Treebank, Wikipedia, the user's own.

Several readers read a text in parallel, each from its own position; a batch has one row per reader.

Letters: B readers of one process, T steps, N symbols of a text. A symbol is a Unicode code point or a byte.
"""

import math
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.data_module import MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.sources import text
from lightning_meta.sources.seeding import generator

NAMES = {"penn_treebank": "Penn Treebank", "enwik8": "enwik8", "text8": "text8"}


class TextBatch(NamedTuple):
    """The symbols that B readers read in one segment."""

    symbols: Tensor  # (B, T + 1), int64: the first T are inputs, the last T are targets
    scored: Tensor  # (B, T), bool: which targets count
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[np.ndarray, np.ndarray, Segment]]) -> "TextBatch":
        """Join samples ``(symbols (T + 1,), scored (T,), segment)`` of one segment."""
        symbols, scored, segments = zip(*samples, strict=True)
        return cls(
            torch.from_numpy(np.stack(symbols).astype(np.int64)), torch.from_numpy(np.stack(scored)), segments[0]
        )


class Prompt(NamedTuple):
    """The symbols that ``predict`` continues."""

    symbols: Tensor  # (n,), int64


class Readers(Dataset):
    """Training readers: they start evenly spaced and read the text again and again, without end.

    Args:
        symbols: The text, (N,).
        readers: Number of readers of all processes.
        seed: Seed of the first reader's start and, after each horizon (if there is one), of all readers' new starts.
    """

    def __init__(self, symbols: np.ndarray, readers: int, seed: int):
        self.symbols, self.readers, self.seed = symbols, readers, seed
        self.offset = int(generator(seed).integers(len(symbols)))

    def __getitem__(self, key: Key) -> tuple[np.ndarray, np.ndarray, Segment]:
        reader, segment = key
        start = self.offset + reader * len(self.symbols) // self.readers
        if segment.problem:
            start = int(generator(self.seed, reader).integers(len(self.symbols)))
        positions = np.arange(start + segment.start, start + segment.stop + 1)
        symbols = self.symbols.take(positions, mode="wrap")
        return symbols, np.ones(len(symbols) - 1, bool), segment


class ScoredReaders(Dataset):
    """Validation and test readers: each scores its own part of the text.

    Every symbol except the first is scored once. All readers except the first begin ``context`` symbols before their
    part. One reader is the paper's protocol; more are faster.

    Args:
        symbols: The text, (N,).
        readers: Number of readers of all processes.
        context: Number of symbols that a reader sees before its first scored symbol.
    """

    def __init__(self, symbols: np.ndarray, readers: int, context: int):
        self.symbols, self.readers, self.context = symbols, readers, context
        self.share = max(1, math.ceil((len(symbols) - context) / readers))
        self.steps = self.share + context - 1

    def __getitem__(self, key: Key) -> tuple[np.ndarray, np.ndarray, Segment]:
        reader, segment = key
        start = reader * self.share
        positions = np.arange(start + segment.start, start + segment.stop + 1)
        scored = (positions[1:] >= start + self.context * (reader > 0)) & (positions[1:] < len(self.symbols))
        return self.symbols.take(positions, mode="clip"), scored, segment

    def batches(self, length: int, rank: int, world_size: int) -> list[list[Key]]:
        """Return the keys of each batch, in order, for the readers of one process; a segment has ``length`` steps."""
        cuts = [*range(0, self.steps, length), self.steps]
        return [
            [(reader, Segment(0, start, stop, stop == self.steps)) for reader in range(rank, self.readers, world_size)]
            for start, stop in pairwise(cuts)
        ]


class TextDataModule(MetaDataModule):
    """A text for a language model, and the prompt that ``predict`` continues.

    Args:
        corpus: ``penn_treebank`` (characters), ``enwik8`` (bytes) or ``text8`` (characters), with the usual training,
            validation and test splits.
        root: Folder with ``ptb/`` or ``text/``.
        source: ``paper`` requires the corpus; ``stand-in`` uses the help text that comes with Python; ``auto`` uses the
            corpus if it is in ``root`` or can be downloaded, otherwise the stand-in.
        download: Download the corpus into ``root`` if it is missing.
        text: Your own text file instead of the corpus: UTF-8, or bytes with ``enwik8``; plain, .gz or .zip. The first
            90 % are used for training, 5 % each for validation and test.
        prompt: Text that ``predict`` continues. None: the beginning of the test split.
        batch_size: Number of readers per process in training.
        readers: Number of readers of all processes in validation and test. 1 is the paper's protocol; more are faster.
        context: Number of symbols that each of those readers, except the first, sees before its first score.
        segment: Steps per batch in validation and test. It only affects the score of dynamic evaluation.
        val_symbols: Number of symbols to validate on. None: all.
        test_symbols: Number of symbols to test on. None: all.
        num_workers: Processes that load segments; 0 loads them in the training process.
        seed: Seed of the readers' starts.

    Raises:
        InputError: If files are missing or damaged, a text is empty or too short, or the prompt is empty.
    """

    def __init__(
        self,
        corpus: Literal["penn_treebank", "enwik8", "text8"] = "penn_treebank",
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        text: str | None = None,
        prompt: str | None = None,
        batch_size: int = 128,
        readers: int = 32,
        context: int = 200,
        segment: int = 100,
        val_symbols: int | None = None,
        test_symbols: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        for name in ("batch_size", "readers", "context", "segment"):
            if self.hparams[name] < 1:
                raise InputError(f"data.{name} is {self.hparams[name]}: choose at least 1")
        self.batch_size = batch_size
        self.unit = "byte" if corpus == "enwik8" else "character"

    collate = staticmethod(TextBatch.collate)

    @property
    def users_data(self) -> str | None:
        return self.hparams.text

    @property
    def present(self) -> bool:
        root, corpus = self.hparams.root, self.hparams.corpus
        return text.has_penn_treebank(root) if corpus == "penn_treebank" else text.has_wikipedia(root, corpus)

    def fetch(self) -> None:
        h = self.hparams
        if h.corpus == "penn_treebank":
            text.download_penn_treebank(h.root)
        else:
            text.download_wikipedia(h.root, h.corpus)

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if stage == "predict" and h.prompt is not None:  # works without the corpus
            self.prompt = self._encode(h.prompt)
            return
        parts = self._read()
        self.vocabulary = torch.from_numpy(text.vocabulary(parts).astype(np.int64))
        self.train_text, self.val_text = parts.train, parts.val[: h.val_symbols]
        self.test_text = parts.test[: h.test_symbols]
        for name, part in (("training", parts.train), ("validation", self.val_text), ("test", self.test_text)):
            if len(part) < 2:
                raise InputError(
                    f"{self.data_name} has {len(part)} {self.unit}s for {name}, fewer than 2: give a longer text"
                )
        self.prompt = self.test_text[:200].astype(np.int64)
        self.test_name = "the test part" if h.test_symbols is None else f"the first {len(self.test_text):,} of its test"
        self.counts = {"test": len(self.test_text) - 1}  # symbols

    def _read(self) -> text.TextSplits:
        h, kind = self.hparams, f"{self.unit}s"
        if h.text:
            self.data_name = f"{Path(h.text).name} by {kind}, 90/5/5 %"
            return text.own_text(h.text, kind)
        name, where = NAMES[h.corpus], Path(h.root) / ("ptb" if h.corpus == "penn_treebank" else "text")
        stand_in = f"Python's help text by {kind}, a stand-in for {name}"
        if self.use_papers_data(f"{name} by {kind}", where, stand_in, ", --data.text a text of your own"):
            return text.penn_treebank(h.root) if h.corpus == "penn_treebank" else text.wikipedia(h.root, h.corpus)
        return text.help_text(kind)

    def _encode(self, prompt: str) -> np.ndarray:
        symbols = list(prompt.encode()) if self.unit == "byte" else [ord(character) for character in prompt]
        if not symbols:
            raise InputError("data.prompt is empty: give at least one character")
        return np.array(symbols, np.int64)

    def decode(self, symbols: list[int]) -> str:
        """Convert symbols to text; bytes that are not UTF-8 become replacement characters."""
        if self.unit == "byte":
            return bytes(symbols).decode(errors="replace")
        return "".join(map(chr, symbols))

    def train_dataloader(self) -> DataLoader:
        readers = self.batch_size * self.trainer.world_size
        longest = max(s.stop - s.start for s in islice(self.scheduled().segments(), len(self.scheduled())))
        if len(self.train_text) < readers * longest:
            raise InputError(
                f"{self.data_name} has {len(self.train_text):,} {self.unit}s for training, too few for {readers} "
                f"readers with {longest} each: lower --data.batch_size or --schedule.unroll, or give a longer text"
            )
        readers = Readers(self.train_text, readers, self.hparams.seed)
        return self.loader(readers, batch_sampler=self.scheduled())

    def val_dataloader(self) -> DataLoader:
        return self._scored(self.val_text, self.hparams.readers)

    def test_dataloader(self) -> DataLoader:
        return self._scored(self.test_text, self.hparams.readers)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([Prompt(torch.from_numpy(self.prompt))], batch_size=None)

    def _scored(self, symbols: np.ndarray, readers: int) -> DataLoader:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if readers < world_size:
            raise InputError(
                f"data.readers is {readers}, but each of {world_size} processes needs one: choose at least {world_size}"
            )
        dataset = ScoredReaders(symbols, readers, self.hparams.context)
        return self.loader(dataset, batch_sampler=dataset.batches(self.hparams.segment, rank, world_size))
