"""Stereo pairs: KITTI's and Middlebury's layouts, the user's own folder, and drawn scenes as a stand-in.

H and W are an image's height and width in pixels. Views are grey (H, W), uint8. A disparity map d is x_left - x_right
in pixels, (H, W), float32, non-negative, and NaN if unknown. Pixel x of the left view is at x - d in the right view,
where d is the left view's disparity. Pixel x of the right view is at x + d in the left view, with its own disparity d.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources.archives import AGAIN
from lightning_meta.sources.arrays import open_npz
from lightning_meta.sources.image_files import FORMATS, decode, image_paths, is_image

# Names of the folders of left and right views, and of the folder of the left views' disparities
_FOLDERS = {
    ("image_2", "image_3"): "disp_occ_0",  # KITTI 2015, KITTI odometry in colour
    ("image_0", "image_1"): "disp_occ",  # KITTI 2012, KITTI odometry in grey
    ("image_l", "image_r"): "disp",
    ("left", "right"): "disp",
}
# Names of left view, right view and their disparities in one folder; the names of the last row may have a prefix
_FILES = (
    ("im2", "im6", "disp2", "disp6"),  # Middlebury 2003
    ("im0", "im1", "disp0", "disp1"),  # Middlebury 2014
    ("left", "right", "disp", "disp_right"),
)
_KITTI_SCALE = 256
_HORIZONS = 0.05, 0.7  # range of the horizon in drawn scenes, as a fraction of the height
_MIDDLEBURY_SCALES = {(375, 450): 4, (750, 900): 2, (1500, 1800): 1}  # Middlebury 2003, by (H, W)


class Views(NamedTuple):
    """A stereo pair: two images (H, W) of one scene, taken side by side, and their disparities if known."""

    left: np.ndarray
    right: np.ndarray
    left_disparity: np.ndarray | None = None
    right_disparity: np.ndarray | None = None

    def mirrored(self) -> "Views":
        """Flip both views and swap them, which gives a left and a right view of the mirrored scene."""
        flipped = (None if part is None else part[:, ::-1] for part in self)
        right, left, right_disparity, left_disparity = flipped
        return Views(left, right, left_disparity, right_disparity)

    def window(self, top: int, left: int, size: int) -> "Views":
        """Crop the same square of ``size`` x ``size`` pixels from all images."""
        rows, columns = slice(top, top + size), slice(left, left + size)
        return Views(*(None if part is None else part[rows, columns] for part in self))

    def scaled(self, side: int) -> "Views":
        """Resize the shorter side to ``side`` pixels by area averaging, and scale the disparities with the width.

        A new disparity is the mean of the known ones in its pixel. It is unknown if they cover less than half of it.
        """
        height, width = self.left.shape
        factor = side / min(height, width)
        down, along = _shares(height, round(height * factor)), _shares(width, round(width * factor))
        left, right = (np.rint(down @ view @ along.T).astype(np.uint8) for view in self[:2])
        disparities: list[np.ndarray | None] = []
        for disparity in self[2:]:
            if disparity is not None:
                known = np.isfinite(disparity)
                share = down @ known @ along.T
                total = down @ np.where(known, disparity, 0) @ along.T * (len(along) / width)
                disparity = np.where(share >= 0.5, total / share.clip(min=0.5), np.nan).astype(np.float32)
            disparities.append(disparity)
        return Views(left, right, *disparities)


def _shares(pixels: int, fewer: int) -> np.ndarray:
    """Return the weight of each of ``pixels`` pixels in each of ``fewer`` larger ones, (fewer, pixels)."""
    edges = np.arange(fewer + 1)[:, None] * (pixels / fewer)
    place = np.arange(pixels)
    overlap = np.minimum(edges[1:], place + 1) - np.maximum(edges[:-1], place)
    return overlap.clip(min=0) * (fewer / pixels)


class StereoPair(NamedTuple):
    """The files of a stereo pair."""

    name: str  # the path below the folder that was searched
    folder: Path  # pairs of one folder belong together
    left: Path
    right: Path
    left_disparity: Path | None
    right_disparity: Path | None
    scale: float | None  # levels per pixel of disparity, if the disparity is an image

    def read(self) -> Views:
        """Read the images and disparities.

        Raises:
            InputError: If a file cannot be read, views or disparities differ in size, or a disparity's scale is
                unknown.
        """
        left, right = (np.array(decode(path, path).convert("L")) for path in (self.left, self.right))
        if left.shape != right.shape:
            raise InputError(
                f"{self.left} is {_size(left)} pixels, {self.right} is {_size(right)}: give two views of one size"
            )
        disparities = []
        for path in (self.left_disparity, self.right_disparity):
            disparities.append(None if path is None else self._read_disparity(path, left))
        return Views(left, right, *disparities)

    def _read_disparity(self, path: Path, view: np.ndarray) -> np.ndarray:
        if is_image(path):
            values = _read_levels(path)
            known = _MIDDLEBURY_SCALES if self.left.stem == "im2" else {}
            scale = known.get(view.shape, self.scale)
            if scale is None:
                raise InputError(
                    f"{path} does not say how many of its levels are one pixel: give --data.disparity_scale, or the "
                    "disparity in pixels as .pfm, .npy or .npz"
                )
            disparity = np.where(values == 0, np.nan, values / scale).astype(np.float32)
        else:
            disparity = read_pfm(path) if path.suffix == ".pfm" else _read_array(path)
            disparity = np.where(np.isfinite(disparity), disparity, np.nan).astype(np.float32)
        if disparity.shape != view.shape:
            raise InputError(f"{path} is {_size(disparity)} pixels, its view is {_size(view)}: give the same size")
        if np.isnan(disparity).all():
            raise InputError(f"{path} has no known disparity: replace or remove it")
        if np.nanmin(disparity) < 0:
            raise InputError(
                f"{path} has negative disparities: give x_left - x_right in pixels, with NaN or inf for unknown"
            )
        return disparity


def find_pairs(root: str | Path, disparity_scale: float | None = None) -> list[StereoPair]:
    """Find stereo pairs in a folder and in all folders below it.

    The names of files and folders tell the layout:

    - KITTI stereo (Menze and Geiger 2015; Geiger et al. 2012): ``image_2/``, ``image_3/`` and ``disp_occ_0/``, or
      ``image_0/``, ``image_1/`` and ``disp_occ/``. One pixel of disparity is 256 levels.
    - KITTI odometry: the same, or ``image_l/`` and ``image_r/``, without disparities.
    - Middlebury 2003 (Scharstein and Szeliski): ``im2.png``, ``im6.png``, ``disp2.png`` and ``disp6.png``. One pixel of
      disparity is 4 levels at quarter size, 2 at half size and 1 at full size.
    - Middlebury 2014 (Scharstein et al.): ``im0.png``, ``im1.png``, ``disp0.pfm`` and, rarely, ``disp1.pfm``.
    - Other pairs: folders ``left/``, ``right/`` and ``disp/``, or files ``left.png``, ``right.png``, ``disp.*`` and
      ``disp_right.*``, which may have a common prefix such as ``cat_left.png``.

    Unknown disparities are level 0 in images (PNG) and values that are not finite in ``.pfm``, ``.npy`` and ``.npz``.
    All disparities are optional.

    Args:
        root: The folder.
        disparity_scale: Levels per pixel of disparity, for images whose layout does not define it.

    Returns:
        The pairs, sorted by path.

    Raises:
        InputError: If there are no pairs, or a view has no partner.
    """
    root, pairs = Path(root), []
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give a folder of stereo pairs")
    for place, below, files in os.walk(root, followlinks=True):
        folder, here = Path(place), Path(place).resolve()
        below[:] = sorted(  # skip links to a parent folder, which would never end
            name for name in below if not (name.startswith(".") or here.is_relative_to((here / name).resolve()))
        )
        found = _in_folders(folder, below, disparity_scale)
        if found:
            below.clear()
        else:
            found = _in_files(folder, files + below, disparity_scale)  # a folder named as a file is refused when read
        pairs += (pair._replace(name=_name(root, folder, pair.name)) for pair in found)
    if not pairs:
        raise InputError(
            f"{root} holds no stereo pairs in a known layout: name them left.png and right.png, or put them under the "
            "same names into folders left/ and right/"
        )
    return pairs


def _in_folders(folder: Path, below: list[str], scale: float | None) -> list[StereoPair]:
    """Return the pairs in the first pair of view folders of ``_FOLDERS`` that exists."""
    for names, disparities in _FOLDERS.items():
        if not set(names) & set(below):
            continue
        for name, other in (names, names[::-1]):
            if name not in below:
                raise InputError(f"{folder / other} has no folder {name} beside it: put the other views there")
        left, right = ({path.stem: path for path in image_paths(folder / name)} for name in names)
        for stem in left.keys() ^ right.keys():
            has, lacks = (left, names[1]) if stem in left else (right, names[0])
            raise InputError(f"{has[stem]} has no partner of that name in {folder / lacks}: add or remove one")
        truths = folder / disparities
        truths = _disparity_files(truths.iterdir()) if truths.is_dir() else {}
        scale = _KITTI_SCALE if disparities.startswith("disp_occ") else scale
        return [StereoPair(stem, folder, left[stem], right[stem], truths.get(stem), None, scale) for stem in left]
    return []


def _in_files(folder: Path, files: list[str], scale: float | None) -> list[StereoPair]:
    """Return the pairs of the first row of file names in ``_FILES`` that exists."""
    paths = [folder / name for name in sorted(files)]
    images = {path.stem: path for path in paths if is_image(path)}
    truths = _disparity_files(paths)
    for left, right, *disparities in _FILES:
        prefixes = {stem.removesuffix(name) for name in (left, right) for stem in images if stem.endswith(name)}
        prefixes = sorted(prefix for prefix in prefixes if not prefix or (left == "left" and prefix.endswith("_")))
        for prefix in prefixes:
            for name, other in ((left, right), (right, left)):
                if prefix + name not in images:
                    raise InputError(f"{images[prefix + other]} has no partner {prefix + name}.png: add or remove one")
        if prefixes:
            return [
                StereoPair(
                    prefix.rstrip("_"),
                    folder,
                    images[prefix + left],
                    images[prefix + right],
                    *(truths.get(prefix + name) for name in disparities),
                    scale,
                )
                for prefix in prefixes
            ]
    return []


def _disparity_files(paths: Iterable[Path]) -> dict[str, Path]:
    """Return the files that may hold a disparity, by stem. A file in pixels is preferred to an image."""
    suffixes = (".png", ".npz", ".npy", ".pfm")
    found = [path for path in paths if path.suffix in suffixes and not path.name.startswith(".")]
    return {path.stem: path for path in sorted(found, key=lambda path: suffixes.index(path.suffix))}


def _name(root: Path, folder: Path, name: str) -> str:
    return "/".join([*folder.relative_to(root).parts, *([name] if name else [])]) or root.name


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape[::-1]))


def read_pfm(path: str | Path) -> np.ndarray:
    """Read a portable float map of one channel as (H, W), float32.

    Only the sign of the header's scale is used, for the byte order: disparities are already in pixels. OpenCV's reader
    also applies the scale's size, and prints messages for damaged files.

    Raises:
        InputError: If the file cannot be read, is no float map of one channel, or is truncated.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): put the file there") from error
    header = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s", content)
    try:
        width, height, order = int(header[1]), int(header[2]), float(header[3])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is no grey portable float map (.pfm): replace or remove it") from error
    values = content[header.end() :]
    if len(values) != 4 * width * height or not values:
        raise InputError(
            f"{path}: {len(values):,} bytes follow the header, which promises {width}x{height} numbers of 4 bytes: "
            f"{AGAIN}"
        )
    values = np.frombuffer(values, "<f4" if order < 0 else ">f4")
    return values.reshape(height, width)[::-1].astype(np.float32)  # the lowest row comes first in the file


