"""Videos with a box around one object in each frame: test sequences, training videos, and generated ones.

T is the number of frames, H and W their height and width in pixels. Frames are (3, H, W), uint8, RGB. A box is (left,
top, width, height) in pixels, counted from 0 at the left edge of the first pixel. It is NaN if the object is absent or
its position is unknown.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from lightning_meta.errors import InputError
from lightning_meta.sources.image_files import bundled_photographs, image_paths, read_image
from lightning_meta.sources.seeding import generator

_NOWHERE = float("nan")
_LARGEST = 2**24  # largest file of boxes in bytes; half an hour of video has two million


@dataclass(frozen=True, eq=False)
class Track:
    """A video with one object to track. ``frame`` reads or draws frames on demand, in any order."""

    name: str
    boxes: Tensor  # (T, 4), float32
    frame: Callable[[int], Tensor]  # from t, 0 <= t < T, to (3, H, W), uint8
    corners: Tensor | None = None  # (T, 4, 2), float32, x and y, if the truth is a rotated rectangle

    def __len__(self) -> int:
        return len(self.boxes)


def sequences(root: str | Path) -> list[Track]:
    """Find the test sequences in a folder, in the format of VOT (Kristan et al.) or OTB (Wu et al. 2015).

    A sequence is a folder with one of these files:

    - ``groundtruth.txt`` (VOT). Each line has the corners of a rotated rectangle (8 numbers) or a box (4 numbers).
    - ``groundtruth_rect.txt`` (OTB; ``groundtruth_rect.2.txt`` is a second object). Each line has a box that counts
      from 1, so 1 is subtracted. If the file counts from 0, its boxes are one pixel off.

    Its frames are the PNG, JPG or WebP images in ``img/``, in ``color/`` or next to the file.

    Args:
        root: Folder to search, with all folders below it.

    Returns:
        The sequences in order of their names, which are their paths below ``root``. Frames after OTB's last box are
        left out.

    Raises:
        InputError: If there are none, a file is unreadable or malformed, the numbers of boxes and frames differ, or the
            first box has no area or lies outside the first frame.
    """
    root = Path(root)
    tracks, ways = [], {}
    for folder, below, files in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        way = ways[folder] = ways.get(os.path.dirname(folder), frozenset()) | {here}
        below[:] = sorted(  # skip links to a folder on the way here: they would never end
            name
            for name in below
            if not (name.startswith(".") or any(at.is_relative_to((here / name).resolve()) for at in way))
        )
        otb = sorted(name for name in files if re.fullmatch(r"groundtruth_rect(\.\d+)?\.txt", name))
        for name in ["groundtruth.txt"] if "groundtruth.txt" in files else otb:
            tracks.append(_sequence(root, Path(folder, name)))
    if not tracks:
        raise InputError(
            f"{root} holds no sequences: each sequence is a folder with frames and groundtruth.txt (VOT) or "
            "groundtruth_rect.txt (OTB)"
        )
    return tracks


def upright(corners: Tensor) -> Tensor:
    """Return the upright box for a rotated one, as in the tracker of Bertinetto et al. (2016).

    The centre is the mean of the corners. With s = sqrt(area of the rotated box / area of its bounding box), the width
    is s * (xmax - xmin) + 1 and the height s * (ymax - ymin) + 1.

    Args:
        corners: (..., 4, 2), x and y.

    Returns:
        Boxes (..., 4); NaN if the corners enclose no area.

    >>> import torch
    >>> upright(torch.tensor([[0.0, 0], [10, 0], [10, 20], [0, 20]])).tolist()
    [-0.5, -0.5, 11.0, 21.0]
    """
    x, y = corners.unbind(-1)
    area = (x * y.roll(-1, -1) - y * x.roll(-1, -1)).sum(-1).abs() / 2  # the shoelace formula
    around = corners.amax(-2) - corners.amin(-2)
    size = (area / around.prod(-1)).sqrt()[..., None] * around + 1
    boxes = torch.cat([corners.mean(-2) - size / 2, size], -1)
    return torch.where(area[..., None] > 0, boxes, _NOWHERE)


def has_got10k(root: str | Path) -> bool:
    """Return whether GOT-10k's folder exists. If it is incomplete, ``got10k`` names the missing part."""
    return os.path.lexists(Path(root) / "GOT-10k")


