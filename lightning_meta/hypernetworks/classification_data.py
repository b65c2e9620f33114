"""Pictures to classify: MNIST and CIFAR-10, as Ha et al. (2016, sections 4.1 and 4.2) divide and augment them.

Shapes: B pictures of C channels, S x S pixels.
"""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.data_module import Source
from lightning_meta.running.labelled_image_data import LabelledImageDataModule
from lightning_meta.running.segments import Key, Segment
from lightning_meta.seeding import generator, shuffled
from lightning_meta.sources import image_files, labelled_images
from lightning_meta.sources.labelled_images import LabelledImages

TRAIN, VALIDATION_SPLIT = 0, 1  # of random numbers


class Pictures(NamedTuple):
    """A batch."""

    x: Tensor  # (B, C, S, S), normalised
    labels: Tensor  # (B,); -1: not known
    segment: Segment


class Drawn(NamedTuple):
    """A batch as the loader brings it: which pictures, and how they are cropped."""

    set_name: str
    indices: Tensor  # (B,)
    crop: Tensor  # (B, 3): rows and columns to leave out of the padded picture, and whether it is mirrored
    segment: Segment


class PictureSet(Dataset[tuple[np.ndarray, Segment]]):
    """Labelled pictures: in a fixed order, or, for training, in a shuffled one, each cropped in its own way.

    Training sample `i` is a function of (seed, i): all pictures come once before any comes again.

    Args:
        name: What batches carry.
        images: (N, C, S, S), uint8.
        labels: (N,).
        padding: Pixels that are added on every side before a crop of S x S is taken.
        flip: Mirror half of the pictures.
        seed: Of order and crops; None: a fixed order.
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        padding: int = 0,
        flip: bool = False,
        seed: int | None = None,
    ):
        self.name, self.images, self.labels = name, images, labels.long()
        self.padding, self.flip, self.seed = padding, flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[np.ndarray, Segment]:
        index, segment = key
        if self.seed is None:
            return np.array([index, 0, 0, 0]), segment
        random = generator(self.seed, TRAIN, index)
        picture = shuffled(index, len(self.images), self.seed, TRAIN)
        return np.array(
            [picture, *random.integers(2 * self.padding + 1, size=2), random.integers(1 + self.flip)]
        ), segment

    def collate(self, samples: list[tuple[np.ndarray, Segment]]) -> Drawn:
        """Joins samples of one segment."""
        numbers = torch.from_numpy(np.stack([numbers for numbers, _ in samples]))
        return Drawn(self.name, numbers[:, 0], numbers[:, 1:], samples[0][1])

    def pictures(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Pictures (B, C, S, S), uint8, and labels, on the device where ``drawn`` is; they stay there."""
        device = drawn.indices.device
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        images = self.images[drawn.indices]
        if self.padding or self.flip:
            images = crop(F.pad(images, [self.padding] * 4), images.shape[-1], drawn.crop)
        return images, self.labels[drawn.indices]


def crop(padded: Tensor, size: int, how: Tensor) -> Tensor:
    """Cuts pictures (B, C, S, S) out of larger ones.

    Args:
        padded: (B, C, S', S').
        size: S.
        how: (B, 3): the first row, the first column, and 1 where the picture is mirrored.
    """
    rows, columns, flip = how.unsqueeze(-1).unbind(1)  # (B, 1) each
    steps = torch.arange(size, device=how.device)
    rows, columns = rows + steps, columns + torch.where(flip == 1, size - 1 - steps, steps)
    batch = torch.arange(len(padded), device=how.device)[:, None, None]
    return padded.movedim(1, -1)[batch, rows[:, :, None], columns[:, None]].movedim(-1, 1)


