"""Handwriting, point by point (Ha et al. 2016, section 4.5): IAM-OnDB, other strokes, the user's own.

Letters: B sequences, T steps. A point is (dx, dy, e): the way from the point before, and 1 where the pen is lifted.
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
from lightning_meta.seeding import generator, shuffled
from lightning_meta.sources import strokes


class Points(NamedTuple):
    """A segment of B sequences, as long as the longest of them."""

    points: Tensor  # (B, T + 1, 3), float32 in pen units; the last T follow upon the first T; zeros after the end
    scored: Tensor  # (B, T), bool: which of the last T there are
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[np.ndarray, Segment]]) -> "Points":
        """Joins ``(points (n, 3), segment)`` of one segment; n is 0 where a sequence has ended."""
        longest = max(2, *(len(points) for points, _ in samples))
        padded = np.zeros((len(samples), longest, 3), np.float32)
        for row, (points, _) in zip(padded, samples, strict=True):
            row[: len(points)] = points
        lengths = torch.tensor([len(points) for points, _ in samples])
        scored = torch.arange(1, longest) < lengths[:, None]
        return cls(torch.from_numpy(padded), scored, samples[0][1])


class Prime(NamedTuple):
    """What ``predict`` goes on from."""

    points: Tensor  # (n, 3), float32 in pen units


class Sequences(Dataset):
    """Sequences in their order, or shuffled again and again and scaled a little, for training.

    Args:
        sequences: Each (n, 3).
        seed: Of order and scales; None: neither.
        augment: A sequence is scaled by a factor within 1 - augment and 1 + augment.
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
    """Handwriting, and for ``predict`` a line of the user's whose style is gone on in.

    Args:
        root: Folder with ``iam-ondb/``.
        source: ``paper`` insists on IAM-OnDB; ``stand-in`` takes words in stroke fonts, each in another hand; ``auto``
            takes IAM-OnDB where it lies, else the stand-in.
        strokes: Strokes of the user's in their place: a ``.npz`` with sequences ``train``, ``valid`` and ``test`` as
            sketch-rnn has them, or a folder of XML files like IAM-OnDB's.
        prime: A line that ``predict`` goes on from, an XML file like IAM-OnDB's. None: it starts with nothing.
        shortest: Lines of IAM-OnDB with fewer points are left out (paper: 300).
        augment: Training sequences are scaled by up to so much (paper: 0.1).
        batch_size: Sequences a process and step.
        train_sequences: Train on the first so many; the stand-in has 2,000 if not told. None: on all.
        val_sequences: Validate on the first so many; the stand-in has 200. None: on all.
        test_sequences: Test on the first so many; the stand-in has 200. None: on all.
        num_workers: Processes that read sequences; 0 reads them in the training process.
        seed: Of the training sequences' order and scales.

    Raises:
        InputError: Where files are missing or damaged.
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
            raise InputError(f"data.augment is {augment}: choose a part of the size, at least 0 and less than 1")
        self.batch_size = batch_size

    collate = staticmethod(Points.collate)

    @property
    def present(self) -> bool:
        return strokes.has_iam_online(self.hparams.root)

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if stage == "predict":  # no data are needed, so none have to be there
            self.prime = strokes.read_line(h.prime) if h.prime else np.zeros((1, 3), np.float32)
            return
        parts = self._read()
        counts = h.train_sequences, h.val_sequences, h.test_sequences
        self.train, self.val, self.test = (part[:count] for part, count in zip(parts, counts, strict=True))
        self.scale = torch.from_numpy(strokes.offset_scale(self.train))
        self.test_name = "its validation part, there being no other" if parts.test is parts.val else "the test part"
        self.sets = {"train": Sequences(self.train, h.seed, h.augment)}
        self.sets |= {"val": Sequences(self.val), "test": Sequences(self.test)}
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
                "schedule.horizon: segments begin where the longest sequence has ended: "
                f"give --schedule.horizon {longest}"
            )
        if (reach := max(segment.stop for segment in segments)) < longest:
            rank_zero_warn(
                f"training reads {reach} of up to {longest} steps of a sequence: --schedule.horizon says how many"
            )
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader("val", horizon=max(map(len, self.val)) - 1)

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader("test", horizon=max(map(len, self.test)) - 1)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([Prime(torch.from_numpy(self.prime))], batch_size=None)
