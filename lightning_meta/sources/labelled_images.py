"""Small labelled images, for training and test: MNIST, CIFAR-10, their stand-ins, or class folders of the user's own.

N is the number of images, C is 1 (grey) or 3, S their height and width in pixels. Images are (N, C, S, S), uint8.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.seeding import generator
from lightning_meta.sources import cifar, digits


class LabelledImages(NamedTuple):
    """A data set in two parts."""

    images: Tensor  # (N, C, S, S), uint8
    labels: Tensor  # (N,)
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]  # the names of the labels
    name: str  # what records call the data set; the name of a stand-in says that it is one


class Dataset(Protocol):
    """A published data set of labelled images, with a stand-in that needs no download."""

    name: str
    stand_in: str  # what records call the stand-in
    folder: str  # below ``root``
    size: int  # S
    grey: bool

    @staticmethod
    def present(root: str) -> bool:
        """Whether the published data set lies below ``root``."""

    @staticmethod
    def download(root: str) -> None:
        """Download it into ``root``."""

    @staticmethod
    def read(root: str) -> LabelledImages:
        """The published data set."""

    @staticmethod
    def read_stand_in() -> LabelledImages:
        """The stand-in."""


class MNIST:
    """MNIST, 28x28 in grey, or scikit-learn's 8x8 digits, enlarged."""

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
    """A user's folders of images, one a class, scaled to ``size``; or an archive of them.

    Both parts are shuffled, so that the first few images are of all classes. If there is no ``test`` folder, every
    sixth image is for testing.

    Raises:
        InputError: If the images cannot be read, or the classes of training and test differ.
    """
    images, labels, names = cifar.class_folders(path, size, split="train")
    test, test_labels, test_names = cifar.class_folders(path, size, split="test")
    if names != test_names:
        raise InputError(f"{path}: the classes of train and test differ, {names} and {test_names}: use the same names")
    one_set = torch.equal(images, test)
    images, labels = _shuffled(images, labels)
    if one_set:
        held_out = torch.arange(len(images)) % 6 == 5
        images, labels, test, test_labels = images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    else:
        test, test_labels = _shuffled(test, test_labels)  # otherwise the first of them would all be of one class
    if len(images) < 6 or not len(test):
        raise InputError(f"{path}: {len(images)} images are too few: give at least a dozen")
    name = f"pictures of {Path(path).name}, {size}x{size}"
    if grey:
        images, test = (part.float().mean(1, keepdim=True).round().to(torch.uint8) for part in (images, test))
        name += " in grey"
    return LabelledImages(images, labels, test, test_labels, names, name)


def _shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(generator(0).permutation(len(images)))
    return images[order], labels[order]
