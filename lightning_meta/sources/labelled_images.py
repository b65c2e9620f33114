"""Small pictures with labels, in training and test: MNIST, CIFAR-10, their stand-ins, or class folders of a user's own.

N is the number of pictures, C is 1 (grey) or 3, S their height and width in pixels. Pictures are (N, C, S, S), uint8.
"""

from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.seeding import generator
from lightning_meta.sources import cifar, digits

Source = Literal["auto", "paper", "stand-in"]
CIFAR10_CLASSES = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"


class LabelledPictures(NamedTuple):
    """A data set in two parts."""

    images: Tensor  # (N, C, S, S), uint8
    labels: Tensor  # (N,)
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]  # what the labels are called
    name: str  # what records call it; a stand-in says that it is one


def fetch_digits(root: str, source: Source, download: bool, pictures: str | None) -> None:
    """Downloads MNIST where ``read_digits`` would want it and it is missing; a failure is for that to report."""
    if pictures or source == "stand-in" or not download or digits.has_mnist(root):
        return
    with suppress(InputError):
        digits.download_mnist(root)


def read_digits(root: str, source: Source, pictures: str | None) -> LabelledPictures:
    """MNIST, 28x28 in grey, scikit-learn's 8x8 digits in its place, or a user's own pictures.

    Args:
        root: Folder with ``MNIST/raw/``.
        source: ``paper`` insists on MNIST, ``stand-in`` on scikit-learn's; ``auto`` takes the first that is there.
        pictures: What ``own_pictures`` reads; they are turned to grey.
    """
    if pictures:
        own = own_pictures(pictures, 28)
        grey = (p.float().mean(1, keepdim=True).round().to(torch.uint8) for p in (own.images, own.test_images))
        images, test = grey
        return own._replace(images=images, test_images=test, name=f"{own.name} in grey")
    names = [str(digit) for digit in range(10)]
    if source == "paper" or (source == "auto" and digits.has_mnist(root)):
        (images, labels), (test, test_labels) = (digits.mnist(root, train=train) for train in (True, False))
        return LabelledPictures(images[:, None], labels, test[:, None], test_labels, names, "MNIST")
    name = "scikit-learn's 8x8 digits, a stand-in for MNIST"
    if source == "auto":
        warn_of_stand_in("MNIST", Path(root) / "MNIST" / "raw", name)
    images, labels = digits.small_digits()
    images = images[:, None]
    return LabelledPictures(images[:1400], labels[:1400], images[1400:], labels[1400:], names, name)


def fetch_cifar10(root: str, source: Source, download: bool, pictures: str | None) -> None:
    """Downloads CIFAR-10 where ``read_cifar10`` would want it and it is missing; a failure is for that to report."""
    if pictures or source == "stand-in" or not download or cifar.has_cifar10(root):
        return
    with suppress(InputError):
        cifar.download_cifar10(root)


def read_cifar10(root: str, source: Source, pictures: str | None) -> LabelledPictures:
    """CIFAR-10, 32x32 in colour, coloured digits over photographs in its place, or a user's own pictures.

    Args:
        root: Folder with ``cifar-10-batches-py/`` or ``cifar-10-python.tar.gz``.
        source: ``paper`` insists on CIFAR-10, ``stand-in`` on the digits; ``auto`` takes the first that is there.
        pictures: What ``own_pictures`` reads.
    """
    if pictures:
        return own_pictures(pictures, 32)
    if source == "paper" or (source == "auto" and cifar.has_cifar10(root)):
        parts = *cifar.cifar10(root, train=True), *cifar.cifar10(root, train=False)
        return LabelledPictures(*parts, list(CIFAR10_CLASSES), "CIFAR-10")
    name = "coloured digits over photograph patches, a stand-in for CIFAR-10"
    if source == "auto":
        warn_of_stand_in("CIFAR-10", Path(root) / "cifar-10-batches-py", name)
    parts = *cifar.coloured_digits(train=True), *cifar.coloured_digits(train=False)
    return LabelledPictures(*parts, [str(digit) for digit in range(10)], name)


def own_pictures(path: str, size: int) -> LabelledPictures:
    """A user's folders of pictures, one a class, scaled to ``size``; or an archive of them.

    Both parts are shuffled, so that the first few pictures are of all classes. Without a ``test`` folder every sixth
    picture is for testing.

    Raises:
        InputError: Where they cannot be read, or training and test classes differ.
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
        test, test_labels = _shuffled(test, test_labels)  # or the first of them would all be of one class
    if len(images) < 6 or not len(test):
        raise InputError(f"{path}: {len(images)} pictures are too few: give at least a dozen")
    return LabelledPictures(images, labels, test, test_labels, names, f"pictures of {Path(path).name}, {size}x{size}")


def _shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(generator(0).permutation(len(images)))
    return images[order], labels[order]


def warn_of_stand_in(wanted: str, where: Path, used: str) -> None:
    """Says on the first process that a stand-in is used."""
    rank_zero_warn(f"no {wanted} in {where}: this run uses {used}; --data.root names another place")