class ClassificationDataModule(LabelledImageDataModule):
    """What both data sets share.

    A twelfth or a tenth of the training pictures (5,000 at most, drawn at random, the same for every seed) is for
    validation.

    Args:
        root: Folder with the data set.
        source: ``paper`` insists on the paper's data set, ``stand-in`` on what needs no download; ``auto`` takes the
            paper's where it lies or can be downloaded, else the stand-in.
        download: Whether to fetch it into ``root`` where it is missing.
        pictures: A folder or archive of the user's own in its place: one folder of pictures a class, or these below
            ``train`` and ``test``.
        images: What ``predict`` classifies: a picture or a folder of pictures. None: test pictures.
        augment: Crop (and mirror, where it can be) training pictures at random.
        batch_size: Pictures a process and step.
        train_pictures: Of the training pictures take so many. None: all.
        val_pictures: To validate on. None: all that there are.
        test_pictures: To test on. None: all.
        predict_pictures: Test pictures that ``predict`` shows where there are no ``images``.
        num_workers: Processes that draw pictures; 0 draws them in the training process.
        seed: Of order and crops in training.

    Raises:
        InputError: Where files are missing or damaged, or there are not so many pictures.
    """

    shape: ClassVar[tuple[int, int, int]]
    padding: ClassVar[int]  # on every side, before the random crop
    flip: ClassVar[bool]
    mean: ClassVar[tuple[float, ...]]  # of each channel, 0 to 1
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        pictures: str | None = None,
        images: str | None = None,
        augment: bool = True,
        batch_size: int = 128,
        train_pictures: int | None = None,
        val_pictures: int | None = None,
        test_pictures: int | None = None,
        predict_pictures: int = 100,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.data: LabelledImages | None = None

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        self.data = self.data or self.read()  # once for fit and test
        images, labels, test_images, test_labels, self.classes, _ = self.data
        order = torch.from_numpy(generator(0, VALIDATION_SPLIT).permutation(len(images)))
        held_out = max(1, min(5000, len(images) // 10))
        counts = {"val": (h.val_pictures, held_out), "train": (h.train_pictures, len(images) - held_out)}
        counts["test"] = h.test_pictures, len(test_images)
        for name, (wanted, there) in counts.items():
            if wanted is not None and not 1 <= wanted <= there:
                raise InputError(f"data.{name}_pictures: {wanted} of {there} pictures: choose 1 to {there}")
        val, train = order[:held_out][: h.val_pictures], order[held_out:][: h.train_pictures]
        padding = self.padding if h.augment else 0
        self.sets = {
            "train": PictureSet("train", images[train], labels[train], padding, h.augment and self.flip, h.seed),
            "val": PictureSet("val", images[val], labels[val]),
            "test": PictureSet("test", test_images[: h.test_pictures], test_labels[: h.test_pictures]),
        }
        self.counts = {name: len(pictures) for name, pictures in self.sets.items()}
        self.names: list[str] | None = None
        if stage == "predict" and h.images:
            self.sets["predict"], self.names = self._own_images(Path(h.images))
            self.counts["predict"] = len(self.names)
        self.test_name = "test pictures"

    def _own_images(self, path: Path) -> tuple[PictureSet, list[str]]:
        paths = image_files.picture_paths(path) if path.is_dir() else [path]
        images = torch.stack([self.fit(image_files.read_picture(p)) for p in paths])
        return PictureSet("predict", images, torch.full((len(paths),), -1)), [p.name for p in paths]

    def fit(self, picture: Tensor) -> Tensor:
        """A user's picture (3, H, W), uint8, at the size and in the channels of the data set."""
        picture = F.interpolate(picture[None].float(), self.shape[1:], mode="bilinear", antialias=True)[0]
        picture = picture if self.shape[0] == 3 else picture.mean(0, keepdim=True)
        return picture.round().to(torch.uint8)

    def normalised(self, images: Tensor) -> Tensor:
        """The network's input for pictures (B, C, S, S), uint8."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images / 255).sub_(mean).div_(std)

    def shown(self, x: Tensor) -> Tensor:
        """Pictures from 0 to 1 again."""
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return x.float() * std + mean

    def evaluation_loader(self, split: str, count: int | None = None, **options: Any) -> DataLoader:
        return super().evaluation_loader(split, count, batch_size=max(self.batch_size, 100), **options)

    def predict_dataloader(self) -> DataLoader:
        if "predict" in self.sets:
            return super().predict_dataloader()
        return self.evaluation_loader("test", min(self.hparams.predict_pictures, self.counts["test"]))

    def on_after_batch_transfer(self, batch: Drawn, dataloader_idx: int) -> Pictures:
        images, labels = self.sets[batch.set_name].pictures(batch)
        batch = Pictures(self.normalised(images), labels, batch.segment)
        return self.trainer.precision_plugin.convert_input(batch)  # Lightning's turn was before there were pictures


class MNISTDataModule(ClassificationDataModule):
    """Section 4.1: MNIST, or the user's own pictures in grey; padded to 30x30 and cropped to 28x28 in training.

    Pictures for ``predict`` are like the data set's, light ink on dark paper; dark ink on light paper is turned.

    Args:
        options: Of ``ClassificationData``.
    """

    dataset = labelled_images.MNIST
    shape, padding, flip = (1, 28, 28), 1, False
    mean, std = (0.0,), (1.0,)

    def __init__(self, **options):
        super().__init__(**options)
        self.save_hyperparameters()

    def fit(self, picture: Tensor) -> Tensor:
        picture = super().fit(picture)
        rim = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
        return picture if self.hparams.pictures or rim.float().mean() < 128 else 255 - picture


class CIFAR10DataModule(ClassificationDataModule):
    """Section 4.2: CIFAR-10, or the user's own pictures; padded to 36x36, cropped to 32x32 and mirrored in training.

    The paper does not say: channels are normalised to CIFAR-10's mean 0 and variance 1.

    Args:
        options: Of ``ClassificationData``.
    """

    dataset = labelled_images.CIFAR10
    shape, padding, flip = (3, 32, 32), 2, True
    mean, std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)

    def __init__(self, **options):
        super().__init__(**options)
        self.save_hyperparameters()
