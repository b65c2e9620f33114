"""Images to classify: MNIST and CIFAR-10, split and augmented as in Ha et al. (2016, sections 4.1 and 4.2).

Letters: B images of C channels and S x S pixels.
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
from lightning_meta.sources import image_files, labelled_images
from lightning_meta.sources.labelled_images import LabelledImages
from lightning_meta.sources.seeding import generator, shuffled

TRAIN, VALIDATION_SPLIT = 0, 1  # separate streams of random numbers


class ImageBatch(NamedTuple):
    """A batch of images."""

    x: Tensor  # (B, C, S, S), normalised
    labels: Tensor  # (B,); -1: unknown
    segment: Segment


class ImageIndices(NamedTuple):
    """A batch as the loader returns it: the positions of its images, and how to crop them."""

    set_name: str
    indices: Tensor  # (B,)
    crop: Tensor  # (B, 3): first row and first column of the crop, and 1 if the image is mirrored
    segment: Segment


class ImageDataset(Dataset[tuple[np.ndarray, Segment]]):
    """Labelled images in a fixed order or, for training, shuffled and randomly cropped.

    Training sample `i` is a function of (seed, i). Every image comes once before any comes again.

    Args:
        name: Name of the set, stored in its batches.
        images: (N, C, S, S), uint8.
        labels: (N,).
        padding: Pixels added on every side before a random crop of S x S.
        flip: Mirror half of the images.
        seed: Seed of order and crops. None: a fixed order, no crops.
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
        image = shuffled(index, len(self.images), self.seed, TRAIN)
        crop = *random.integers(2 * self.padding + 1, size=2), random.integers(1 + self.flip)
        return np.array([image, *crop]), segment

    def collate(self, samples: list[tuple[np.ndarray, Segment]]) -> ImageIndices:
        """Join samples of one segment."""
        numbers = torch.from_numpy(np.stack([numbers for numbers, _ in samples]))
        return ImageIndices(self.name, numbers[:, 0], numbers[:, 1:], samples[0][1])

    def load(self, batch: ImageIndices) -> tuple[Tensor, Tensor]:
        """Return the images (B, C, S, S), uint8, and labels of a batch, on its device; the whole set moves there."""
        device = batch.indices.device
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        images = self.images[batch.indices]
        if self.padding or self.flip:
            images = crop(F.pad(images, [self.padding] * 4), images.shape[-1], batch.crop)
        return images, self.labels[batch.indices]


def crop(padded: Tensor, size: int, how: Tensor) -> Tensor:
    """Crop images, each at its own position, and mirror some.

    Args:
        padded: (B, C, S', S').
        size: S.
        how: (B, 3): first row, first column, and 1 if the image is mirrored.

    Returns:
        (B, C, S, S).

    >>> import torch
    >>> image = torch.arange(9.0).view(1, 1, 3, 3)
    >>> crop(image, 2, torch.tensor([[1, 0, 1]]))
    tensor([[[[4., 3.],
              [7., 6.]]]])
    """
    rows, columns, flip = how.unsqueeze(-1).unbind(1)  # (B, 1) each
    steps = torch.arange(size, device=how.device)
    rows, columns = rows + steps, columns + torch.where(flip == 1, size - 1 - steps, steps)
    batch = torch.arange(len(padded), device=how.device)[:, None, None]
    return padded.movedim(1, -1)[batch, rows[:, :, None], columns[:, None]].movedim(-1, 1)