def got10k(root: str | Path, split: str = "train") -> list[Track]:
    """Read GOT-10k (Huang et al. 2019).

    Files: ``<root>/GOT-10k/<split>/<video>/{00000001.jpg,groundtruth.txt,absence.label}``.

    Args:
        root: Folder that contains ``GOT-10k/``.
        split: ``train`` or ``val``; the test set has no boxes.

    Returns:
        The videos in order of their names. A box is NaN if the object is absent.

    Raises:
        InputError: If a file is missing or malformed, or the numbers of boxes, absences and frames differ.
    """
    folder = Path(root) / "GOT-10k" / split
    videos = sorted(
        path for path in _existing(folder, "GOT-10k from got-10k.aitestunion.com").iterdir() if path.is_dir()
    )
    tracks = []
    for video in videos:
        boxes, absent = _numbers(video / "groundtruth.txt", 4), _numbers(video / "absence.label", 1)
        frames = [path.name for path in image_paths(video)]
        if not len(boxes) == len(absent) == len(frames):
            raise InputError(
                f"{video}: {len(boxes)} boxes and {len(absent)} absences for {len(frames)} frames: unpack it again"
            )
        boxes[absent[:, 0] != 0] = _NOWHERE
        tracks.append(Track(video.name, _known(boxes), _reader(video, frames)))
    if not tracks:
        raise InputError(f"{folder} holds no videos: unpack GOT-10k there")
    return tracks


def has_imagenet_vid(root: str | Path) -> bool:
    """Return whether the folder of ImageNet's videos exists, complete or not."""
    return os.path.lexists(Path(root) / "ILSVRC2015")


def imagenet_vid(root: str | Path, split: str = "train") -> list[Track]:
    """Read ImageNet's videos (ILSVRC 2015 VID).

    Files: ``<root>/ILSVRC2015/{Data,Annotations}/VID/<split>/<part>/<video>/000000.{JPEG,xml}``; ``val`` has no parts.
    Reads all annotations but no images, which takes a minute or more for the million frames of the data set.

    Args:
        root: Folder that contains ``ILSVRC2015/``.
        split: ``train`` or ``val``.

    Returns:
        One track of all frames for each ``trackid`` of each video.

    Raises:
        InputError: If a file is missing, or an annotation is damaged or declares a document type.
    """
    annotations, data = (
        _existing(Path(root) / "ILSVRC2015" / kind / "VID" / split, "ILSVRC2015_VID.tar.gz from image-net.org")
        for kind in ("Annotations", "Data")
    )
    tracks = []
    for folder, below, files in os.walk(annotations):
        below.sort()
        names = sorted(name.removesuffix(".xml") for name in files if re.fullmatch(r"[^.].*\.xml", name))
        rows = {}
        for t, name in enumerate(names):
            for track, box in _objects(Path(folder, f"{name}.xml")):
                rows.setdefault(track, [[_NOWHERE] * 4] * len(names))[t] = box
        video = Path(folder).relative_to(annotations)
        frame = _reader(data / video, (f"{name}.JPEG" for name in names))
        for track, boxes in rows.items():
            tracks.append(Track(f"{video.as_posix()}/{track}", _known(torch.tensor(boxes)), frame))
    if not tracks:
        raise InputError(f"{annotations} holds no annotated objects: unpack ILSVRC2015_VID.tar.gz again")
    return tracks


def own_box(box: str | Sequence[float], height: int, width: int) -> Tensor:
    """Check a user's box around the object to track.

    Args:
        box: Left, top, width, height in pixels, as numbers or as text with commas. It may reach beyond the frame.
        height: The frame's height.
        width: The frame's width.

    Returns:
        The box (4,), float32.

    Raises:
        InputError: If the box is not four numbers, has no area or lies outside the frame.

    >>> own_box("120,80,60,40", height=240, width=320)
    tensor([120.,  80.,  60.,  40.])
    """
    try:
        checked = torch.tensor([float(number) for number in (box.split(",") if isinstance(box, str) else box)])
    except (TypeError, ValueError):
        checked = torch.empty(0)
    if len(checked) != 4 or not checked.isfinite().all():
        raise InputError(
            f"the box {box!r} is not four numbers: give left,top,width,height in pixels, as in 120,80,60,40"
        )
    _check(checked, height, width, "the box")
    return checked


def moving_objects(index: int, seed: int, frames: int = 60, size: int = 240) -> Track:
    """Generate a video of a textured object that moves over a photograph. It needs no download.

    The object is a superellipse, |x/a|^n + |y/b|^n <= 1, with the texture of one of the bundled photographs, slightly
    recoloured. It moves, rotates and changes its size (by up to 40 %) smoothly and stays within the frame. The
    background is another photograph, which pans slowly. A distractor of the same shape and another texture moves behind
    the object. The brightness varies.

    Args:
        index: Number of the video. The result is a function of ``seed`` and ``index``.
        seed: Seed of the videos.
        frames: Number of frames.
        size: Height and width of the frames in pixels.

    Returns:
        The track. Its boxes bound the shape exactly, not in whole pixels.

    >>> track = moving_objects(0, seed=0, frames=3, size=64)
    >>> track.boxes.shape, track.frame(2).shape
    (torch.Size([3, 4]), torch.Size([3, 64, 64]))
    """
    random = generator(seed, index)
    photographs = _photographs()
    names = [*photographs]
    scene = names.pop(random.integers(3))  # the last one is small, a drawing on white paper
    axes = size * random.uniform(0.07, 0.13) * np.exp(random.uniform(-0.25, 0.25) * np.array([1, -1]))
    n = random.uniform(2, 6)
    second, first = (_Object(random, photographs[names[random.integers(3)]], axes, n, frames, size) for _ in range(2))
    draw = _Scene(random, photographs[scene], (second, first), frames, size)
    return Track(f"moving-{seed}-{index}", torch.from_numpy(first.boxes).float(), draw)