def _read_levels(path: Path) -> np.ndarray:
    """Read the levels of a grey image (H, W) of 8 or 16 bits."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            levels = np.array(image)
    except Exception as error:  # Pillow's decoders raise all sorts of exceptions for a damaged file
        raise InputError(f"{path} cannot be decoded ({error}): replace or remove it") from error
    if levels.ndim != 2 or levels.dtype == bool:
        raise InputError(f"{path} is not a grey image of 8 or 16 bits: give the disparity as one")
    return levels


def _read_array(path: Path) -> np.ndarray:
    """Read the only array of an .npy or .npz file."""
    try:
        if path.suffix == ".npz":
            with open_npz(path) as arrays:
                (array,) = arrays.values()
        else:
            array = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy, zipfile and tokenize raise all sorts of exceptions for a damaged file
        raise InputError(f"{path} is not a file of one NumPy array ({error}): replace or remove it") from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {array.dtype} {array.shape}, not numbers (H, W): replace or remove it")
    return array


def textured_layers(pictures: list[np.ndarray], size: int, random: np.random.Generator) -> Views:
    """Draw a stereo pair of a scene: a far wall, a ground plane, and objects that stand on the ground.

    The wall and each object are layers of one disparity, and the ground has one disparity per row, which grows to at
    most ``6 / 64`` of the size. Each layer is textured with a crop of one of the images. Nearer layers hide those
    behind them, and nearer objects are larger. The horizon varies from scene to scene, so that the disparity cannot be
    predicted from the position alone. The right view shows the layers by linear interpolation at x + d. The
    disparities of both views are exact.

    Args:
        pictures: Grey images (H, W), uint8, at least ``size * 70 / 64 + 2`` pixels high and wide.
        size: Height and width of the views.
        random: Random generator.

    Returns:
        The views (size, size), with both disparities.

    Example:
        >>> import numpy as np
        >>> image = np.arange(90 * 90, dtype=np.uint8).reshape(90, 90)
        >>> views = textured_layers([image], 64, np.random.default_rng(0))
        >>> views.left.shape, views.right_disparity.shape
        ((64, 64), (64, 64))
    """
    nearest = size * 6 / 64
    far = random.uniform(0.1, 0.2) * nearest
    horizon = random.uniform(*_HORIZONS) * size
    rows, columns = np.arange(size) + 0.5, np.arange(size + math.ceil(nearest) + 1) + 0.5

    def ground(row):
        return far + (nearest - far) * np.clip((row - horizon) / (size - _HORIZONS[0] * size), 0, 1)

    everywhere = np.ones((size, len(columns)), bool)
    layers = [(np.full(size, far), everywhere), (ground(rows), everywhere & (rows > horizon)[:, None])]
    for base in np.sort(random.uniform(horizon, size, random.integers(3, 8))):
        disparity = ground(base)
        height, width = random.uniform(0.5, 1.4, 2) * size * disparity / nearest / 2
        u = (columns - random.uniform(0, len(columns))) / width
        v = ((rows - base) / height * 2 + 1)[:, None]  # from -1 at the top to 1 at the base
        inside = u**2 + v**2 < 1 if random.random() < 0.5 else np.maximum(np.abs(u), np.abs(v)) < 1
        layers.append((np.full(size, disparity), inside))

    views, disparities = np.zeros((2, size, size)), np.zeros((2, size, size), np.float32)
    for disparity, inside in layers:
        texture = _texture(pictures, inside.shape, random)
        for view, seen, shift in zip(views, disparities, (0 * disparity, disparity), strict=True):
            opacity = _shifted(inside, shift)
            view += opacity * (_shifted(texture, shift) - view)
            np.copyto(seen, disparity[:, None], where=opacity >= 0.5)
    left, right = np.rint(views).astype(np.uint8)
    return Views(left, right, *disparities)


def _texture(pictures: list[np.ndarray], shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Crop one of the images, with a random brightness and a visible contrast."""
    image = pictures[random.integers(len(pictures))]
    top, left = (random.integers(whole - part + 1) for whole, part in zip(image.shape, shape, strict=True))
    crop = image[top : top + shape[0], left : left + shape[1]].astype(float)
    contrast = random.uniform(20, 50) / max(crop.std(), 10)
    return (random.uniform(60, 195) + contrast * (crop - crop.mean())).clip(0, 255)


def _shifted(layer: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Interpolate a layer (H, W) at x + shift, with non-negative shifts (H,), for the first H columns: (H, H)."""
    whole = np.floor(shift).astype(int)
    part = (shift - whole)[:, None]
    at = np.arange(len(layer)) + whole[:, None]
    return (1 - part) * np.take_along_axis(layer, at, 1) + part * np.take_along_axis(layer, at + 1, 1)
