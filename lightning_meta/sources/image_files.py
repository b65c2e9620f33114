"""Photographs and other coloured pictures: a user's own files, and four that installed libraries bring along.

H and W are a picture's height and width in pixels. Pictures are (3, H, W), uint8, red, green and blue.
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

# Not all that Pillow knows: for PostScript, for one, it starts another program.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")


def read_picture(path: str | Path) -> Tensor:
    """Read a picture (PNG, JPG, GIF, WebP, TIFF, BMP or PPM) the way a viewer shows it.

    Args:
        path: The file. What it says about turning is obeyed, transparent parts are laid on white paper, 16 bits become
            8, and of an animation the first frame is taken.

    Returns:
        The picture (3, H, W), uint8.

    Raises:
        InputError: If the file is missing, a folder, no picture, damaged, cut short, or so large that it looks like
            an attack (Pillow's limit: 179 million pixels).
    """
    import numpy as np

    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: give one PNG, JPG or WebP picture")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: give a PNG, JPG or WebP picture")
    return torch.from_numpy(np.array(decode(path, path))).movedim(-1, 0).contiguous()


def decode(file: str | Path | BinaryIO, name: str | Path) -> "Image":
    """Decode a picture to Pillow's RGB, as ``read_picture`` describes.

    Args:
        file: The encoded picture, or where it lies.
        name: What an error calls it.

    Raises:
        InputError: If it is no picture, damaged, cut short, or too large.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=FORMATS) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip instead of scale
                picture = Image.fromarray(np.clip(np.array(picture) >> 8, 0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture: replace or remove it") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is suspiciously large ({error}): make it smaller") from error
    except Exception as error:  # over a damaged file Pillow's decoders raise all sorts, TypeError among them
        raise InputError(f"{name} cannot be decoded ({error}): replace or remove it") from error


def picture_paths(folder: str | Path) -> list[Path]:
    """The PNG, JPG and WebP pictures of a folder, in natural order (``frame2`` before ``frame10``).

    Hidden files and other kinds of file are passed over.

    Raises:
        InputError: If the folder is missing, a file, or holds no pictures.
    """
    try:
        paths = list(Path(folder).iterdir())
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read ({error.strerror}): give a folder of PNG, JPG or WebP pictures"
        ) from error
    paths = [path for path in paths if is_picture(path)]
    if not paths:
        raise InputError(f"{folder} holds no PNG, JPG or WebP pictures: put some there or give another folder")
    return sorted(paths, key=_natural)


def is_picture(path: PurePath) -> bool:
    """Whether this is the name of a PNG, JPG or WebP picture and not that of a hidden file."""
    return path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not path.name.startswith(".")


def bundled_photographs() -> dict[str, Tensor]:
    """Four pictures that come with installed libraries, so that nothing is downloaded.

    Returns:
        ``china`` (3, 427, 640), a temple, and ``flower`` (3, 427, 640), from scikit-learn; ``grace_hopper``
        (3, 600, 512), a portrait, and ``minduka`` (3, 128, 128), a drawing, from Matplotlib. All uint8.
    """
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    pictures = {}
    for name in ("china", "flower"):
        pictures[name] = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).movedim(-1, 0).contiguous()
    for name, file in (("grace_hopper", "grace_hopper.jpg"), ("minduka", "Minduka_Present_Blue_Pack.png")):
        pictures[name] = read_picture(get_sample_data(file, asfileobj=False))
    return pictures


def grey(picture: Tensor) -> "np.ndarray":
    """The luma (H, W), uint8, of a picture, by the weights of ITU-R BT.601: 0.299, 0.587 and 0.114."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (picture * weights).sum(0).round().to(torch.uint8).numpy()


def _natural(path: Path) -> tuple:
    # split at a group: text and numbers alternate, so like is compared with like; the name itself settles 01 and 1
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], path.name
