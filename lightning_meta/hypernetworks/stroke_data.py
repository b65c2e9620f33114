"""Handwriting as sequences of points (Ha et al. 2016, section 4.5): IAM-OnDB, stroke fonts, the user's own.

Letters: B sequences, T steps. A point is (dx, dy, e): the offset from the last point, and 1 if the pen is lifted
after it.
"""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.data_module import MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.sources import strokes
from lightning_meta.sources.seeding import generator, shuffled


class StrokeBatch(NamedTuple):
    """A segment of B sequences, padded to the longest."""

    points: Tensor  # (B, T + 1, 3), float32 in pen units: inputs are the first T, targets the last T; then zeros
    scored: Tensor  # (B, T), bool: which targets exist
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[np.ndarray, Segment]]) -> "StrokeBatch":
        """Join samples ``(points (n, 3), segment)`` of one segment; n is 0 if a sequence has ended."""
        longest = max(2, *(len(points) for points, _ in samples))
        padded = np.zeros((len(samples), longest, 3), np.float32)
        for row, (points, _) in zip(padded, samples, strict=True):
            row[: len(points)] = points
        lengths = torch.tensor([len(points) for points, _ in samples])
        scored = torch.arange(1, longest) < lengths[:, None]
        return cls(torch.from_numpy(padded), scored, samples[0][1])


class Prime(NamedTuple):
    """The points that ``predict`` continues."""

    points: Tensor  # (n, 3), float32 in pen units


class StrokeDataset(Dataset):
    """Sequences in order or, for training, shuffled and randomly scaled.

    Args:
        sequences: Arrays (n, 3).
        seed: Seed of order and scales. None: in order, not scaled.
        augment: Sequences are scaled by a random factor between 1 - augment and 1 + augment.
    """

    def __init__(self, sequences: list[np.ndarray], seed: int | None = None, augment: float = 0.0):
        self.sequences, self.seed, self.augment = sequences, seed, augment

    def __getitem__(self, key: Key) -> tuple[np.ndarray, Segment]:
        index, segment = key
        if self.seed is None:
            sequence = self.sequences[index]
        else:
            sequence = self.sequences[shuffled(index, len(self.sequences), self.seed)]
            scale = 1 + self.augment * generator(self.seed, index).uniform(-1, 1)
            sequence = sequence * np.array([scale, scale, 1], np.float32)
        return sequence[segment.start : segment.stop + 1], segment


class PenStrokesDataModule(MetaDataModule):
    """Handwriting, and the line that ``predict`` continues.

    Args:
        root: Folder with ``iam-ondb/``.
        source: ``paper`` requires IAM-OnDB; ``stand-in`` uses words in stroke fonts, each in a random hand;
            ``auto`` uses IAM-OnDB if it is in ``root``, otherwise the stand-in.
        strokes: Your own strokes instead of IAM-OnDB: a ``.npz`` with sequences ``train``, ``valid`` and ``test`` in
            sketch-rnn's format, or a folder of XML files in IAM-OnDB's format.
        prime: A line that ``predict`` continues, an XML file in IAM-OnDB's format. None: start from nothing.
        shortest: Lines of IAM-OnDB with fewer points are left out (paper: 300).
        augment: Training sequences are scaled at random by up to this fraction (paper: 0.1).
        batch_size: Sequences per process and step.
        train_sequences: Number of sequences to train on. None: all (2,000 with the stand-in).
        val_sequences: Number of sequences to validate on. None: all (200 with the stand-in).
        test_sequences: Number of sequences to test on. None: all (200 with the stand-in).
        num_workers: Processes that load sequences; 0 loads them in the training process.
        seed: Seed of the training sequences' order and scales.

    Raises:
        InputError: If files are missing or damaged.
    """

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        strokes: str | None = None,
        prime: str | None = None,
        shortest: int = 300,
        augment: float = 0.1,
        batch_size: int = 32,
        train_sequences: int | None = None,
        val_sequences: int | None = None,
        test_sequences: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        if not 0 <= augment < 1:
            raise InputError(f"data.augment is {augment}: choose a fraction of at least 0 and below 1")
        self.batch_size = batch_size

    collate = staticmethod(StrokeBatch.collate)

    @property
    def present(self) -> bool:
        return strokes.has_iam_online(self.hparams.root)

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if stage == "predict":  # works without the data
            self.prime = strokes.read_line(h.prime) if h.prime else np.zeros((1, 3), np.float32)
            return
        parts = self._read()
        counts = h.train_sequences, h.val_sequences, h.test_sequences
        self.train, self.val, self.test = (part[:count] for part, count in zip(parts, counts, strict=True))
        self.scale = torch.from_numpy(strokes.offset_scale(self.train))
        self.test_name = "its validation part, there being no other" if parts.test is parts.val else "the test part"
        self.sets = {"train": StrokeDataset(self.train, h.seed, h.augment)}
        self.sets |= {"val": StrokeDataset(self.val), "test": StrokeDataset(self.test)}
        self.counts = {"val": len(self.val), "test": len(self.test)}

    def _read(self) -> strokes.Strokes:
        h = self.hparams
        if h.strokes:
            self.data_name = f"strokes of {Path(h.strokes).name}"
            return strokes.own_strokes(h.strokes)
        stand_in = "words in Hershey's stroke fonts, a stand-in for IAM-OnDB"
        where, more = Path(h.root) / "iam-ondb", ", --data.strokes strokes of your own"
        if self.use_papers_data("IAM-OnDB", where, stand_in, more):
            return strokes.iam_online(h.root, h.shortest)
        return strokes.hershey_words(h.train_sequences or 2000, h.val_sequences or 200, h.test_sequences or 200)

    def train_dataloader(self) -> DataLoader:
        longest = max(map(len, self.train)) - 1
        segments = list(islice(self.scheduled().segments(), len(self.scheduled())))
        if any(segment.start >= longest for segment in segments):
            raise InputError(
                f"schedule.horizon is longer than all sequences (at most {longest} steps): "
                f"give --schedule.horizon {longest}"
            )
        if (reach := max(segment.stop for segment in segments)) < longest:
            rank_zero_warn(
                f"training uses {reach} of up to {longest} steps of a sequence: raise --schedule.horizon to use more"
            )
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader("val", horizon=max(map(len, self.val)) - 1)

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader("test", horizon=max(map(len, self.test)) - 1)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([Prime(torch.from_numpy(self.prime))], batch_size=None)
