"""Colour images: the user's own files, and four that come with installed libraries.

H and W are an image's height and width in pixels. Images are RGB (3, H, W), uint8.
"""

import os
import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from lightning_meta.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# Not every format that Pillow reads: for PostScript, for example, it starts another program.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")


def read_image(path: str | Path) -> Tensor:
    """Read an image (PNG, JPG, GIF, WebP, TIFF, BMP or PPM) as a viewer shows it.

    The image is rotated as its EXIF orientation says, transparent pixels are blended with white, 16 bits are reduced to
    8, and of an animation the first frame is read.

    Args:
        path: The file.

    Returns:
        The image (3, H, W), uint8.

    Raises:
        InputError: If the file is missing, a folder, no image, damaged, truncated, or larger than Pillow's limit
            against memory attacks (179 million pixels).
    """
    import numpy as np

    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: give one PNG, JPG or WebP image")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: give a PNG, JPG or WebP image")
    return torch.from_numpy(np.array(decode(path, path))).movedim(-1, 0).contiguous()


def decode(file: str | Path | BinaryIO, name: str | Path) -> "Image":
    """Decode an image to Pillow's RGB, as ``read_image`` describes.

    Args:
        file: The encoded image, or its path.
        name: Name of the image for error messages.

    Raises:
        InputError: If the file is no image, damaged, truncated, or too large.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip instead of scale
                image = Image.fromarray(np.clip(np.array(image) >> 8, 0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image: replace or remove it") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is suspiciously large ({error}): make it smaller") from error
    except Exception as error:  # Pillow's decoders raise all sorts of exceptions for a damaged file, even TypeError
        raise InputError(f"{name} cannot be decoded ({error}): replace or remove it") from error


def image_paths(folder: str | Path) -> list[Path]:
    """Return the PNG, JPG and WebP images of a folder, in natural order (``frame2`` before ``frame10``).

    Hidden files and other kinds of file are skipped.

    Raises:
        InputError: If the folder is missing, a file, or holds no images.
    """
    try:
        paths = list(Path(folder).iterdir())
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read ({error.strerror}): give a folder of PNG, JPG or WebP images"
        ) from error
    paths = [path for path in paths if is_image(path)]
    if not paths:
        raise InputError(f"{folder} holds no PNG, JPG or WebP images: put some there or give another folder")
    return sorted(paths, key=_natural)


def is_image(path: PurePath) -> bool:
    """Return whether the name is that of a PNG, JPG or WebP image and not hidden.

    Example:
        >>> from pathlib import PurePath
        >>> is_image(PurePath("a/cat.JPG")), is_image(PurePath("a/.cat.jpg"))
        (True, False)
    """
    return path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not path.name.startswith(".")


def bundled_photographs() -> dict[str, Tensor]:
    """Return four images that come with installed libraries, so that nothing is downloaded.

    Returns:
        ``china`` (3, 427, 640), a temple, and ``flower`` (3, 427, 640), from scikit-learn; ``grace_hopper``
        (3, 600, 512), a portrait, and ``minduka`` (3, 128, 128), a drawing, from Matplotlib. All are uint8.

    Example:
        >>> {name: tuple(image.shape) for name, image in bundled_photographs().items()}["flower"]
        (3, 427, 640)
    """
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    pictures = {}
    for name in ("china", "flower"):
        pictures[name] = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).movedim(-1, 0).contiguous()
    for name, file in (("grace_hopper", "grace_hopper.jpg"), ("minduka", "Minduka_Present_Blue_Pack.png")):
        pictures[name] = read_image(get_sample_data(file, asfileobj=False))
    return pictures


def grey(picture: Tensor) -> "np.ndarray":
    """Return the luma (H, W), uint8, of an image (3, H, W): the weights of ITU-R BT.601 are 0.299, 0.587 and 0.114.

    Example:
        >>> import torch
        >>> grey(torch.tensor([200, 100, 0], dtype=torch.uint8)[:, None, None])
        array([[118]], dtype=uint8)
    """
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (picture * weights).sum(0).round().to(torch.uint8).numpy()


def _natural(path: Path) -> tuple:
    # text and numbers alternate, so numbers are compared with numbers; the full name decides between 01 and 1
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], path.name
