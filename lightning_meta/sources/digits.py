"""Handwritten digits as 28x28 grey images: MNIST from its own files, or scikit-learn's small digits as a stand-in.

N is the number of images. Images are uint8, from 0 (background) to 255 (ink).
"""

import math
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.sources.archives import AGAIN, first_present, read_file
from lightning_meta.sources.download import download

_FILES = [f"{split}-{content}-ubyte" for split in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
_LARGEST = 2**28  # bytes of one unpacked file; MNIST's largest has 47 million
_HOW_TO_GET = "get it from yann.lecun.com/exdb/mnist or with torchvision.datasets.MNIST(root, download=True)"

STAND_IN = "scikit-learn's 8x8 digits, a stand-in for MNIST"


def mnist(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read MNIST (LeCun et al. 1998) from ``<root>/MNIST/raw``, where torchvision stores it.

    Args:
        root: Folder that holds ``MNIST/raw/`` with the four idx files, plain (preferred) or ``.gz``.
        train: Read the training images (60,000 in the original) instead of the test images (10,000).

    Returns:
        Images (N, 28, 28), uint8, and their labels (N,), uint8, 0 to 9.

    Raises:
        InputError: If a file is missing, unreadable, truncated, too long, or no file of MNIST.
    """
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise InputError(f"MNIST: {root} {problem}: give the folder that holds MNIST/raw/")
    split = "train" if train else "t10k"
    images_path = _find(root, f"{split}-images-idx3-ubyte")
    labels_path = _find(root, f"{split}-labels-idx1-ubyte")
    images = _read_idx(images_path, dimensions=3)
    if images.shape[1:] != (28, 28):
        raise InputError(
            f"{images_path}: its images are {images.shape[1]}x{images.shape[2]}, not 28x28: give the file of MNIST"
        )
    labels = _read_idx(labels_path, dimensions=1)
    if labels.max() > 9:
        raise InputError(f"{labels_path}: holds the label {labels.max()}, but digits end at 9: {AGAIN}")
    if len(images) != len(labels):
        raise InputError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}: "
            "take both files from the same place"
        )
    return images, labels


def has_mnist(root: str | Path) -> bool:
    """Return whether all four files exist, plain or ``.gz``.

    Broken files count as existing: ``mnist`` then reports them, instead of a silent fallback to other data.
    """
    return all(_present(root, name) for name in _FILES)


def download_mnist(root: str | Path) -> None:
    """Download MNIST with torchvision into ``<root>/MNIST/raw``. A failed download leaves nothing behind.

    Args:
        root: Folder to download into; created if it does not exist.

    Raises:
        InputError: If the download fails, the server does not answer for 10 seconds, or ``root`` cannot be written.
    """
    from torchvision.datasets import MNIST

    raw = Path(root) / "MNIST" / "raw"
    download(
        "MNIST",
        lambda folder: MNIST(folder, download=True),
        [f"MNIST/raw/{name}" for name in _FILES],
        root,
        f"put its four files into {raw} by hand, from yann.lecun.com/exdb/mnist",
    )


def small_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 8x8 digits, enlarged and framed like MNIST: 20x20 pixels of ink in a 28x28 image.

    The digits are the test set of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI). They come
    with scikit-learn, so nothing is downloaded, and the result is the same every time.

    Returns:
        Images (1797, 28, 28), uint8, and their labels (1797,), uint8, 0 to 9.

    Example:
        >>> images, labels = small_digits()
        >>> images.shape, labels[:5].tolist()
        (torch.Size([1797, 28, 28]), [0, 1, 2, 3, 4])
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = torch.from_numpy(digits.images).float()[:, None] / 16  # counts of 0 to 16 black pixels in 4x4 blocks
    ink = torch.nn.functional.interpolate(ink, size=(20, 20), mode="bicubic", align_corners=False)
    # Enlarging makes thin strokes grey and wide. Stretching the contrast undoes both: the mean is 34.2 (MNIST: 33.3).
    ink = ((ink - 0.35) / 0.5).clamp(0, 1)
    images = torch.nn.functional.pad(ink[:, 0], (4, 4, 4, 4))
    return (images * 255).round().to(torch.uint8), torch.from_numpy(digits.target).to(torch.uint8)


def _present(root: str | Path, name: str) -> Path | None:
    return first_present(Path(root) / "MNIST" / "raw", name, f"{name}.gz")


def _find(root: str | Path, name: str) -> Path:
    path = _present(root, name)
    if path is None:
        folder = Path(root) / "MNIST" / "raw"
        raise InputError(f"MNIST: {name}[.gz] is missing: {_HOW_TO_GET} and put it into {folder}")
    return path


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an idx file of unsigned bytes (format: yann.lecun.com/exdb/mnist) with this number of dimensions."""
    content = read_file(path, _LARGEST)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise InputError(f"{path}: {len(content)} bytes, shorter than its header of {header}: {AGAIN}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
    expected = 0x0800 + dimensions  # 8: unsigned bytes
    if magic != expected:
        raise InputError(f"{path}: starts with the number {magic} instead of {expected}: {AGAIN}")
    if 0 in shape:
        raise InputError(f"{path}: is empty, its header says {'x'.join(map(str, shape))}: {AGAIN}")
    promised = math.prod(shape)
    if len(content) - header != promised:
        problem = "truncated" if len(content) - header < promised else "too long"
        raise InputError(
            f"{path}: {problem}, {len(content) - header:,} bytes follow a header that says {promised:,}: {AGAIN}"
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(shape)