class ClassificationDataModule(LabelledImageDataModule):
    """Base class of both data sets.

    A tenth of the training images (5,000 at most, chosen at random, the same for every seed) is used for validation.

    Args:
        root: Folder with the data set.
        source: ``paper`` requires the paper's data set; ``stand-in`` uses data that need no download; ``auto`` uses the
            paper's if it is in ``root`` or can be downloaded, otherwise the stand-in.
        download: Download the data set into ``root`` if it is missing.
        pictures: Your own images instead of the data set: a folder or an archive with a folder of images per class,
            directly or below ``train`` and ``test``.
        images: An image or a folder of images that ``predict`` classifies. None: test images.
        augment: Crop training images at random, and mirror them if the data set allows it.
        batch_size: Images per process and step.
        train_pictures: Number of images to train on. None: all.
        val_pictures: Number of images to validate on. None: all that are held out.
        test_pictures: Number of images to test on. None: all.
        predict_pictures: Number of test images that ``predict`` classifies if ``images`` is not set.
        num_workers: Processes that choose images and crops; 0 does it in the training process.
        seed: Seed of the training order and crops.

    Raises:
        InputError: If files are missing or damaged, or there are fewer images than asked for.
    """

    shape: ClassVar[tuple[int, int, int]]  # C, S, S
    padding: ClassVar[int]  # on every side, before the random crop
    flip: ClassVar[bool]  # whether images may be mirrored
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
                raise InputError(f"data.{name}_pictures is {wanted}, but there are {there} images: choose 1 to {there}")
        val, train = order[:held_out][: h.val_pictures], order[held_out:][: h.train_pictures]
        padding = self.padding if h.augment else 0
        self.sets = {
            "train": ImageDataset("train", images[train], labels[train], padding, h.augment and self.flip, h.seed),
            "val": ImageDataset("val", images[val], labels[val]),
            "test": ImageDataset("test", test_images[: h.test_pictures], test_labels[: h.test_pictures]),
        }
        self.counts = {name: len(images) for name, images in self.sets.items()}
        self.names: list[str] | None = None
        if stage == "predict" and h.images:
            self.sets["predict"], self.names = self._own_images(Path(h.images))
            self.counts["predict"] = len(self.names)
        self.test_name = "test pictures"

    def _own_images(self, path: Path) -> tuple[ImageDataset, list[str]]:
        paths = image_files.image_paths(path) if path.is_dir() else [path]
        images = torch.stack([self.fit(image_files.read_image(p)) for p in paths])
        return ImageDataset("predict", images, torch.full((len(paths),), -1)), [p.name for p in paths]

    def fit(self, image: Tensor) -> Tensor:
        """Convert a user's image (3, H, W), uint8, to the data set's size and channels."""
        image = F.interpolate(image[None].float(), self.shape[1:], mode="bilinear", antialias=True)[0]
        image = image if self.shape[0] == 3 else image.mean(0, keepdim=True)
        return image.round().to(torch.uint8)

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise images (B, C, S, S), uint8, for the network."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images / 255).sub_(mean).div_(std)

    def unnormalised(self, x: Tensor) -> Tensor:
        """Return normalised images to the range 0 to 1."""
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return x.float() * std + mean

    def evaluation_loader(self, split: str, count: int | None = None, **options: Any) -> DataLoader:
        return super().evaluation_loader(split, count, batch_size=max(self.batch_size, 100), **options)

    def predict_dataloader(self) -> DataLoader:
        if "predict" in self.sets:
            return super().predict_dataloader()
        return self.evaluation_loader("test", min(self.hparams.predict_pictures, self.counts["test"]))

    def on_after_batch_transfer(self, batch: ImageIndices, dataloader_idx: int) -> ImageBatch:
        images, labels = self.sets[batch.set_name].load(batch)
        batch = ImageBatch(self.normalised(images), labels, batch.segment)
        return self.trainer.precision_plugin.convert_input(batch)  # Lightning has converted only the indices


class MNISTDataModule(ClassificationDataModule):
    """MNIST (section 4.1), or your own images in grey; padded to 30x30 and cropped to 28x28 in training.

    MNIST has light ink on a dark background; ``predict`` inverts images with a light border.

    Args:
        options: See ``ClassificationDataModule``.
    """

    dataset = labelled_images.MNIST
    shape, padding, flip = (1, 28, 28), 1, False
    mean, std = (0.0,), (1.0,)

    def __init__(self, **options):
        super().__init__(**options)
        self.save_hyperparameters()

    def fit(self, image: Tensor) -> Tensor:
        image = super().fit(image)
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
        return image if self.hparams.pictures or border.float().mean() < 128 else 255 - image


class CIFAR10DataModule(ClassificationDataModule):
    """CIFAR-10 (section 4.2), or your own images; padded to 36x36, cropped to 32x32 and mirrored in training.

    The paper does not say: channels are normalised with CIFAR-10's mean and standard deviation.

    Args:
        options: See ``ClassificationDataModule``.
    """

    dataset = labelled_images.CIFAR10
    shape, padding, flip = (3, 32, 32), 2, True
    mean, std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)

    def __init__(self, **options):
        super().__init__(**options)
        self.save_hyperparameters()