class _Object:
    """A superellipse with a texture. It knows its box in each frame and draws itself."""

    def __init__(
        self, random: np.random.Generator, photograph: Tensor, axes: np.ndarray, n: float, frames: int, size: int
    ):
        H, W = photograph.shape[1:]
        p = random.integers(min(H, W) // 6, min(H, W) // 3)
        corners = random.integers((H - p, W - p), size=(4, 2)).tolist()
        patches = [photograph[:, y : y + p, x : x + p] for y, x in corners]
        self.patch = max(patches, key=lambda patch: patch.std().item())  # avoids plain sky
        self.colour = torch.from_numpy(random.uniform(0.7, 1.3, (3, 1, 1))).float()
        self.n = n
        x, y, growth, turn = _wander(random, 4, frames)
        self.angle = 0.4 * turn
        self.axes = axes * 1.4 ** growth[:, None]
        # half of the width and height: the dual norm of the rotated axes
        cos, sin = np.cos(self.angle)[:, None], np.sin(self.angle)[:, None]
        dual = n / (n - 1)
        half = np.stack(
            [((self.axes * np.abs(row)) ** dual).sum(1) for row in (np.hstack([cos, sin]), np.hstack([sin, cos]))], 1
        ) ** (1 / dual)
        self.centre = half + (size - 2 * half) * (1 + np.stack([x, y], 1)) / 2
        self.boxes = np.hstack([self.centre - half, 2 * half])

    def draw(self, frame: Tensor, t: int) -> None:
        left, top, width, height = self.boxes[t]
        part = frame[:, int(top) : int(top + height) + 1, int(left) : int(left + width) + 1]
        x = torch.arange(part.shape[2]) + (int(left) + 0.5 - self.centre[t, 0])
        y = (torch.arange(part.shape[1]) + (int(top) + 0.5 - self.centre[t, 1]))[:, None]
        cos, sin = np.cos(self.angle[t]), np.sin(self.angle[t])
        place = torch.stack([x * cos + y * sin, y * cos - x * sin], -1) / torch.from_numpy(self.axes[t])
        radius = place.abs().pow(self.n).sum(-1).pow(1 / self.n)  # 1 at the edge
        cover = ((1 - radius) * self.axes[t].min() + 0.5).clamp(0, 1).float()  # the edge is one pixel wide
        inside = grid_sample(self.patch[None], place.float()[None], padding_mode="border", align_corners=False)[0]
        part += cover * (inside * self.colour - part)


class _Scene:
    """Draw frame t of ``moving_objects``. A class, because loader processes need to pickle it."""

    def __init__(
        self,
        random: np.random.Generator,
        photograph: Tensor,
        objects: tuple[_Object, ...],
        frames: int,
        size: int,
    ):
        H, W = photograph.shape[1:]
        view = random.uniform(0.35, 0.65) * min(H, W)  # side of the visible square, in pixels of the photograph
        room = np.array([W, H]) - view
        swing = np.minimum(room / 2, 0.15 * view)
        x, y, light = _wander(random, 3, frames)
        self.photograph, self.objects, self.size, self.view = photograph, objects, size, view
        self.corner = swing + (room - 2 * swing) * random.random(2) + swing * np.stack([x, y], 1)
        self.brightness = 1 + 0.2 * light

    def __call__(self, t: int) -> Tensor:
        H, W = self.photograph.shape[1:]
        across = (torch.arange(self.size) + 0.5) / self.size * self.view
        x = (across + self.corner[t, 0]) / W * 2 - 1
        y = (across + self.corner[t, 1]) / H * 2 - 1
        grid = torch.stack([x.expand(self.size, -1), y[:, None].expand(-1, self.size)], -1)
        frame = grid_sample(self.photograph[None], grid.float()[None], align_corners=False)[0]
        for thing in self.objects:
            thing.draw(frame, t)
        return (frame * self.brightness[t]).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=1)
def _photographs() -> dict[str, Tensor]:
    return {name: picture.float() for name, picture in bundled_photographs().items()}


