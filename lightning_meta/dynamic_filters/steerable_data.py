"""Patches of natural images, each with an angle (De Brabandere et al. 2016, section 4), or the user's image.

Shapes: B samples, H rows, W columns; one grey channel; values in [0, 1].
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.dynamic_filters.photographs import grey_photographs
from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.options import Numbers
from lightning_meta.running.segments import Key, Segment
from lightning_meta.sources import image_files
from lightning_meta.sources.seeding import generator

SIZE = 64  # side of a patch in validation and test
STAND_IN = "bundled photographs, a stand-in for natural pictures"


class Patches(NamedTuple):
    """A batch of images and angles."""

    images: Tensor  # (B, 1, H, W)
    angles: Tensor  # (B,), in radians, from 0 to 2 pi
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[np.ndarray, float, Segment]]) -> "Patches":
        """Make a batch of samples ``(image uint8 (H, W), angle, segment)`` of one size."""
        images, angles, segments = zip(*samples, strict=True)
        return cls(torch.from_numpy(np.stack(images))[:, None] / 255, torch.tensor(angles), segments[0])


class RandomPatches(Dataset[tuple[np.ndarray, float, Segment]]):
    """Random patches with random angles. Patch `i` and its angle are a function of (seed, split, i).

    Args:
        images: Images, uint8 (H, W), at least as large as a patch.
        split: Name of the split, a key of ``SPLITS``.
        seed: Seed of patches and angles.
        size: Side of a patch in pixels.
    """

    def __init__(self, images: list[np.ndarray], split: str, seed: int, size: int = SIZE):
        self.images, self.key, self.size = images, (seed, SPLITS[split]), size

    def __getitem__(self, key: Key) -> tuple[np.ndarray, float, Segment]:
        index, segment = key
        random = generator(*self.key, index)
        image = self.images[random.integers(len(self.images))]
        top, left = (random.integers(length - self.size + 1) for length in image.shape)
        patch = image[top : top + self.size, left : left + self.size]
        return patch, random.uniform(0, 2 * math.pi), segment


class ImageAtAngles(Dataset[tuple[np.ndarray, float, Segment]]):
    """One image, uint8 (H, W), once for each angle."""

    def __init__(self, image: np.ndarray, degrees: list[float]):
        self.image, self.degrees = image, degrees

    def __getitem__(self, key: Key) -> tuple[np.ndarray, float, Segment]:
        index, segment = key
        return self.image, math.radians(self.degrees[index]), segment


class SteerablePatchesDataModule(MetaDataModule):
    """Grey patches of 64x64 pixels from natural images, and angles from the whole circle, drawn on the fly.

    No image is in two splits. In order of name, the last tenth of the images in ``<root>/steerable`` is for testing and
    the tenth before it for validation. Validation and test patches do not depend on the seed.
    The paper does not say: how images were cut into patches. Here all images and positions are equally likely, and
    images keep their resolution.

    Args:
        root: Folder with ``steerable/``, which contains at least three PNG, JPG or WebP images.
        source: ``paper`` requires these; ``stand-in`` uses photographs that come with installed packages; ``auto`` uses
            these if they are there, else the stand-in.
        picture: Image of any size that ``predict`` filters. None: a test patch.
        angles: Angles in degrees, from 0 to 360, at which ``predict`` filters. None: twelve around the circle.
        batch_size: Number of patches per process and step.
        size: Side of a training patch (paper: 64, as in validation and test).
        val_patches: Number of patches to validate on.
        test_patches: Number of patches to test on.
        num_workers: Number of processes that cut patches; 0 cuts them in the training process.
        seed: Seed of the training patches.

    Raises:
        InputError: If images are missing, damaged or too small, or an angle is out of range.

    Example:
        >>> from lightning_meta.dynamic_filters.steerable_data import SteerablePatchesDataModule
        >>> data = SteerablePatchesDataModule(source="stand-in", angles=[0, 45])
        >>> data.setup("test")
        >>> data.counts
        {'val': 256, 'test': 2000, 'predict': 2}
    """

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        picture: str | None = None,
        angles: Numbers | None = None,
        batch_size: int = 64,
        size: int = SIZE,
        val_patches: int = 256,
        test_patches: int = 2000,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    collate = staticmethod(Patches.collate)

    @property
    def paths(self) -> list[Path]:
        """The images in ``<root>/steerable``."""
        folder = Path(self.hparams.root) / "steerable"
        return image_files.image_paths(folder) if folder.is_dir() else []

    @property
    def present(self) -> bool:
        return len(self.paths) >= 3

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if not 9 <= h.size <= SIZE:
            raise InputError(f"data.size is {h.size}: choose a size from 9 (that of a filter) to {SIZE} pixels")
        splits = self.read()
        self.sets = {
            "train": RandomPatches(splits["train"], "train", h.seed, h.size),
            "val": RandomPatches(splits["val"], "val", seed=0),
            "test": RandomPatches(splits["test"], "test", seed=0),
        }
        self.degrees = list(range(0, 360, 30)) if h.angles is None else h.angles
        if not self.degrees or not all(0 <= degrees <= 360 for degrees in self.degrees):
            raise InputError(f"data.angles is {self.degrees}: give degrees from 0 to 360, such as [0, 45, 90]")
        if stage == "predict" and h.picture:
            image = image_files.grey(image_files.read_image(h.picture))
        else:
            image = self.sets["test"][0, Segment(0, 0, 1, last=True)][0]
        self.sets["predict"] = ImageAtAngles(image, self.degrees)
        self.counts = {"val": h.val_patches, "test": h.test_patches, "predict": len(self.degrees)}
        self.test_name = "patches of other pictures"

    def read(self) -> dict[str, list[np.ndarray]]:
        """Return the grey images of each split."""
        h, folder, paths = self.hparams, Path(self.hparams.root) / "steerable", self.paths
        if h.source == "paper" and len(paths) < 3:
            raise InputError(
                f"{folder} has {len(paths)} images: put at least three natural images (PNG, JPG or WebP) there"
            )
        if not self.use_papers_data("three pictures", folder, STAND_IN):
            return grey_photographs()
        images = [image_files.grey(image_files.read_image(path)) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if min(image.shape) < SIZE:
                height, width = image.shape
                raise InputError(f"{path} is {width}x{height} pixels: replace it by one of {SIZE}x{SIZE} at least")
        held_out = max(1, len(images) // 10)
        train, val, test = images[: -2 * held_out], images[-2 * held_out : -held_out], images[-held_out:]
        self.data_name = f"{len(images)} pictures of {folder.name}"
        return {"train": train, "val": val, "test": test}

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader("predict", batch_size=1)
