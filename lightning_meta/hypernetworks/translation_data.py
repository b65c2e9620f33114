"""Parallel text for translation (Ha et al. 2016, section 4.6): WMT'14, Multi30k, the user's own, numbers in words.

Letters: B sentences of one process; S subwords of a source sentence and T of a target sentence, with the end symbol.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.data_module import MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.sources import parallel_text
from lightning_meta.sources.parallel_text import Corpus, ParallelText
from lightning_meta.sources.seeding import generator, shuffled
from lightning_meta.sources.subwords import EOS, PAD, Subwords, train_subwords

NAMES = {"wmt14": "WMT'14 English to French", "multi30k": "Multi30k English to French"}
_BYTES_FROM = 1000  # a vocabulary of this many subwords or more includes the 256 bytes


class Sentences(NamedTuple):
    """A batch of B sentence pairs."""

    source: Tensor  # (S, B), int64: subwords and EOS, then PAD
    target: Tensor  # (T, B), the same
    texts: ParallelText  # the sentences as strings
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[list[int], list[int], str, str, Segment]]) -> "Sentences":
        """Join samples of ``PairDataset``."""
        source, target, source_texts, target_texts, segments = zip(*samples, strict=True)
        return cls(padded(source), padded(target), ParallelText([*source_texts], [*target_texts]), segments[0])


def padded(sentences: Iterable[list[int]]) -> Tensor:
    """Stack the subwords of B sentences as (S, B), each with EOS, then PAD.

    >>> padded([[5, 6], [7]]).shape
    torch.Size([3, 2])
    """
    return pad_sequence([torch.tensor([*sentence, EOS]) for sentence in sentences], padding_value=PAD)


class PairDataset(Dataset):
    """Sentence pairs in order.

    Args:
        pairs: The sentences.
        subwords: Splits sentences into subwords.
    """

    def __init__(self, pairs: ParallelText, subwords: Subwords):
        self.pairs, self.subwords = pairs, subwords

    def place(self, index: int) -> int:
        """Return the position of sample ``index`` among the pairs."""
        return index

    def __getitem__(self, key: Key) -> tuple[list[int], list[int], str, str, Segment]:
        index, segment = key
        place = self.place(index)
        texts = self.pairs.source[place], self.pairs.target[place]
        return *self.subwords.encode([*texts]), *texts, segment


class ShuffledPairs(PairDataset):
    """Sentence pairs for training, in a new random order each epoch, with batches of similar lengths.

    The sentences of ``pool`` batches are drawn together, sorted by length and cut into batches, which are shuffled. The
    sample's index and the seed alone decide which pair it is.

    Args:
        pairs: The sentences.
        subwords: Splits sentences into subwords.
        seed: Seed of the random order.
        batch: Sentences per batch over all processes.
        pool: Batches that are drawn and sorted together.
    """

    def __init__(self, pairs: ParallelText, subwords: Subwords, seed: int, batch: int, pool: int):
        super().__init__(pairs, subwords)
        self.seed, self.batch, self.pool = seed, batch, pool
        self._drawn: tuple[int | None, list[int]] = None, []

    def place(self, index: int) -> int:
        number, position = divmod(index, self.pool * self.batch)
        if number != self._drawn[0]:
            self._drawn = number, self._draw(number)
        return self._drawn[1][position]

    def _draw(self, number: int) -> list[int]:
        size = self.pool * self.batch
        places = [shuffled(i, len(self.pairs.source), self.seed) for i in range(number * size, (number + 1) * size)]
        places.sort(key=lambda i: (len(self.pairs.target[i]), len(self.pairs.source[i])))
        order = generator(self.seed, number, 2).permutation(self.pool)
        return np.array(places).reshape(self.pool, self.batch)[order].flatten().tolist()


class TranslationDataModule(MetaDataModule):
    """Parallel text for a translator, and the sentences that ``predict`` translates.

    Args:
        corpus: ``wmt14`` (paper) or ``multi30k``, 29,000 image captions; both English to French.
        root: Folder with ``wmt14/`` or ``multi30k/``.
        source: ``paper`` requires the corpus; ``stand-in`` uses numbers in words; ``auto`` uses the corpus if it is in
            ``root`` or can be downloaded, otherwise the stand-in.
        download: Download Multi30k into ``root`` if it is missing. WMT'14 has to be put there by hand.
        pairs: Your own parallel text instead of the corpus: a folder with ``{train,val,test}.{en,fr}``, plain or .gz,
            or a .zip of tab-separated pairs.
        source_language: File name extension of the source language in that folder.
        target_language: File name extension of the target language in that folder.
        source_file: Your own source sentences, one per line, plain or .gz; needs ``target_file``. The first 90 % are
            used for training, 5 % each for validation and test.
        target_file: Translations of the lines of ``source_file``.
        text: Sentence that ``predict`` translates, or a file with one per line. None: the first 10 of the test split.
        batch_size: Sentences per process and step.
        pool: Batches that are drawn together and sorted by length, to reduce padding. 1: no sorting.
        longest: Longest side of a training pair, in characters; longer pairs are left out.
        train_pairs: Number of pairs to train on. None: all (10,000 with the stand-in).
        val_pairs: Number of pairs to validate on. None: all.
        test_pairs: Number of pairs to test on. None: all.
        num_workers: Processes that split sentences into subwords; 0 does it in the training process.
        seed: Seed of the training order.

    Raises:
        InputError: If files are missing or damaged, differ in their number of lines, or have empty lines.
    """

    def __init__(
        self,
        corpus: Literal["wmt14", "multi30k"] = "wmt14",
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        pairs: str | None = None,
        source_language: str = "en",
        target_language: str = "fr",
        source_file: str | None = None,
        target_file: str | None = None,
        text: str | None = None,
        batch_size: int = 64,
        pool: int = 20,
        longest: int = 400,
        train_pairs: int | None = None,
        val_pairs: int | None = None,
        test_pairs: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        for name in ("batch_size", "pool", "longest", "train_pairs", "val_pairs", "test_pairs"):
            if self.hparams[name] is not None and self.hparams[name] < 1:
                raise InputError(f"data.{name} is {self.hparams[name]}: choose at least 1")
        if (source_file is None) != (target_file is None) or (pairs and source_file):
            raise InputError("set data.source_file and data.target_file, or only data.pairs, or none of the three")
        self.batch_size = batch_size

    collate = staticmethod(Sentences.collate)

    @property
    def users_data(self) -> str | None:
        return self.hparams.pairs or self.hparams.source_file

    @property
    def present(self) -> bool:
        there = parallel_text.has_wmt14 if self.hparams.corpus == "wmt14" else parallel_text.has_multi30k
        return there(self.hparams.root)

    def fetch(self) -> None:
        if self.hparams.corpus == "multi30k":
            parallel_text.download_multi30k(self.hparams.root)

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if stage == "predict" and h.text is not None:  # works without the corpus
            self.text = read_sentences(h.text)
            return
        corpus = self._read()
        short = [max(map(len, pair)) <= h.longest for pair in zip(*corpus.train, strict=True)]
        self.left_out = len(short) - sum(short)
        if self.left_out:
            rank_zero_warn(
                f"{self.left_out:,} of {len(short):,} training pairs are left out: they are longer than data.longest "
                f"({h.longest} characters)"
            )
        self.train = ParallelText(
            *([text for text, keep in zip(side, short, strict=True) if keep] for side in corpus.train)
        )
        if not self.train.source:
            raise InputError(f"no training pair has at most {h.longest} characters on each side: raise data.longest")
        self.val, self.test = head(corpus.val, h.val_pairs), head(corpus.test, h.test_pairs)
        self.text = self.test.source[:10]
        self.test_name = (
            "the test part" if h.test_pairs is None else f"the first {len(self.test.source):,} pairs of its test"
        )
        self.counts = {"val": len(self.val.source), "test": len(self.test.source)}
        self.save_hyperparameters({"left_out": self.left_out, "dropped": corpus.dropped})

    def _read(self) -> Corpus:
        h = self.hparams
        if h.source_file:
            self.data_name = f"{os.path.basename(h.source_file)} and {os.path.basename(h.target_file)}, 90/5/5 %"
            return split_pairs(parallel_text.aligned(h.source_file, h.target_file), h.train_pairs, self.data_name)
        if h.pairs:
            name = os.path.basename(os.path.abspath(h.pairs))
            self.data_name = f"{name}, {h.source_language} to {h.target_language}"
            corpus = parallel_text.folder(h.pairs, h.source_language, h.target_language)
        elif self.use_papers_data(
            NAMES[h.corpus],
            os.path.join(h.root, h.corpus),
            f"numbers in words, English to French, a stand-in for {NAMES[h.corpus]}",
            ", --data.pairs pairs of your own",
        ):
            wmt14 = h.corpus == "wmt14"
            corpus = parallel_text.wmt14(h.root, h.train_pairs) if wmt14 else parallel_text.multi30k(h.root)
        else:
            return parallel_text.number_words(h.train_pairs or 10_000, max(h.val_pairs or 1000, h.test_pairs or 1000))
        return corpus._replace(train=head(corpus.train, h.train_pairs))

    def learn_subwords(self, size: int) -> Subwords:
        """Learn subwords from the training sentences. Vocabularies of 1,000 or more spell rare characters in bytes."""
        try:
            return Subwords(train_subwords(self.train, size, byte_fallback=size >= _BYTES_FROM))
        except InputError as error:
            raise InputError(f"model.pieces: {error}") from error

    def train_dataloader(self) -> DataLoader:
        batch = self.batch_size * self.trainer.world_size
        self.sets["train"] = ShuffledPairs(self.train, self._subwords, self.hparams.seed, batch, self.hparams.pool)
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        self.sets["val"] = PairDataset(self.val, self._subwords)
        return super().val_dataloader()

    def test_dataloader(self) -> DataLoader:
        self.sets["test"] = PairDataset(self.test, self._subwords)
        return super().test_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Return all sentences as one batch, a list."""
        return DataLoader([self.text], batch_size=None)

    @property
    def _subwords(self) -> Subwords:
        return self.trainer.lightning_module.vocabulary


