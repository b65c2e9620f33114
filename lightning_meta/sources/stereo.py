"""Stereo pairs: KITTI's and Middlebury's layouts, a user's own folder, and drawn scenes as a stand-in.

H and W are a picture's height and width in pixels. Views are (H, W), uint8, grey. A disparity is x_left - x_right in
pixels, (H, W), float32, never below zero; NaN where it is not known. That of the left view says that what it shows at x
is at x - d in the right one, that of the right view that what it shows at x is at x + d in the left one.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources.arrays import open_npz
from lightning_meta.sources.image_files import FORMATS, decode, is_picture, picture_paths

# Folders of left and right views, and that of the left views' disparities beside them
_FOLDERS = {
    ("image_2", "image_3"): "disp_occ_0",  # KITTI 2015, KITTI odometry in colour
    ("image_0", "image_1"): "disp_occ",  # KITTI 2012, KITTI odometry in grey
    ("image_l", "image_r"): "disp",
    ("left", "right"): "disp",
}
# Names of left and right view, and of their disparities, in one folder; the last may follow any beginning
_FILES = (
    ("im2", "im6", "disp2", "disp6"),  # Middlebury 2003
    ("im0", "im1", "disp0", "disp1"),  # Middlebury 2014
    ("left", "right", "disp", "disp_right"),
)
_KITTI_SCALE = 256
_HORIZONS = 0.05, 0.7  # of drawn scenes, as a share of the height
_MIDDLEBURY_SCALES = {(375, 450): 4, (750, 900): 2, (1500, 1800): 1}  # of 2003, by (H, W)


class Views(NamedTuple):
    """Two pictures of one scene, taken side by side."""

    left: np.ndarray
    right: np.ndarray
    left_disparity: np.ndarray | None = None
    right_disparity: np.ndarray | None = None

    def mirrored(self) -> "Views":
        """Each flipped, and the two swapped: again a left and a right view, of the scene in a mirror."""
        flipped = (None if part is None else part[:, ::-1] for part in self)
        right, left, right_disparity, left_disparity = flipped
        return Views(left, right, left_disparity, right_disparity)

    def window(self, top: int, left: int, size: int) -> "Views":
        """A square of ``size`` pixels, the same of each."""
        rows, columns = slice(top, top + size), slice(left, left + size)
        return Views(*(None if part is None else part[rows, columns] for part in self))

    def scaled(self, side: int) -> "Views":
        """With ``side`` pixels along the shorter side, by area averaging; disparities shrink with the picture.

        A disparity is then the mean of what is known of a pixel, if that is half of it at least.
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
    """How much of each of so many pixels in a row goes into each of ``fewer``, (fewer, pixels)."""
    edges = np.arange(fewer + 1)[:, None] * (pixels / fewer)
    place = np.arange(pixels)
    overlap = np.minimum(edges[1:], place + 1) - np.maximum(edges[:-1], place)
    return overlap.clip(min=0) * (fewer / pixels)


class StereoPair(NamedTuple):
    """Where a pair lies."""

    name: str  # the path below the folder that was searched
    folder: Path  # pairs of one folder belong together
    left: Path
    right: Path
    left_disparity: Path | None
    right_disparity: Path | None
    scale: float | None  # a disparity's values in a picture are so many times its pixels

    def read(self) -> Views:
        """Reads it.

        Raises:
            InputError: If a file cannot be read, views or disparities differ in size, or a disparity's scale is not
                known.
        """
        left, right = (np.array(decode(path, path).convert("L")) for path in (self.left, self.right))
        if left.shape != right.shape:
            raise InputError(
                f"{self.left} is {_size(left)} pixels, {self.right} {_size(right)}: give two views of one size"
            )
        disparities = []
        for path in (self.left_disparity, self.right_disparity):
            disparities.append(None if path is None else self._read_disparity(path, left))
        return Views(left, right, *disparities)

    def _read_disparity(self, path: Path, view: np.ndarray) -> np.ndarray:
        if is_picture(path):
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
            raise InputError(f"{path} is {_size(disparity)}, its view {_size(view)} pixels: give one of its size")
        if np.isnan(disparity).all():
            raise InputError(f"{path} knows the disparity of no pixel: replace or remove it")
        if np.nanmin(disparity) < 0:
            raise InputError(
                f"{path} has disparities below zero: give x_left - x_right in pixels, with NaN or inf for unknown"
            )
        return disparity