def _wander(random: np.random.Generator, count: int, frames: int) -> np.ndarray:
    """Return smooth random paths between -1 and 1, (count, frames), each a slow plus a fast oscillation."""
    period = random.uniform([[70], [25]], [[160], [50]], (2, count))[..., None]
    start = random.uniform(0, 2 * np.pi, (2, count))[..., None]
    slow, fast = np.sin(2 * np.pi / period * np.arange(frames) + start)
    return 0.8 * slow + 0.2 * fast


def _sequence(root: Path, truth: Path) -> Track:
    folder = truth.parent
    otb = truth.name != "groundtruth.txt"
    numbers = _numbers(truth, 4) if otb else _numbers(truth, 4, 8)
    frames = image_paths(next((path for path in (folder / "img", folder / "color") if path.is_dir()), folder))
    if otb and folder.name.lower() == "david" and len(frames) - len(numbers) >= 299:
        frames = frames[299:]  # the boxes of OTB's David begin at frame 300
    if len(numbers) > len(frames) or (len(numbers) < len(frames) and not otb):
        raise InputError(f"{truth}: {len(numbers)} boxes for {len(frames)} frames: copy the sequence again")
    corners = None
    if numbers.shape[1] == 8:
        corners = numbers.view(-1, 4, 2)
        boxes = upright(corners)
    else:
        boxes = numbers - torch.tensor([1.0, 1, 0, 0]) if otb else numbers
    boxes = _known(boxes)
    frame = _reader(frames[0].parent, (path.name for path in frames[: len(boxes)]))
    _check(boxes[0], *frame(0).shape[1:], f"{truth}: the first box")
    where = folder.resolve().name if folder == root else folder.relative_to(root).as_posix()
    return Track(where + truth.stem.removeprefix("groundtruth").removeprefix("_rect"), boxes, frame, corners)


def _check(box: Tensor, height: int, width: int, name: str) -> None:
    x, y, w, h = box.tolist()
    if not (w > 0 and h > 0):
        raise InputError(f"{name} has no area: give one with width and height above 0")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise InputError(
            f"{name}, {x:g},{y:g},{w:g},{h:g}, lies outside the frame of {width}x{height} pixels: give one around the "
            "object"
        )


def _known(boxes: Tensor) -> Tensor:
    """Replace boxes that are not finite or have no area by NaN."""
    return torch.where((boxes.isfinite() & (boxes[:, 2:] > 0).all(1, True)).all(1, True), boxes, _NOWHERE)


def _existing(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: get {what} and unpack it to create this folder")
    return folder


def _reader(folder: Path, names: Iterable[str]) -> Callable[[int], Tensor]:
    return partial(_read, folder, tuple(map(sys.intern, names)))  # a million frames share few names


def _read(folder: Path, names: tuple[str, ...], t: int) -> Tensor:
    return read_image(folder / names[t])


def _numbers(path: Path, *columns: int) -> Tensor:
    """Read a text file of numbers, separated by commas or spaces, as float32. ``columns`` are the allowed counts."""
    lines = _content(path, "copy the sequence again").decode(errors="replace").rstrip().splitlines()
    rows = []
    for line in lines:
        try:
            row = [float(number) for number in re.split(r"\s*,\s*|\s+", line.strip())]
        except ValueError:
            row = []
        rows.append(row)
        if len(row) not in columns or len(row) != len(rows[0]) or math.inf in map(abs, row):
            raise InputError(
                f"{path}: line {len(rows)}, {line.strip()[:80]!r}, is not {' or '.join(map(str, columns))} numbers, as "
                "many as in line 1: correct it or copy the sequence again"
            )
    if not rows:
        raise InputError(f"{path} is empty: copy the sequence again")
    return torch.tensor(rows)


def _content(path: Path, again: str) -> bytes:
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise InputError(f"{path} has {size:,} bytes, more than {_LARGEST:,}: {again}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {again}") from error


class _PlainTree(ElementTree.TreeBuilder):
    """Refuse document types: they can define entities that expand a small file to gigabytes."""

    def doctype(self, name: str, public: str, system: str) -> None:
        raise ValueError("it declares a document type")


def _objects(path: Path) -> list[tuple[int, list[float]]]:
    """Read ``trackid`` and box of each object in an annotation of ImageNet's videos."""
    content = _content(path, "unpack it again")
    try:
        tree = ElementTree.fromstring(content, ElementTree.XMLParser(target=_PlainTree()))
        found = []
        for thing in tree.iter("object"):
            x, y, right, bottom = (float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            found.append((int(thing.findtext("trackid")), [x, y, right - x, bottom - y]))
    except (ElementTree.ParseError, TypeError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        raise InputError(f"{path} is damaged or not an annotation ({error}): unpack it again") from error
    return found