def head(part: ParallelText, size: int | None) -> ParallelText:
    """Return the first ``size`` pairs. None: all."""
    return ParallelText(part.source[:size], part.target[:size])


def spread(part: ParallelText, size: int) -> ParallelText:
    """Return at most ``size`` pairs, evenly spaced."""
    step = -(-len(part.source) // size)
    return ParallelText(part.source[::step], part.target[::step])


def split_pairs(part: ParallelText, train: int | None, name: str) -> Corpus:
    """Split pairs into the first 90 % for training (at most ``train``), and 5 % each for validation and test."""
    n = len(part.source)
    ends = [0, n * 18 // 20, n * 19 // 20, n]
    if n < 20:
        raise InputError(f"{name} has {n} pairs, too few to split: give at least 20")
    parts = [ParallelText(*(side[start:end] for side in part)) for start, end in pairwise(ends)]
    return Corpus(head(parts[0], train), *parts[1:])


def read_sentences(text: str) -> list[str]:
    """Read the sentences to translate: the lines of the file ``text``, or ``text`` itself if it names no file.

    Raises:
        InputError: If a line is empty, or the file is missing or damaged.
    """
    if os.path.isfile(text) or text.endswith((".txt", ".gz")):
        return parallel_text.sentences(text)
    if not text.strip():
        raise InputError("data.text is empty: give a sentence or the name of a file")
    return [text.strip()]


def unigram_nats(train: list[list[int]], test: list[list[int]], size: int) -> float:
    """Return the unigram cross-entropy of ``test`` in nats per subword, with add-one counts from ``train``.

    The end of a sentence counts as a subword.

    Args:
        train: Subwords of the training sentences.
        test: Subwords of the test sentences.
        size: Size of the vocabulary.
    """
    counts = Counter(dict.fromkeys(range(size), 1))
    for sentence in train:
        counts.update([*sentence, EOS])
    total, costs = counts.total(), [counts[subword] for sentence in test for subword in (*sentence, EOS)]
    return sum(math.log(total / count) for count in costs) / len(costs)


def dictionary(part: ParallelText, rounds: int = 10) -> dict[str, str]:
    """Find the likeliest translation of each word with IBM model 1 (Brown et al. 1993), which ignores word order."""
    known: tuple[dict[str, int], dict[str, int]] = {}, {}
    sources, targets, places, written = [], [], [], 0
    for texts in zip(*part, strict=True):
        s, t = (
            [words.setdefault(word, len(words)) for word in text.split()]
            for words, text in zip(known, texts, strict=True)
        )
        sources.append(np.tile(s, len(t)))
        targets.append(np.repeat(t, len(s)))
        places.append(np.repeat(np.arange(written, written + len(t)), len(s)))
        written += len(t)
    place, size = np.concatenate(places), len(known[1])
    keys, pair = np.unique(np.concatenate(sources) * size + np.concatenate(targets), return_inverse=True)
    source, target = np.divmod(keys, size)
    odds = np.ones(len(keys))
    for _ in range(rounds):  # of expectation maximisation
        share = odds[pair]
        share /= np.bincount(place, share)[place]
        odds = np.bincount(pair, share)
        odds /= np.bincount(source, odds)[source]
    words = [list(numbers) for numbers in known]
    return {words[0][source[i]]: words[1][target[i]] for i in np.argsort(odds, kind="stable")}