def find_pairs(root: str | Path, disparity_scale: float | None = None) -> list[StereoPair]:
    """Find stereo pairs in a folder and in all folders below it.

    Layouts, recognised by what is in a folder:

    - KITTI stereo (Menze and Geiger 2015; Geiger et al. 2012): ``image_2/``, ``image_3/`` and ``disp_occ_0/``, or
      ``image_0/``, ``image_1/`` and ``disp_occ/``, where a picture has one; levels are 256 times the pixels.
    - KITTI odometry: the same without disparities; ``image_l/`` and ``image_r/`` too.
    - Middlebury 2003 (Scharstein and Szeliski): ``im2.png``, ``im6.png``, ``disp2.png`` and ``disp6.png``, whose levels
      are 4, 2 or 1 times the pixels at a quarter of the size, at half and at full size.
    - Middlebury 2014 (Scharstein et al.): ``im0.png``, ``im1.png``, ``disp0.pfm`` and, rarely, ``disp1.pfm``.
    - Any others: folders ``left/``, ``right/`` and ``disp/``, or files ``left.png``, ``right.png``, ``disp.*``,
      ``disp_right.*``, or with a common beginning, such as ``cat_left.png``.

    In pictures (PNG) a level of 0 says unknown; in ``.pfm``, ``.npy`` and ``.npz`` what is not finite does. Disparities
    may always be missing.

    Args:
        root: The folder.
        disparity_scale: Levels to a pixel, for disparities in pictures whose layout does not say so.

    Returns:
        The pairs in order of their paths.

    Raises:
        InputError: If there are none, or a view has no partner.
    """
    root, pairs = Path(root), []
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give one with stereo pairs")
    for place, below, files in os.walk(root, followlinks=True):
        folder, here = Path(place), Path(place).resolve()
        below[:] = sorted(  # but no link to where we come from, which would have no end
            name for name in below if not (name.startswith(".") or here.is_relative_to((here / name).resolve()))
        )
        found = _in_folders(folder, below, disparity_scale)
        if found:
            below.clear()
        else:
            found = _in_files(folder, files + below, disparity_scale)  # a folder of a file's name is to be refused
        pairs += (pair._replace(name=_name(root, folder, pair.name)) for pair in found)
    if not pairs:
        raise InputError(
            f"{root} holds no stereo pairs in a known layout: name them left.png and right.png, or put them into "
            "folders left/ and right/ under the same names"
        )
    return pairs


def _in_folders(folder: Path, below: list[str], scale: float | None) -> list[StereoPair]:
    """Pairs by the names of view folders, the first of ``_FOLDERS`` that is there."""
    for names, disparities in _FOLDERS.items():
        if not set(names) & set(below):
            continue
        for name, other in (names, names[::-1]):
            if name not in below:
                raise InputError(f"{folder / other} has no {name} beside it: put the other views there")
        left, right = ({path.stem: path for path in picture_paths(folder / name)} for name in names)
        for stem in left.keys() ^ right.keys():
            has, lacks = (left, names[1]) if stem in left else (right, names[0])
            raise InputError(f"{has[stem]} has no partner of that name in {folder / lacks}: add or remove one")
        truths = folder / disparities
        truths = _disparity_files(truths.iterdir()) if truths.is_dir() else {}
        scale = _KITTI_SCALE if disparities.startswith("disp_occ") else scale
        return [StereoPair(stem, folder, left[stem], right[stem], truths.get(stem), None, scale) for stem in left]
    return []


def _in_files(folder: Path, files: list[str], scale: float | None) -> list[StereoPair]:
    """Pairs by the names of files, of the first kind of ``_FILES`` that is there."""
    paths = [folder / name for name in sorted(files)]
    pictures = {path.stem: path for path in paths if is_picture(path)}
    truths = _disparity_files(paths)
    for left, right, *disparities in _FILES:
        starts = {stem.removesuffix(name) for name in (left, right) for stem in pictures if stem.endswith(name)}
        starts = sorted(start for start in starts if not start or (left == "left" and start.endswith("_")))
        for start in starts:
            for name, other in ((left, right), (right, left)):
                if start + name not in pictures:
                    raise InputError(f"{pictures[start + other]} has no partner {start + name}.png: add or remove one")
        if starts:
            return [
                StereoPair(
                    start.rstrip("_"),
                    folder,
                    pictures[start + left],
                    pictures[start + right],
                    *(truths.get(start + name) for name in disparities),
                    scale,
                )
                for start in starts
            ]
    return []


