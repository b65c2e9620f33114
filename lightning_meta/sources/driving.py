"""Driving videos: the highway recording of De Brabandere et al. 2016, seen by two cameras, videos of the user's own,
and a drive towards and along photographs that stands in for them.

N and T are numbers of frames. Frames are (N, 64, 64), uint8, grey.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources.video_files import grey_frames

SIZE = 64


def read_highway(path: str | Path, views: Sequence[str]) -> list[np.ndarray]:
    """Read the authors' ``highwayDriving_train.h5`` or ``highwayDriving_test.h5``.

    An array there is (N, 1, 64, 64), bytes or numbers from 0 to 1, with a picture's columns before its rows.

    Args:
        path: The file.
        views: Names of arrays: ``highway_L``, what the left camera saw, and ``highway_R``.

    Returns:
        The frames of each view, (N, 64, 64), uint8; as many of one as of another.

    Raises:
        InputError: If the file is missing, damaged or not HDF5, or an array is missing or not what it should be.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is missing: put the authors' file there (github.com/dbbert/dfn names the place)")
    try:
        with h5py.File(path) as file:
            for view in views:
                if not isinstance(file.get(view), h5py.Dataset):
                    raise InputError(f"{path} has no array {view!r}, only {sorted(file)}: give the authors' file")
            frames = [_grey_frames(file[view], f"{path}: {view}") for view in views]
    except (OSError, RuntimeError, KeyError, MemoryError) as error:  # h5py raises all of them over a damaged file
        raise InputError(f"{path} cannot be read as HDF5 ({error}): copy or fetch it again") from error
    if len({len(view) for view in frames}) > 1:
        counts = ", ".join(f"{len(view)} of {name}" for name, view in zip(views, frames, strict=True))
        raise InputError(f"{path} has {counts}: each frame of one view belongs to one of the other")
    return frames


def read_drive(path: str | Path, max_frames: int | None = None) -> np.ndarray:
    """Read a video of any size: the square in the middle of each frame, every pixel a mean over its area.

    Args:
        path: As for ``clips.read_clip``.
        max_frames: Stop after this many frames; none: read all.

    Returns:
        Frames (T, 64, 64), uint8.

    Raises:
        InputError: As ``clips.read_clip``.
    """
    return np.stack([_square(frame.numpy()) for frame in islice(grey_frames(path), max_frames)])


def drawn_drive(photograph: np.ndarray, frames: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What a camera sees that moves over a photograph: it pans, nears, turns, and the light changes.

    Args:
        photograph: uint8 (H, W), grey, at least 128 pixels each.
        frames: T.
        random: Where the movement comes from.

    Returns:
        uint8 (T, 64, 64), and the flow, float32 (T, 2, 64, 64): where each pixel was in the frame before, dx and dy in
        pixels; NaN where that is outside it, and in the first frame.
    """
    from PIL import Image

    H, W = photograph.shape
    picture = Image.fromarray(photograph)
    # frame pixel (x, y) from its centre shows the photograph at A (x, y) + b
    scale = random.uniform(1, min(H, W) / (1.5 * SIZE))
    nearer, turn = random.uniform(-0.02, 0.02), random.uniform(-0.01, 0.01)  # a frame
    pan = random.uniform(-2.5, 2.5, 2)  # pixels a frame
    light, change = random.uniform(0.7, 1), random.uniform(-0.03, 0.03)  # of the photograph's, at first and a frame
    margin = 0.5 * SIZE * scale
    place = np.array([random.uniform(margin, side - margin) for side in (W, H)])
    centre = (SIZE - 1) / 2
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1) - centre  # (64, 64, 2), x and y
    seen, flow = np.empty((frames, SIZE, SIZE), np.uint8), np.full((frames, 2, SIZE, SIZE), np.nan, np.float32)
    before = None
    for t in range(frames):
        angle, s = turn * t, scale * (1 - nearer) ** t
        A = s * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        b = place
        # Pillow counts from the corner of a pixel, not from its centre
        offset = b - A @ np.full(2, SIZE / 2)
        view = picture.transform(
            (SIZE, SIZE), Image.Transform.AFFINE, (*A[0], offset[0], *A[1], offset[1]), Image.Resampling.BILINEAR
        )
        seen[t] = np.rint(np.asarray(view) * np.clip(light + change * t, 0.4, 1))
        if before is not None:
            was = (grid @ A.T + b - before[1]) @ np.linalg.inv(before[0]).T
            inside = (np.abs(was) <= centre).all(-1)
            flow[t] = np.where(inside, (was - grid).transpose(2, 0, 1), np.nan)
        before = A, b
        place = place + s * pan
    return seen, flow


def _square(frame: np.ndarray) -> np.ndarray:
    """The square in the middle of a frame (H, W), as 64x64."""
    from PIL import Image

    H, W = frame.shape
    side = min(H, W)
    left, top = (W - side) // 2, (H - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX, box))


def _grey_frames(array, name: str) -> np.ndarray:
    """An array of the file as (N, 64, 64), uint8."""
    bytes_, numbers = array.dtype == np.uint8, array.dtype.kind == "f"
    if array.ndim != 4 or array.shape[1:] != (1, 64, 64) or not len(array) or not (bytes_ or numbers):
        raise InputError(f"{name} is {array.dtype} {array.shape}, not uint8 or float (N, 1, 64, 64): fetch it again")
    frames = np.empty((len(array), 64, 64), np.uint8)
    for start in range(0, len(array), 1000):  # the whole of it in float64 would not fit everywhere
        part = array[start : start + 1000, 0].swapaxes(1, 2)
        if numbers:
            if not (part.min() >= 0 and part.max() <= 1):  # NaN is not either
                raise InputError(f"{name} has values outside 0 to 1: give bytes, or numbers from 0 to 1")
            part = np.rint(part * 255)
        frames[start : start + 1000] = part
    return frames
