"""Small labelled images for training and test: MNIST, CIFAR-10, their stand-ins, or the user's class folders.

N is the number of images, C is 1 (grey) or 3, S their height and width in pixels. Images are (N, C, S, S), uint8.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.sources import cifar, digits
from lightning_meta.sources.seeding import generator


class LabelledImages(NamedTuple):
    """The training and the test set of a data set."""

    images: Tensor  # (N, C, S, S), uint8
    labels: Tensor  # (N,)
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]  # names of the labels
    name: str  # name of the data set in records; the name of a stand-in says that it is one


class Dataset(Protocol):
    """A published data set of labelled images, with a stand-in that needs no download."""

    name: str
    stand_in: str  # name of the stand-in in records
    folder: str  # its folder in ``root``
    size: int  # S
    grey: bool

    @staticmethod
    def present(root: str) -> bool:
        """Return whether the published data set exists in ``root``."""

    @staticmethod
    def download(root: str) -> None:
        """Download the published data set into ``root``."""

    @staticmethod
    def read(root: str) -> LabelledImages:
        """Read the published data set."""

    @staticmethod
    def read_stand_in() -> LabelledImages:
        """Make the stand-in."""


class MNIST:
    """MNIST, 28x28 and grey, or scikit-learn's 8x8 digits, enlarged.

    Example:
        >>> MNIST.read_stand_in().test_images.shape
        torch.Size([397, 1, 28, 28])
    """

    name, stand_in, folder, size, grey = "MNIST", digits.STAND_IN, "MNIST/raw", 28, True
    classes = tuple("0123456789")

    @staticmethod
    def present(root: str) -> bool:
        return digits.has_mnist(root)

    @staticmethod
    def download(root: str) -> None:
        digits.download_mnist(root)

    @staticmethod
    def read(root: str) -> LabelledImages:
        (images, labels), (test, test_labels) = (digits.mnist(root, train=train) for train in (True, False))
        return LabelledImages(images[:, None], labels, test[:, None], test_labels, list(MNIST.classes), MNIST.name)

    @staticmethod
    def read_stand_in() -> LabelledImages:
        images, labels = digits.small_digits()
        train, test = images[:1400, None], images[1400:, None]
        return LabelledImages(train, labels[:1400], test, labels[1400:], list(MNIST.classes), MNIST.stand_in)


class CIFAR10:
    """CIFAR-10, 32x32 in colour, or coloured digits over patches of photographs."""

    name, stand_in = "CIFAR-10", "coloured digits over photograph patches, a stand-in for CIFAR-10"
    folder, size, grey = "cifar-10-batches-py", 32, False
    classes = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"

    @staticmethod
    def present(root: str) -> bool:
        return cifar.has_cifar10(root)

    @staticmethod
    def download(root: str) -> None:
        cifar.download_cifar10(root)

    @staticmethod
    def read(root: str) -> LabelledImages:
        parts = *cifar.cifar10(root, train=True), *cifar.cifar10(root, train=False)
        return LabelledImages(*parts, list(CIFAR10.classes), CIFAR10.name)

    @staticmethod
    def read_stand_in() -> LabelledImages:
        parts = *cifar.coloured_digits(train=True), *cifar.coloured_digits(train=False)
        return LabelledImages(*parts, list(MNIST.classes), CIFAR10.stand_in)


def own_images(path: str, size: int, grey: bool = False) -> LabelledImages:
    """Read the user's images, resized to ``size`` x ``size``, from one folder per class or an archive of such folders.

    Both sets are shuffled, so that their first images cover all classes. Without a ``test`` folder, one sixth of the
    images are held out for testing.

    Args:
        path: As for ``cifar.class_folders``.
        size: Height and width of the result.
        grey: Average the three channels.

    Raises:
        InputError: If the images cannot be read, there are too few, or the classes of training and test differ.
    """
    images, labels, names = cifar.class_folders(path, size, split="train")
    test, test_labels, test_names = cifar.class_folders(path, size, split="test")
    if names != test_names:
        raise InputError(f"{path}: the classes of train and test differ ({names} and {test_names}): use the same names")
    one_set = torch.equal(images, test)  # there are no folders of splits
    images, labels = _shuffled(images, labels)
    if one_set:
        held_out = torch.arange(len(images)) % 6 == 5
        images, labels, test, test_labels = images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    else:
        test, test_labels = _shuffled(test, test_labels)
    if len(images) < 6 or not len(test):
        raise InputError(f"{path}: {len(images)} training images are too few: give at least 12 images")
    name = f"pictures of {Path(path).name}, {size}x{size}"
    if grey:
        images, test = (part.float().mean(1, keepdim=True).round().to(torch.uint8) for part in (images, test))
        name += " in grey"
    return LabelledImages(images, labels, test, test_labels, names, name)


def _shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(generator(0).permutation(len(images)))
    return images[order], labels[order]
