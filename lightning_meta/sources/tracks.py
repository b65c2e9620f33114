"""Videos with a box around one object in each frame: test sequences, training videos, and drawn ones as a stand-in.

T is the number of frames, H and W their height and width in pixels. Frames are (3, H, W), uint8, red, green and blue. A
box is left, top, width, height in pixels; 0 is the left edge of the first pixel. Where the object is not there or its
place not known, a box is NaN.
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
from lightning_meta.seeding import generator
from lightning_meta.sources.image_files import bundled_photographs, picture_paths, read_picture

_NOWHERE = float("nan")
_LARGEST = 2**24  # bytes of a file of boxes; half an hour of them has two million


@dataclass(frozen=True, eq=False)
class Track:
    """A video with one object to follow. Frames are read or drawn when they are asked for, in any order."""

    name: str
    boxes: Tensor  # (T, 4), float32
    frame: Callable[[int], Tensor]  # from 0 <= t < T to (3, H, W), uint8
    corners: Tensor | None = None  # (T, 4, 2), float32, x and y, where the ground truth is a rotated rectangle

    def __len__(self) -> int:
        return len(self.boxes)


def sequences(root: str | Path) -> list[Track]:
    """Find the test sequences below a folder, laid out as VOT's (Kristan et al.) or OTB's (Wu et al. 2015).

    Args:
        root: Every folder below it, or itself, that holds one of these files is a sequence: ``groundtruth.txt`` (VOT),
            each line the corners of a rotated rectangle (8 numbers, also taken for ``corners``) or a box (4), used as
            it is; or else ``groundtruth_rect.txt`` (OTB; ``groundtruth_rect.2.txt`` is a second object), each line a
            box counted from 1, so that 1 is subtracted. A file of that name that counts from 0 is one pixel off, which
            does no harm. Frames are the PNG, JPG or WebP pictures in ``img/``, in ``color/`` or beside the file.

    Returns:
        The sequences in order of their names, which are their paths below the root. Frames after OTB's last box are
        left out.

    Raises:
        InputError: If there are none, a file cannot be read or has something else in it, boxes and frames differ in
            number, or the first box has no area or lies outside the first frame.
    """
    root = Path(root)
    tracks, ways = [], {}
    for folder, below, files in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        way = ways[folder] = ways.get(os.path.dirname(folder), frozenset()) | {here}
        below[:] = sorted(  # but no link to where we come from, directly or through other links: it would have no end
            name
            for name in below
            if not (name.startswith(".") or any(at.is_relative_to((here / name).resolve()) for at in way))
        )
        otb = sorted(name for name in files if re.fullmatch(r"groundtruth_rect(\.\d+)?\.txt", name))
        for name in ["groundtruth.txt"] if "groundtruth.txt" in files else otb:
            tracks.append(_sequence(root, Path(folder, name)))
    if not tracks:
        raise InputError(
            f"{root} holds no sequences: give a folder of folders with frames and groundtruth.txt (VOT) or "
            "groundtruth_rect.txt (OTB)"
        )
    return tracks


def upright(corners: Tensor) -> Tensor:
    """The upright box that a tracker starts from, after a rotated one (as in the tracker of Bertinetto et al. 2016).

    Centre = mean of the corners; with s = sqrt(area of the rotated box / area of the box around it), width =
    s * (xmax - xmin) + 1 and height = s * (ymax - ymin) + 1.

    Args:
        corners: (..., 4, 2), x and y.

    Returns:
        Boxes (..., 4); NaN where the corners enclose no area.
    """
    x, y = corners.unbind(-1)
    area = (x * y.roll(-1, -1) - y * x.roll(-1, -1)).sum(-1).abs() / 2  # the shoelace formula
    around = corners.amax(-2) - corners.amin(-2)
    size = (area / around.prod(-1)).sqrt()[..., None] * around + 1
    boxes = torch.cat([corners.mean(-2) - size / 2, size], -1)
    return torch.where(area[..., None] > 0, boxes, _NOWHERE)


def has_got10k(root: str | Path) -> bool:
    """Whether GOT-10k's folder is there; one that is there but incomplete counts: ``got10k`` then names what lacks."""
    return os.path.lexists(Path(root) / "GOT-10k")


