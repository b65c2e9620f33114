"""Frames of a video, an animated GIF or a folder of images.

T is the number of frames, H and W their height and width in pixels. Frames are uint8, 0 black to 255 white.
"""

import errno
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.sources.image_files import decode, image_paths

_FORMATS = "mov,matroska,avi,gif,apng,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ogg,flv,asf,yuv4mpegpipe"
_LARGEST = 2**26  # pixels of a video frame, twice as many as in 8K


def read_clip(path: str | Path, max_frames: int | None = None) -> Tensor:
    """Read the frames of a clip in grey (ITU-R BT.601 luma, full range).

    Args:
        path: A video or an animated GIF (any format that ffmpeg reads), or a folder of PNG, JPG or WebP images, read in
            natural order (``frame2`` before ``frame10``). Hidden files and other kinds of file are skipped.
        max_frames: Number of frames to read; by default all.

    Returns:
        Frames (T, H, W), uint8, T at least 1. Each frame of a GIF is returned once, regardless of its duration.

    Raises:
        InputError: If the path is missing or a single image, holds no frames, cannot be decoded, or its frames differ
            in size.
    """
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}: ask for at least 1")
    return torch.stack(list(islice(grey_frames(path), max_frames)))


def grey_frames(path: str | Path) -> Iterator[Tensor]:
    """Yield the frames of ``read_clip``, (H, W) each; only one is held in memory."""
    return _frames(path, grey=True)


def read_frames(path: str | Path) -> Iterator[Tensor]:
    """Yield the frames of a clip in colour; only one is held in memory.

    Args:
        path: As for ``read_clip``.

    Yields:
        RGB frames (3, H, W), uint8; at least one, all of the same size.

    Raises:
        InputError: As for ``read_clip``, when the frame in question is requested.
    """
    for frame in _frames(path, grey=False):
        yield frame.movedim(-1, 0).contiguous()


def _frames(path: str | Path, grey: bool) -> Iterator[Tensor]:
    """Yield frames (H, W) in grey or (H, W, 3) in colour, all of the same size."""
    path = Path(path).absolute()  # ffmpeg takes "a:b.gif" for a protocol, "/home/a:b.gif" for a file
    if not path.exists():
        raise InputError(f"{path} does not exist: give a video, a GIF or a folder of PNG, JPG or WebP images")
    first = None
    for name, frame in (_images if path.is_dir() else _video)(path, grey):
        first = first or (name, frame.shape)
        if frame.shape != first[1]:
            raise InputError(
                f"{path}: {first[0]} is {first[1][1]}x{first[1][0]} pixels and {name} is {frame.shape[1]}x"
                f"{frame.shape[0]}: make all frames the same size"
            )
        yield frame


def _images(folder: Path, grey: bool) -> Iterator[tuple[str, Tensor]]:
    import numpy as np

    for path in image_paths(folder):
        image = decode(path, path)
        yield path.name, torch.from_numpy(np.array(image.convert("L") if grey else image))


def _video(path: Path, grey: bool) -> Iterator[tuple[str, Tensor]]:
    import av

    count = 0
    try:
        # The whitelist keeps ffmpeg from opening playlists, which name other files and addresses. It includes formats
        # that are no video, so that they can be refused by name.
        images = (name for name in av.formats_available if name.endswith("_pipe"))
        options = {"format_whitelist": ",".join([_FORMATS, "tty", "image2", "wav", "mp3", *images])}
        with av.open(str(path), options=options, metadata_errors="replace") as container:  # the title is not used
            if container.format.name.endswith("_pipe") or "image2" in container.format.name:
                raise InputError(f"{path} is a single image: give a video, a GIF or a folder of images")
            if container.format.name == "tty":  # ffmpeg renders text files as a terminal
                raise InputError(f"{path} is a text file: give a video, a GIF or a folder of images")
            if not container.streams.video:
                raise InputError(f"{path} has no video stream: give a video, a GIF or a folder of images")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(f"{path} cannot be read as a video (unknown codec): give an MP4 or a GIF")
            if stream.width * stream.height > _LARGEST:
                raise InputError(
                    f"{path} is suspiciously large, {stream.width}x{stream.height} pixels: make it smaller"
                )
            for packet in container.demux(stream):
                if packet.is_corrupt:  # ffmpeg itself would continue with the frames that it can decode
                    raise InputError(f"{path} is truncated or damaged: copy it again or re-encode it")
                for frame in packet.decode():
                    count += 1
                    # ffmpeg converts the limited range of videos, 16 to 235, to 0 to 255
                    pixels = torch.from_numpy(frame.to_ndarray(format="gray" if grey else "rgb24"))
                    # phones store frames in the sensor's orientation, with the angle to rotate them by
                    yield f"frame {count}", pixels.rot90(frame.rotation // 90)
    except (av.FFmpegError, OSError) as error:
        reason = "a length in the file is damaged" if error.errno == errno.ENOMEM else error.strerror
        raise InputError(f"{path} cannot be read as a video ({reason}): give an MP4 or a GIF") from error
    if not count:
        raise InputError(f"{path} holds no frames: give another video")