def _disparity_files(paths: Iterable[Path]) -> dict[str, Path]:
    """Files that may hold a disparity, by stem; where several do, the one in pixels."""
    suffixes = (".png", ".npz", ".npy", ".pfm")
    found = [path for path in paths if path.suffix in suffixes and not path.name.startswith(".")]
    return {path.stem: path for path in sorted(found, key=lambda path: suffixes.index(path.suffix))}


def _name(root: Path, folder: Path, name: str) -> str:
    return "/".join([*folder.relative_to(root).parts, *([name] if name else [])]) or root.name


def _size(picture: np.ndarray) -> str:
    return "x".join(map(str, picture.shape[::-1]))


def read_pfm(path: str | Path) -> np.ndarray:
    """Read a portable float map of one channel, (H, W), float32; its file begins with the lowest row.

    Raises:
        InputError: If it cannot be read, is something else, has three channels, or is cut short.
    """
    content = _bytes(path)
    header = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s", content)
    try:
        width, height, order = int(header[1]), int(header[2]), float(header[3])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is no grey portable float map (.pfm): replace or remove it") from error
    values = content[header.end() :]
    if len(values) != 4 * width * height or not values:
        raise InputError(
            f"{path}: {len(values):,} bytes follow the header, which promises {width}x{height} numbers of 4: copy or "
            "download it again"
        )
    values = np.frombuffer(values, "<f4" if order < 0 else ">f4")
    return values.reshape(height, width)[::-1].astype(np.float32)


def _read_levels(path: Path) -> np.ndarray:
    """A grey picture (H, W) of 8 or 16 bits as it is."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as picture:
            levels = np.array(picture)
    except Exception as error:  # over a damaged file Pillow's decoders raise all sorts
        raise InputError(f"{path} cannot be decoded ({error}): replace or remove it") from error
    if levels.ndim != 2 or levels.dtype == bool:
        raise InputError(f"{path} is not a grey picture of 8 or 16 bits: give a disparity as one")
    return levels


def _read_array(path: Path) -> np.ndarray:
    """The one array of an .npy or .npz file."""
    try:
        if path.suffix == ".npz":
            with open_npz(path) as arrays:
                (array,) = arrays.values()
        else:
            array = np.load(path, allow_pickle=False)
    except Exception as error:  # over a damaged file NumPy, zipfile and tokenize raise all sorts
        raise InputError(f"{path} is not a file of one NumPy array ({error}): replace or remove it") from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {array.dtype} {array.shape}, not numbers (H, W): replace or remove it")
    return array


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): put the file there") from error


def textured_layers(pictures: list[np.ndarray], size: int, random: np.random.Generator) -> Views:
    """Draw a scene: a far wall, a ground that comes nearer from row to row, and things that stand on the ground.

    Each is a layer cut from one of the pictures and lies at one disparity, the ground at one a row, from far to at most
    ``6 / 64`` of the size. What is nearer hides what is behind it, and nearer things are larger. The horizon is higher
    or lower, as if the cameras nodded. So one view says where things are, and place alone does not. Both views show the
    left view's layers, the right one by linear interpolation at x + d; the disparities of both are exact.

    Args:
        pictures: uint8 (H, W) each, ``size * 70 / 64 + 2`` pixels at least along each side.
        size: Side of the views.
        random: Where everything comes from.

    Returns:
        The views, (size, size), with both disparities.
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
    """A piece of a picture in another brightness and with a contrast that can be seen."""
    picture = pictures[random.integers(len(pictures))]
    top, left = (random.integers(whole - part + 1) for whole, part in zip(picture.shape, shape, strict=True))
    piece = picture[top : top + shape[0], left : left + shape[1]].astype(float)
    contrast = random.uniform(20, 50) / max(piece.std(), 10)
    return (random.uniform(60, 195) + contrast * (piece - piece.mean())).clip(0, 255)


def _shifted(layer: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """A layer (H, W) at x + shift, shifts (H,) from 0 on, for the columns that are left: (H, H)."""
    whole = np.floor(shift).astype(int)
    part = (shift - whole)[:, None]
    at = np.arange(len(layer)) + whole[:, None]
    return (1 - part) * np.take_along_axis(layer, at, 1) + part * np.take_along_axis(layer, at + 1, 1)