def got10k(root: str | Path, split: str = "train") -> list[Track]:
    """Read GOT-10k (Huang et al. 2019).

    Files: ``<root>/GOT-10k/<split>/<video>/{00000001.jpg,groundtruth.txt,absence.label}``. Boxes are used as they are.

    Args:
        root: Folder that holds ``GOT-10k/``.
        split: ``train`` or ``val``; the test set comes without boxes.

    Returns:
        The videos in order of their names. Frames where the object is absent have no box.

    Raises:
        InputError: If something is missing, or boxes, absences and frames differ in number.
    """
    folder = Path(root) / "GOT-10k" / split
    videos = sorted(
        path for path in _existing(folder, "GOT-10k from got-10k.aitestunion.com").iterdir() if path.is_dir()
    )
    tracks = []
    for video in videos:
        boxes, absent = _numbers(video / "groundtruth.txt", 4), _numbers(video / "absence.label", 1)
        frames = [path.name for path in picture_paths(video)]
        if not len(boxes) == len(absent) == len(frames):
            raise InputError(
                f"{video}: {len(boxes)} boxes and {len(absent)} absences for {len(frames)} frames: unpack it again"
            )
        boxes[absent[:, 0] != 0] = _NOWHERE
        tracks.append(Track(video.name, _known(boxes), _reader(video, frames)))
    if not tracks:
        raise InputError(f"{folder} holds no videos: unpack them there")
    return tracks


def has_imagenet_vid(root: str | Path) -> bool:
    """Whether the folder of ImageNet's videos is there, complete or not."""
    return os.path.lexists(Path(root) / "ILSVRC2015")


def imagenet_vid(root: str | Path, split: str = "train") -> list[Track]:
    """Read ImageNet's videos (ILSVRC 2015 VID).

    Files: ``<root>/ILSVRC2015/{Data,Annotations}/VID/<split>/<part>/<video>/000000.{JPEG,xml}``; ``val`` has no parts.
    All annotations are read and no pictures: for the million frames of the original that takes a minute or more.

    Args:
        root: Folder that holds ``ILSVRC2015/``.
        split: ``train`` or ``val``.

    Returns:
        One track for each ``trackid`` of each video, through all of its frames.

    Raises:
        InputError: If something is missing, or an annotation damaged or suspicious.
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
    """Check a user's box around the object to follow.

    Args:
        box: Left, top, width, height in pixels, as text with commas or as numbers. It may reach beyond the frame.
        height: The frame's height.
        width: The frame's width.

    Returns:
        The box (4,), float32.

    Raises:
        InputError: If it is not four numbers, has no area or lies outside the frame.
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
    """Draw a video of a textured object that moves over a photograph: tracking without a download.

    The object is a superellipse, |x/a|^n + |y/b|^n <= 1, cut out of one of the bundled photographs and recoloured a
    little. It moves, turns and grows smoothly, by up to 40 %, always whole within the frame, over another photograph
    that pans slowly. Below it moves a second one of the same shape and another texture, to be confused with, and the
    brightness changes.

    Args:
        index: Which video.
        seed: Which collection of videos; the result is a function of both and nothing else.
        frames: Number of frames.
        size: Height and width of the frames.

    Returns:
        The track. Its boxes are those of the shape, to a fraction of a pixel.
    """
    random = generator(seed, index)
    photographs = _photographs()
    names = [*photographs]
    scene = names.pop(random.integers(3))  # not the last, a drawing on white that is too small
    axes = size * random.uniform(0.07, 0.13) * np.exp(random.uniform(-0.25, 0.25) * np.array([1, -1]))
    n = random.uniform(2, 6)
    second, first = (_Object(random, photographs[names[random.integers(3)]], axes, n, frames, size) for _ in range(2))
    draw = _Drawing(random, photographs[scene], (second, first), frames, size)
    return Track(f"moving-{seed}-{index}", torch.from_numpy(first.boxes).float(), draw)


