"""Driving videos: the highway recording of De Brabandere et al. 2016 by two cameras, the user's own videos, and a
camera that moves over a photograph as a stand-in.

N and T are numbers of frames. Frames are grey (N, 64, 64), uint8.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources.archives import AGAIN
from lightning_meta.sources.video_files import grey_frames

SIZE = 64


def read_highway(path: str | Path, views: Sequence[str]) -> list[np.ndarray]:
    """Read the authors' ``highwayDriving_train.h5`` or ``highwayDriving_test.h5``.

    Its arrays are (N, 1, 64, 64), bytes or numbers from 0 to 1, with the columns of an image before its rows.

    Args:
        path: The file.
        views: Names of arrays: ``highway_L`` for the left camera, ``highway_R`` for the right one.

    Returns:
        The frames of each view, (N, 64, 64), uint8; the same number for each.

    Raises:
        InputError: If the file is missing, damaged or not HDF5, or an array is missing or has another shape, type or
            range.
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
        raise InputError(f"{path} cannot be read as HDF5 ({error}): {AGAIN}") from error
    if len({len(view) for view in frames}) > 1:
        counts = ", ".join(f"{len(view)} of {name}" for name, view in zip(views, frames, strict=True))
        raise InputError(f"{path} has {counts}, but each frame of one view needs one of the other: {AGAIN}")
    return frames


def read_drive(path: str | Path, max_frames: int | None = None) -> np.ndarray:
    """Read a video of any size: crop the central square of each frame and resize it by area averaging.

    Args:
        path: As for ``video_files.read_clip``.
        max_frames: Number of frames to read; by default all.

    Returns:
        Frames (T, 64, 64), uint8.

    Raises:
        InputError: As for ``video_files.read_clip``.
    """
    return np.stack([_square(frame.numpy()) for frame in islice(grey_frames(path), max_frames)])


def drawn_drive(photograph: np.ndarray, frames: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Film a photograph with a camera that pans, approaches and rotates, while the light changes.

    Args:
        photograph: Grey image (H, W), uint8, at least 128 pixels high and wide.
        frames: Number of frames T.
        random: Random generator of the motion.

    Returns:
        The frames (T, 64, 64), uint8, and the flow (T, 2, 64, 64), float32: the offset dx, dy in pixels to the position
        in the previous frame. It is NaN if that position is outside the frame, and in the first frame.

    Example:
        >>> import numpy as np
        >>> video, flow = drawn_drive(np.full((128, 128), 200, np.uint8), 3, np.random.default_rng(0))
        >>> video.shape, flow.shape
        ((3, 64, 64), (3, 2, 64, 64))
    """
    from PIL import Image

    H, W = photograph.shape
    image = Image.fromarray(photograph)
    # the frame at (x, y), relative to its centre, shows the photograph at A (x, y) + b
    scale = random.uniform(1, min(H, W) / (1.5 * SIZE))
    nearer, turn = random.uniform(-0.02, 0.02), random.uniform(-0.01, 0.01)  # per frame
    pan = random.uniform(-2.5, 2.5, 2)  # pixels per frame
    light, change = random.uniform(0.7, 1), random.uniform(-0.03, 0.03)  # brightness factor, and its change per frame
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
        # Pillow's coordinates start at the corner of a pixel, not at its centre
        offset = b - A @ np.full(2, SIZE / 2)
        view = image.transform(
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
    """Crop the central square of a frame (H, W) and resize it to 64x64."""
    from PIL import Image

    H, W = frame.shape
    side = min(H, W)
    left, top = (W - side) // 2, (H - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX, box))


def _grey_frames(array, name: str) -> np.ndarray:
    """Convert an array of the file to frames (N, 64, 64), uint8."""
    bytes_, numbers = array.dtype == np.uint8, array.dtype.kind == "f"
    if array.ndim != 4 or array.shape[1:] != (1, 64, 64) or not len(array) or not (bytes_ or numbers):
        raise InputError(f"{name} is {array.dtype} {array.shape}, not uint8 or float (N, 1, 64, 64): {AGAIN}")
    frames = np.empty((len(array), 64, 64), np.uint8)
    for start in range(0, len(array), 1000):  # in chunks, because all of it in float64 may not fit into memory
        part = array[start : start + 1000, 0].swapaxes(1, 2)
        if numbers:
            if not (part.min() >= 0 and part.max() <= 1):  # also true for NaN
                raise InputError(f"{name} has values outside 0 to 1: give bytes, or numbers from 0 to 1")
            part = np.rint(part * 255)
        frames[start : start + 1000] = part
    return frames
