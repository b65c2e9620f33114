"""Patches of natural pictures, each with an angle (De Brabandere et al. 2016, section 4), or a user's picture.

Shapes: B samples, H rows, W columns; one grey channel; values in [0, 1].
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.command_options import Numbers
from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.seeding import generator
from lightning_meta.sources import image_files

SIZE = 64  # side of a patch in validation and test
STAND_IN = "bundled photographs, a stand-in for natural pictures"


class Patches(NamedTuple):
    """A batch."""

    images: Tensor  # (B, 1, H, W)
    angles: Tensor  # (B,), in radians, from 0 to 2 pi
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[np.ndarray, float, Segment]]) -> "Patches":
        """Joins ``(image uint8 (H, W), angle, segment)`` of images of one size."""
        images, angles, segments = zip(*samples, strict=True)
        return cls(torch.from_numpy(np.stack(images))[:, None] / 255, torch.tensor(angles), segments[0])


class RandomPatches(Dataset[tuple[np.ndarray, float, Segment]]):
    """Patch `i` and its angle are a function of (seed, split, i).

    Args:
        pictures: uint8 (H, W) each, of any sizes from the patch's on.
        split: Of ``SPLITS``.
        seed: Of patches and angles.
        size: Side of a patch.
    """

    def __init__(self, pictures: list[np.ndarray], split: str, seed: int, size: int = SIZE):
        self.pictures, self.key, self.size = pictures, (seed, SPLITS[split]), size

    def __getitem__(self, key: Key) -> tuple[np.ndarray, float, Segment]:
        index, segment = key
        random = generator(*self.key, index)
        picture = self.pictures[random.integers(len(self.pictures))]
        top, left = (random.integers(length - self.size + 1) for length in picture.shape)
        patch = picture[top : top + self.size, left : left + self.size]
        return patch, random.uniform(0, 2 * math.pi), segment


class OneInManyAngles(Dataset[tuple[np.ndarray, float, Segment]]):
    """A picture, uint8 (H, W), once for each angle."""

    def __init__(self, picture: np.ndarray, degrees: list[float]):
        self.picture, self.degrees = picture, degrees

    def __getitem__(self, key: Key) -> tuple[np.ndarray, float, Segment]:
        index, segment = key
        return self.picture, math.radians(self.degrees[index]), segment


class SteerablePatchesDataModule(MetaDataModule):
    """Grey patches of 64x64 pixels from natural pictures, and angles from the whole circle, all drawn on the fly.

    No picture is in two splits. Of the pictures in ``<root>/steerable``, by name, the last tenth is to test on and the
    tenth before it to validate on. Validation and test patches are the same for every seed.
    The paper does not say: how pictures were cut into patches; here anywhere, at their own resolution, all pictures
    being equally likely.

    Args:
        root: Folder with ``steerable/``, which holds three PNG, JPG or WebP pictures at least.
        source: ``paper`` insists on these; ``stand-in`` takes photographs that come with installed packages; ``auto``
            the pictures where they lie, else the stand-in.
        picture: What ``predict`` filters, of any size. None: a test patch.
        angles: In degrees, from 0 to 360, in which it does. None: twelve around the circle.
        batch_size: Patches a process and step.
        size: Side of a training patch (paper: 64, as in validation and test).
        val_patches: To validate on.
        test_patches: To test on.
        num_workers: Processes that draw patches; 0 draws them in the training process.
        seed: Of the training patches.

    Raises:
        InputError: Where pictures are missing, damaged or too small, or there are no such angles.
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
        """The pictures below ``root``."""
        folder = Path(self.hparams.root) / "steerable"
        return image_files.picture_paths(folder) if folder.is_dir() else []

    @property
    def present(self) -> bool:
        return len(self.paths) >= 3

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if not 9 <= h.size <= SIZE:
            raise InputError(f"data.size: {h.size} pixels: choose 9, a filter's size, to {SIZE}")
        splits = self.read()
        self.sets = {
            "train": RandomPatches(splits["train"], "train", h.seed, h.size),
            "val": RandomPatches(splits["val"], "val", seed=0),
            "test": RandomPatches(splits["test"], "test", seed=0),
        }
        self.degrees = list(range(0, 360, 30)) if h.angles is None else h.angles
        if not self.degrees or not all(0 <= degrees <= 360 for degrees in self.degrees):
            raise InputError(f"data.angles: {self.degrees}: give degrees from 0 to 360, such as [0, 45, 90]")
        if stage == "predict" and h.picture:
            picture = image_files.grey(image_files.read_picture(h.picture))
        else:
            picture = self.sets["test"][0, Segment(0, 0, 1, last=True)][0]
        self.sets["predict"] = OneInManyAngles(picture, self.degrees)
        self.counts = {"val": h.val_patches, "test": h.test_patches, "predict": len(self.degrees)}
        self.test_name = "patches of other pictures"

    def read(self) -> dict[str, list[np.ndarray]]:
        """Grey pictures of each split."""
        h, folder, paths = self.hparams, Path(self.hparams.root) / "steerable", self.paths
        if h.source == "paper" and len(paths) < 3:
            raise InputError(
                f"{folder}: {len(paths)} pictures: put natural pictures there, three PNG, JPG or WebP at least"
            )
        if not self.use_papers_data("three pictures", folder, STAND_IN):
            found = {name: image_files.grey(picture) for name, picture in image_files.bundled_photographs().items()}
            names = {"train": ("china", "flower"), "val": ("minduka",), "test": ("grace_hopper",)}
            return {split: [found[name] for name in names[split]] for split in names}
        pictures = [image_files.grey(image_files.read_picture(path)) for path in paths]
        for path, picture in zip(paths, pictures, strict=True):
            if min(picture.shape) < SIZE:
                height, width = picture.shape
                raise InputError(f"{path} is {width}x{height} pixels: replace it by one of {SIZE}x{SIZE} at least")
        held_out = max(1, len(pictures) // 10)
        train, val, test = pictures[: -2 * held_out], pictures[-2 * held_out : -held_out], pictures[-held_out:]
        self.data_name = f"{len(pictures)} pictures of {folder.name}"
        return {"train": train, "val": val, "test": test}

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader("predict", batch_size=1)