class _Object:
    """A superellipse with a texture: where it is in each frame, and how it is drawn over one."""

    def __init__(
        self, random: np.random.Generator, photograph: Tensor, axes: np.ndarray, n: float, frames: int, size: int
    ):
        H, W = photograph.shape[1:]
        p = random.integers(min(H, W) // 6, min(H, W) // 3)
        corners = random.integers((H - p, W - p), size=(4, 2)).tolist()
        patches = [photograph[:, y : y + p, x : x + p] for y, x in corners]
        self.patch = max(patches, key=lambda patch: patch.std().item())  # not a piece of plain sky
        self.colour = torch.from_numpy(random.uniform(0.7, 1.3, (3, 1, 1))).float()
        self.n = n
        x, y, growth, turn = _wander(random, 4, frames)
        self.angle = 0.4 * turn
        self.axes = axes * 1.4 ** growth[:, None]
        # how far the shape reaches to the right and down: the norm that is dual to its own
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
        cover = ((1 - radius) * self.axes[t].min() + 0.5).clamp(0, 1).float()  # half a pixel of the edge on each side
        inside = grid_sample(self.patch[None], place.float()[None], padding_mode="border", align_corners=False)[0]
        part += cover * (inside * self.colour - part)


class _Drawing:
    """Draws the frames of ``moving_objects``; an object, so that it can be sent to another process."""

    def __init__(
        self,
        random: np.random.Generator,
        photograph: Tensor,
        objects: tuple[_Object, ...],
        frames: int,
        size: int,
    ):
        H, W = photograph.shape[1:]
        view = random.uniform(0.35, 0.65) * min(H, W)  # side of what is seen, in the photograph's pixels
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
    """Smooth random paths between -1 and 1, (count, frames): a slow and a fast oscillation each."""
    period = random.uniform([[70], [25]], [[160], [50]], (2, count))[..., None]
    start = random.uniform(0, 2 * np.pi, (2, count))[..., None]
    slow, fast = np.sin(2 * np.pi / period * np.arange(frames) + start)
    return 0.8 * slow + 0.2 * fast


def _sequence(root: Path, truth: Path) -> Track:
    folder = truth.parent
    otb = truth.name != "groundtruth.txt"
    numbers = _numbers(truth, 4) if otb else _numbers(truth, 4, 8)
    frames = picture_paths(next((path for path in (folder / "img", folder / "color") if path.is_dir()), folder))
    if otb and folder.name.lower() == "david" and len(frames) - len(numbers) >= 299:
        frames = frames[299:]  # its boxes begin at frame 300
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
        raise InputError(f"{name} has no area: draw it around the object")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise InputError(
            f"{name}, {x:g},{y:g},{w:g},{h:g}, lies outside the frame of {width}x{height} pixels: draw it around the "
            "object"
        )


def _known(boxes: Tensor) -> Tensor:
    """Turns the boxes that are none into NaN."""
    return torch.where((boxes.isfinite() & (boxes[:, 2:] > 0).all(1, True)).all(1, True), boxes, _NOWHERE)


def _existing(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: get {what} and unpack it so that this folder is there")
    return folder


def _reader(folder: Path, names: Iterable[str]) -> Callable[[int], Tensor]:
    return partial(_read, folder, tuple(map(sys.intern, names)))  # a million frames, but most names come in every video


def _read(folder: Path, names: tuple[str, ...], t: int) -> Tensor:
    return read_picture(folder / names[t])


def _numbers(path: Path, *columns: int) -> Tensor:
    """Read a text file of numbers between commas or blanks, float32, with one of these numbers of columns."""
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
                "many as in the first: correct it or copy the sequence again"
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
    """Builds no tree from a file that could define entities, with which a few bytes can fill the memory."""

    def doctype(self, name: str, public: str, system: str) -> None:
        raise ValueError("it declares a document type")


def _objects(path: Path) -> list[tuple[int, list[float]]]:
    """The objects in a frame of ImageNet's videos: ``trackid`` and box."""
    content = _content(path, "unpack it again")
    try:
        tree = ElementTree.fromstring(content, ElementTree.XMLParser(target=_PlainTree()))
        found = []
        for thing in tree.iter("object"):
            x, y, right, bottom = (float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            found.append((int(thing.findtext("trackid")), [x, y, right - x, bottom - y]))
    except (ElementTree.ParseError, TypeError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        raise InputError(f"{path} is damaged or no annotation ({error}): unpack it again") from error
    return found
