"""Stereo pairs of small grey pictures (De Brabandere et al. 2016, section 4), or a user's own.

Shapes: B pairs, S the side of a picture in pixels; one grey channel; values in [0, 1].
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.seeding import generator, shuffled
from lightning_meta.sources import image_files, stereo
from lightning_meta.sources.driving import read_highway
from lightning_meta.sources.stereo import StereoPair, Views

SIZE = 64  # the paper's side of a picture
STAND_IN = "drawn scenes of textured layers, a stand-in for highway driving"
FEWEST = 10  # pairs that a folder must have to be trained on
PHOTOGRAPHS = ("china", "flower"), ("minduka",), ("grace_hopper",)  # whose pieces are drawn in each split
MEAN_OF = 500  # training pairs that the mean view is made from


class Example(NamedTuple):
    """A pair of S x S pixels."""

    name: str
    views: Views
    scored: bool = True  # False: from elsewhere than the training pairs, there for the sake of its disparity


class Pairs(NamedTuple):
    """A batch."""

    left: Tensor  # (B, 1, S, S)
    right: Tensor  # (B, 1, S, S)
    disparity: Tensor  # (B, 1, S, S), of the right view in pixels; NaN where it is not known
    scored: Tensor  # (B,), bool: whether the pair counts for the squared error
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[Example, Segment]]) -> "Pairs":
        """Joins ``(example, segment)`` pairs of one size."""
        examples, segments = zip(*samples, strict=True)
        left, right = (_planes([example.views[i] for example in examples]) / 255 for i in (0, 1))
        unknown = np.full(left.shape[2:], np.nan, np.float32)
        truths = [example.views.right_disparity for example in examples]
        disparity = _planes([unknown if truth is None else truth for truth in truths])
        return cls(left, right, disparity, torch.tensor([example.scored for example in examples]), segments[0])


def _planes(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))[:, None]


class DrawnPairs(Dataset[tuple[Example, Segment]]):
    """Scenes drawn on the fly: sample `i` is a function of (seed, split, i). See ``sources.stereo.textured_layers``."""

    def __init__(self, pictures: list[np.ndarray], split: str, seed: int, size: int):
        self.pictures, self.key, self.size = pictures, (seed, SPLITS[split]), size

    def __getitem__(self, key: Key) -> tuple[Example, Segment]:
        index, segment = key
        views = stereo.textured_layers(self.pictures, self.size, generator(*self.key, index))
        return Example(f"{index:03d}", views), segment


class RandomWindows(Dataset[tuple[Example, Segment]]):
    """Squares of given pairs: sample `i` is a function of (seed, i). Each pair in turn, in a shuffled order.

    Args:
        pairs: Of ``size`` pixels at least along each side.
        seed: Of the samples.
        size: S.
        mirror: Mirror half of the pairs.
    """

    def __init__(self, pairs: Sequence[Views], seed: int, size: int, mirror: bool):
        self.pairs, self.key, self.size, self.mirror = pairs, (seed, SPLITS["train"]), size, mirror

    def __getitem__(self, key: Key) -> tuple[Example, Segment]:
        index, segment = key
        random = generator(*self.key, index)
        views = self.pairs[shuffled(index, len(self.pairs), *self.key)]
        top, left = (random.integers(length - self.size + 1) for length in views.left.shape)
        views = views.window(top, left, self.size)
        return Example("", views.mirrored() if self.mirror and random.random() < 0.5 else views), segment


class FixedPairs(Dataset[tuple[Example, Segment]]):
    """Examples in a fixed order."""

    def __init__(self, examples: list[Example]):
        self.examples = examples

    def __getitem__(self, key: Key) -> tuple[Example, Segment]:
        index, segment = key
        return self.examples[index], segment


class StereoPairsDataModule(MetaDataModule):
    """Left and right views in grey, 64x64 pixels: the paper's highway recording, other pairs, or drawn scenes.

    Other pairs may have any layout that ``sources.stereo.find_pairs`` knows, with true disparities or without. They are
    scaled by area averaging until their shorter side has ``size`` pixels. Training sees random squares of them,
    validation, test and ``predict`` as many as fit side by side, evenly spread. Of a folder of ten pairs or more the
    first 70 % (by name; of a drive: in time) are to train on, the next 10 % to validate on and the rest to test on. The
    pairs of smaller folders are all for the test, and only for what it says about disparities. A pair whose true
    disparity is known of the left view alone is mirrored: then it is known of the right view.

    Differs from the paper: of the highway recording the last tenth of the training file is set aside to validate on.

    Args:
        root: Folder with ``highway/highwayDriving_{train,test}.h5``, the paper's, or ``stereo/``, with other pairs.
        source: ``paper`` insists on the first; ``stand-in`` draws scenes of textured layers cut from photographs that
            come with installed packages; ``auto`` takes the first of the three that is there.
        pairs: A user's own folder of pairs, in place of ``<root>/stereo``; ``predict`` predicts all of it.
        disparity_scale: Levels of a disparity picture that are one pixel, where its layout does not say so.
        size: Side of a picture, even, 16 to 64 (paper: 64).
        mirror: Mirror half of the training pairs that are not drawn (paper: no).
        batch_size: Pairs a process and step.
        val_pairs: To validate on, or as many as there are.
        test_pairs: To test on, likewise.
        predict_pairs: Test pairs that ``predict`` shows where there is no folder of the user's.
        num_workers: Processes that draw or cut pairs; 0 does so in the training process.
        seed: Of the training pairs.

    Raises:
        InputError: Where files are missing or damaged, views have no partner or another size, a disparity has no scale,
            or there are too few pairs.
    """

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        pairs: str | None = None,
        disparity_scale: float | None = None,
        size: int = SIZE,
        mirror: bool = True,
        batch_size: int = 16,
        val_pairs: int = 128,
        test_pairs: int = 500,
        predict_pairs: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    collate = staticmethod(Pairs.collate)

    @property
    def present(self) -> bool:
        return bool(list((Path(self.hparams.root) / "highway").glob("highwayDriving_*.h5")))

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if not 16 <= h.size <= SIZE or h.size % 2:
            raise InputError(f"data.size: {h.size} pixels: choose an even number from 16 to {SIZE}")
        if h.disparity_scale is not None and not h.disparity_scale > 0:
            raise InputError(f"data.disparity_scale: {h.disparity_scale}: give the levels of one pixel, above 0")
        highway, folder = Path(h.root) / "highway", Path(h.root) / "stereo"
        if h.pairs:
            self._use_folder(Path(h.pairs), stage)
        elif h.source == "auto" and folder.is_dir() and not self.present:
            self._use_folder(folder, stage)
        elif self.use_papers_data("highway driving", highway, STAND_IN):
            self._use_highway(highway)
        else:
            self._use_drawn()
        shown = self.examples["test"][: None if h.pairs else h.predict_pairs]
        self.examples["predict"] = shown
        self.sets |= {split: FixedPairs(examples) for split, examples in self.examples.items()}
        self.counts = {split: len(examples) for split, examples in self.examples.items()}

    def _use_highway(self, folder: Path) -> None:
        h = self.hparams
        if h.size != SIZE:
            raise InputError(f"data.size: {h.size} pixels: the highway recording has {SIZE}")
        train, test = (
            [Views(*views) for views in zip(*read_highway(folder / name, ["highway_L", "highway_R"]), strict=True)]
            for name in ("highwayDriving_train.h5", "highwayDriving_test.h5")
        )
        if len(train) < FEWEST:
            raise InputError(f"{folder}: {len(train)} training pairs are too few: give the authors' files")
        held_out = len(train) // 10
        self.sets["train"] = RandomWindows(train[:-held_out], h.seed, SIZE, h.mirror)
        val, test = ([Example(f"{i:05d}", views) for i, views in enumerate(part)] for part in (train[-held_out:], test))
        self._evaluate_on(val[: h.val_pairs], test[: h.test_pairs])
        self.test_name = "the test recording"

    def _use_folder(self, folder: Path, stage: str) -> None:
        h = self.hparams
        pairs = stereo.find_pairs(folder, h.disparity_scale)
        self.data_name = f"{len(pairs)} pairs of {folder.name}"
        if stage == "predict" and h.pairs:
            self._evaluate_on([], list(squares(pairs, h.size)))
            return
        train, val, test, others = [], [], [], []
        for _, group in groupby(pairs, lambda pair: pair.folder):
            group = list(group)
            if len(group) < FEWEST:
                others += group
            else:
                first, second = len(group) * 7 // 10, len(group) * 8 // 10
                train, val, test = train + group[:first], val + group[first:second], test + group[second:]
        if not train:
            raise InputError(
                f"{folder}: no folder there has {FEWEST} pairs, and smaller ones are not trained on: add some, or take "
                "--data.source stand-in"
            )
        self.sets["train"] = RandomWindows([small(pair, h.size) for pair in train], h.seed, h.size, h.mirror)
        known = (e._replace(scored=False) for e in squares(others, h.size) if e.views.right_disparity is not None)
        val = list(islice(squares(val, h.size), h.val_pairs))
        self._evaluate_on(val, [*islice(squares(test, h.size), h.test_pairs), *known])
        self.test_name = f"the last fifth of a drive, true disparities of {len(self.truths)} pairs"

    def _use_drawn(self) -> None:
        h = self.hparams
        found = {name: image_files.grey(picture) for name, picture in image_files.bundled_photographs().items()}
        train, val, test = ([found[name] for name in names] for names in PHOTOGRAPHS)
        self.sets["train"] = DrawnPairs(train, "train", h.seed, h.size)
        drawn = (DrawnPairs(val, "val", 0, h.size), h.val_pairs), (DrawnPairs(test, "test", 0, h.size), h.test_pairs)
        self._evaluate_on(*([_example(pairs, i) for i in range(count)] for pairs, count in drawn))
        self.test_name = "layers cut from another photograph"

    def _evaluate_on(self, val: list[Example], test: list[Example]) -> None:
        self.examples = {"val": val, "test": test}
        self.truths = [e.views.right_disparity for e in test if e.views.right_disparity is not None]

    @property
    def test_samples(self) -> int:
        """How many pairs the squared error is a mean of."""
        return sum(example.scored for example in self.examples["test"])

    def mean_view(self) -> Tensor:
        """The average right view of training pairs, (1, S, S): what one knows without looking."""
        views = [_example(self.sets["train"], i).views.right / 255 for i in range(MEAN_OF)]
        return torch.from_numpy(np.mean(views, axis=0)).float()[None]

    def mean_disparities(self) -> tuple[Tensor, Tensor]:
        """The average disparity of the test pairs, which nothing but the test knows: (1, 1, 1); and that of each place,
        (1, S, S)."""
        truths = _planes(self.truths)
        return truths.nanmean().view(1, 1, 1), truths.nanmean(0)


def _example(dataset: Dataset, index: int) -> Example:
    return dataset[index, Segment(index, 0, 1, last=True)][0]


def small(pair: StereoPair, size: int) -> Views:
    """A pair, its shorter side scaled to ``size`` pixels, with the disparity of its right view if any is known.

    Raises:
        InputError: Where it cannot be read or is smaller.
    """
    views = pair.read()
    height, width = views.left.shape
    if min(height, width) < size:
        raise InputError(f"{pair.left} is {width}x{height} pixels: give views of {size}x{size} at least")
    views = views.scaled(size)
    return views.mirrored() if views.right_disparity is None and views.left_disparity is not None else views


def squares(pairs: list[StereoPair], size: int) -> Iterator[Example]:
    """Squares of scaled pairs: of each as many as fit side by side, evenly spread; one pair after another."""
    for pair in pairs:
        views, name = small(pair, size), pair.name.replace("/", "_")
        height, width = views.left.shape
        count = width // size
        free = width - size
        lefts = [free // 2] if count == 1 else [round(i * free / (count - 1)) for i in range(count)]
        for i, left in enumerate(lefts):
            yield Example(f"{name}_{i}" if count > 1 else name, views.window((height - size) // 2, left, size))
