"""Handwritten digits as 28x28 grey images: MNIST from its own files, or scikit-learn's small digits as a stand-in.

N is the number of images. Images are uint8, 0 black paper to 255 white ink.
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.sources.download import download

_FILES = [f"{split}-{content}-ubyte" for split in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
_LARGEST = 2**28  # bytes of one unpacked file (MNIST's largest has 47 million): what says more is out to fill memory
_HOW_TO_GET = "get it from yann.lecun.com/exdb/mnist or with torchvision.datasets.MNIST(root, download=True)"

STAND_IN = "scikit-learn's 8x8 digits, a stand-in for MNIST"


def mnist(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read MNIST (LeCun et al. 1998) from ``<root>/MNIST/raw``, where torchvision keeps it. Writes nothing.

    Args:
        root: Folder that holds ``MNIST/raw/`` with the four idx files, plain or ``.gz`` (the plain one is preferred).
        train: The training images (60,000 in the original) or the test images (10,000).

    Returns:
        Images (N, 28, 28), uint8, and their labels (N,), uint8, 0 to 9.

    Raises:
        InputError: If a file is missing, unreadable, truncated, too long, or not what its name says.
    """
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise InputError(f"MNIST: {root} {what}: give the folder that holds MNIST/raw/")
    split = "train" if train else "t10k"
    images_path = _find(root, f"{split}-images-idx3-ubyte")
    labels_path = _find(root, f"{split}-labels-idx1-ubyte")
    images = _read_idx(images_path, dimensions=3)
    if images.shape[1:] != (28, 28):
        raise InputError(f"{images_path}: images are {images.shape[1]}x{images.shape[2]}, not 28x28: not MNIST's file")
    labels = _read_idx(labels_path, dimensions=1)
    if labels.max() > 9:
        raise InputError(f"{labels_path}: holds the label {labels.max()}, digits end at 9: copy or download it again")
    if len(images) != len(labels):
        raise InputError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}: "
            "take both files from the same place"
        )
    return images, labels


def has_mnist(root: str | Path) -> bool:
    """Whether all four files are there, plain or ``.gz``.

    A file that is there but broken counts: ``mnist`` then names it, and nobody falls back to other data unawares.
    """
    return all(_present(root, name) for name in _FILES)


def download_mnist(root: str | Path) -> None:
    """Download MNIST with torchvision into ``<root>/MNIST/raw``: all four files or none that ``mnist`` would read.

    Args:
        root: Folder to download into; made where it does not exist.

    Raises:
        InputError: If the download fails (a server silent for 10 seconds counts) or ``root`` cannot be written.
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
    """Scikit-learn's 8x8 digits, enlarged and framed like MNIST: 20x20 pixels of ink in a 28x28 image.

    The digits are the test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI), which
    scikit-learn bundles: nothing is downloaded, and the result is the same every time.

    Returns:
        Images (1797, 28, 28), uint8, and their labels (1797,), uint8, 0 to 9.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = torch.from_numpy(digits.images).float()[:, None] / 16  # counts of 0 to 16 black pixels in 4x4 blocks
    ink = torch.nn.functional.interpolate(ink, size=(20, 20), mode="bicubic", align_corners=False)
    # Enlarging turns thin strokes grey and wide. The stretch takes both back: mean ink 34.2, MNIST's is 33.3.
    ink = ((ink - 0.35) / 0.5).clamp(0, 1)
    images = torch.nn.functional.pad(ink[:, 0], (4, 4, 4, 4))
    return (images * 255).round().to(torch.uint8), torch.from_numpy(digits.target).to(torch.uint8)


def _present(root: str | Path, name: str) -> Path | None:
    plain = Path(root) / "MNIST" / "raw" / name
    # lexists: a dangling link is a broken file, not an absent one
    return next((path for path in (plain, plain.with_name(f"{name}.gz")) if os.path.lexists(path)), None)


def _find(root: str | Path, name: str) -> Path:
    path = _present(root, name)
    if path is None:
        folder = Path(root) / "MNIST" / "raw"
        raise InputError(f"MNIST: {name}[.gz] is missing: {_HOW_TO_GET} and put it into {folder}")
    return path


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an idx file of unsigned bytes (format: yann.lecun.com/exdb/mnist) with this number of dimensions."""
    again = "copy or download it again"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = bytearray()
            while block := file.read(2**20):
                content += block
                if len(content) > _LARGEST:
                    raise InputError(f"{path}: holds more than {_LARGEST:,} bytes, which is not MNIST's: {again}")
    except InputError:
        raise
    except EOFError as error:
        raise InputError(f"{path}: the gzip file is truncated: {again}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is corrupt ({error}): {again}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): put MNIST's file there") from error
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise InputError(f"{path}: {len(content)} bytes, shorter than its header of {header}: {again}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
    expected = 0x0800 + dimensions  # 8: unsigned bytes
    if magic != expected:
        raise InputError(f"{path}: starts with {magic}, an MNIST file of this name with {expected}: {again}")
    if 0 in shape:
        raise InputError(f"{path}: its header says {'x'.join(map(str, shape))}, that is nothing: {again}")
    promised = math.prod(shape)
    if len(content) - header != promised:
        what = "truncated" if len(content) - header < promised else "too long"
        raise InputError(
            f"{path}: {what}, {len(content) - header:,} bytes follow the header, which promises {promised:,}: {again}"
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(shape)
