"""Stereo pairs of small grey images (De Brabandere et al. 2016, section 4), or the user's own.

Shapes: B pairs, S the side of an image in pixels; one grey channel; values in [0, 1].
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_meta.dynamic_filters.photographs import grey_photographs
from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.sources import stereo
from lightning_meta.sources.driving import read_highway
from lightning_meta.sources.seeding import generator, shuffled
from lightning_meta.sources.stereo import StereoPair, Views

SIZE = 64  # side of the paper's images
STAND_IN = "drawn scenes of textured layers, a stand-in for highway driving"
FEWEST = 10  # smallest number of pairs in a folder that is used for training
MEAN_OF = 500  # number of training pairs that the mean view averages


class Example(NamedTuple):
    """A pair of S x S pixels."""

    name: str
    views: Views
    scored: bool = True  # False: from another folder than the training pairs, used only for its disparity


class StereoBatch(NamedTuple):
    """A batch of pairs."""

    left: Tensor  # (B, 1, S, S)
    right: Tensor  # (B, 1, S, S)
    disparity: Tensor  # (B, 1, S, S), of the right view in pixels; NaN where it is not known
    scored: Tensor  # (B,), bool: whether the pair counts for the squared error
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[Example, Segment]]) -> "StereoBatch":
        """Make a batch of samples ``(example, segment)`` of one size."""
        examples, segments = zip(*samples, strict=True)
        left, right = (_planes([example.views[i] for example in examples]) / 255 for i in (0, 1))
        unknown = np.full(left.shape[2:], np.nan, np.float32)
        truths = [example.views.right_disparity for example in examples]
        disparity = _planes([unknown if truth is None else truth for truth in truths])
        return cls(left, right, disparity, torch.tensor([example.scored for example in examples]), segments[0])


def _planes(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))[:, None]


class RenderedPairs(Dataset[tuple[Example, Segment]]):
    """Scenes rendered by ``sources.stereo.textured_layers``. Scene `i` is a function of (seed, split, i)."""

    def __init__(self, textures: list[np.ndarray], split: str, seed: int, size: int):
        self.textures, self.key, self.size = textures, (seed, SPLITS[split]), size

    def __getitem__(self, key: Key) -> tuple[Example, Segment]:
        index, segment = key
        views = stereo.textured_layers(self.textures, self.size, generator(*self.key, index))
        return Example(f"{index:03d}", views), segment


class RandomCrops(Dataset[tuple[Example, Segment]]):
    """Random square crops of given pairs, which take turns in shuffled order. Crop `i` is a function of (seed, i).

    Args:
        pairs: Pairs with sides of at least ``size`` pixels.
        seed: Seed of the crops.
        size: S.
        mirror: Mirror half of the crops.
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
    """Left and right views in grey, 64x64 pixels: the paper's highway recording, other pairs, or rendered scenes.

    Other pairs may have any layout that ``sources.stereo.find_pairs`` reads, with or without true disparities. They are
    scaled by area averaging until their shorter side has ``size`` pixels. Training uses random square crops;
    validation, test and ``predict`` use as many evenly spaced crops as fit side by side. In a folder of at least ten
    pairs the first 70 % (by name; of a drive: in time) are for training, the next 10 % for validation and the rest for
    testing. Pairs of smaller folders are only used to test disparities. If only the disparity of the left view is
    known, the pair is mirrored, which makes it that of the right view.

    Differs from the paper: the last tenth of the highway recording's training file is used for validation.

    Args:
        root: Folder with ``highway/highwayDriving_{train,test}.h5``, the paper's data, or with pairs in ``stereo/``.
        source: ``paper`` requires the paper's data; ``stand-in`` renders scenes of textured layers from photographs
            that come with installed packages; ``auto`` uses the paper's data, else ``stereo/``, else the stand-in.
        pairs: The user's folder of pairs, used instead of ``<root>/stereo``. ``predict`` then predicts all of it.
        disparity_scale: Number of levels per pixel of disparity images, if their layout does not define it.
        size: Side of an image in pixels, even, 16 to 64 (paper: 64).
        mirror: Mirror half of the training pairs, unless they are rendered (paper: no).
        batch_size: Number of pairs per process and step.
        val_pairs: Largest number of pairs to validate on.
        test_pairs: Largest number of pairs to test on.
        predict_pairs: Largest number of test pairs for ``predict``, unless ``pairs`` is given.
        num_workers: Number of processes that render or crop pairs; 0 does so in the training process.
        seed: Seed of the training pairs.

    Raises:
        InputError: If files are missing or damaged, a view has no partner or another size, the scale of a disparity is
            not known, or there are too few pairs.

    Example:
        >>> from lightning_meta.dynamic_filters.stereo_data import StereoPairsDataModule
        >>> data = StereoPairsDataModule(source="stand-in", val_pairs=2, test_pairs=3)
        >>> data.setup("test")
        >>> data.counts
        {'val': 2, 'test': 3, 'predict': 3}
        >>> data.examples["test"][0].views.left.shape
        (64, 64)
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

    collate = staticmethod(StereoBatch.collate)

    @property
    def present(self) -> bool:
        return bool(list((Path(self.hparams.root) / "highway").glob("highwayDriving_*.h5")))

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if not 16 <= h.size <= SIZE or h.size % 2:
            raise InputError(f"data.size is {h.size}: choose an even number of pixels from 16 to {SIZE}")
        if h.disparity_scale is not None and not h.disparity_scale > 0:
            raise InputError(
                f"data.disparity_scale is {h.disparity_scale}: give the number of levels per pixel, above 0"
            )
        highway, folder = Path(h.root) / "highway", Path(h.root) / "stereo"
        if h.pairs:
            self._use_folder(Path(h.pairs), stage)
        elif h.source == "auto" and folder.is_dir() and not self.present:
            self._use_folder(folder, stage)
        elif self.use_papers_data("highway driving", highway, STAND_IN):
            self._use_highway(highway)
        else:
            self._use_rendered()
        shown = self.examples["test"][: None if h.pairs else h.predict_pairs]
        self.examples["predict"] = shown
        self.sets |= {split: FixedPairs(examples) for split, examples in self.examples.items()}
        self.counts = {split: len(examples) for split, examples in self.examples.items()}

    def _use_highway(self, folder: Path) -> None:
        h = self.hparams
        if h.size != SIZE:
            raise InputError(f"data.size is {h.size}, but the highway recording has {SIZE} pixels: set it to {SIZE}")
        train, test = (
            [Views(*views) for views in zip(*read_highway(folder / name, ["highway_L", "highway_R"]), strict=True)]
            for name in ("highwayDriving_train.h5", "highwayDriving_test.h5")
        )
        if len(train) < FEWEST:
            raise InputError(f"{folder} has {len(train)} training pairs, too few: use the authors' files")
        held_out = len(train) // 10
        self.sets["train"] = RandomCrops(train[:-held_out], h.seed, SIZE, h.mirror)
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
                f"{folder}: training needs a folder with at least {FEWEST} pairs: add pairs, or set --data.source "
                "stand-in"
            )
        self.sets["train"] = RandomCrops([small(pair, h.size) for pair in train], h.seed, h.size, h.mirror)
        known = (e._replace(scored=False) for e in squares(others, h.size) if e.views.right_disparity is not None)
        val = list(islice(squares(val, h.size), h.val_pairs))
        self._evaluate_on(val, [*islice(squares(test, h.size), h.test_pairs), *known])
        self.test_name = f"the last fifth of a drive, true disparities of {len(self.truths)} pairs"

    def _use_rendered(self) -> None:
        h = self.hparams
        train, val, test = grey_photographs().values()
        self.sets["train"] = RenderedPairs(train, "train", h.seed, h.size)
        val, test = RenderedPairs(val, "val", 0, h.size), RenderedPairs(test, "test", 0, h.size)
        self._evaluate_on(
            [_example(val, i) for i in range(h.val_pairs)], [_example(test, i) for i in range(h.test_pairs)]
        )
        self.test_name = "layers cut from another photograph"

    def _evaluate_on(self, val: list[Example], test: list[Example]) -> None:
        self.examples = {"val": val, "test": test}
        self.truths = [e.views.right_disparity for e in test if e.views.right_disparity is not None]

    @property
    def test_samples(self) -> int:
        """Number of pairs that the mean squared error is computed from."""
        return sum(example.scored for example in self.examples["test"])

    def mean_view(self) -> Tensor:
        """Return the average right view of training pairs, (1, S, S), which serves as a baseline."""
        views = [_example(self.sets["train"], i).views.right / 255 for i in range(MEAN_OF)]
        return torch.from_numpy(np.mean(views, axis=0)).float()[None]

    def mean_disparities(self) -> tuple[Tensor, Tensor]:
        """Return the average disparity of the test pairs, (1, 1, 1), and that of each pixel, (1, S, S).

        These baselines know the test's true disparities, unlike a model.
        """
        truths = _planes(self.truths)
        return truths.nanmean().view(1, 1, 1), truths.nanmean(0)


def _example(dataset: Dataset, index: int) -> Example:
    return dataset[index, Segment(index, 0, 1, last=True)][0]


def small(pair: StereoPair, size: int) -> Views:
    """Read a pair, scale its shorter side to ``size`` pixels and, if only the left disparity is known, mirror the pair.

    Raises:
        InputError: If the pair cannot be read or is smaller.
    """
    views = pair.read()
    height, width = views.left.shape
    if min(height, width) < size:
        raise InputError(f"{pair.left} is {width}x{height} pixels: views need at least {size}x{size}")
    views = views.scaled(size)
    return views.mirrored() if views.right_disparity is None and views.left_disparity is not None else views


def squares(pairs: list[StereoPair], size: int) -> Iterator[Example]:
    """Yield square crops of scaled pairs, evenly spaced: as many of each pair as fit side by side."""
    for pair in pairs:
        views, name = small(pair, size), pair.name.replace("/", "_")
        height, width = views.left.shape
        count = width // size
        free = width - size
        lefts = [free // 2] if count == 1 else [round(i * free / (count - 1)) for i in range(count)]
        for i, left in enumerate(lefts):
            yield Example(f"{name}_{i}" if count > 1 else name, views.window((height - size) // 2, left, size))
