"""A clip's frames: those of a user's video, animated GIF or folder of pictures, and files written from frames.

T is the number of frames, H and W their height and width in pixels. Frames are uint8, 0 black to 255 white.
"""

import errno
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.sources.image_files import decode, picture_paths

_FORMATS = "mov,matroska,avi,gif,apng,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ogg,flv,asf,yuv4mpegpipe"
_LARGEST = 2**26  # pixels of a frame of a video, twice those of "8K"


def read_clip(path: str | Path, max_frames: int | None = None) -> Tensor:
    """Read the frames of a clip, in order and in grey (ITU-R BT.601 luma, full range).

    Args:
        path: A video or an animated GIF (anything that ffmpeg reads), or a folder of PNG, JPG or WebP pictures in
            natural order (``frame2`` before ``frame10``; hidden files and other kinds of file are passed over).
        max_frames: Stop after this many frames; none: read all.

    Returns:
        Frames (T, H, W), uint8, T at least 1. A GIF's frames come one each, however long each is shown.

    Raises:
        InputError: If the path is missing or a single picture, holds no frames, cannot be decoded, or its frames
            differ in size.
    """
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}: ask for at least 1")
    return torch.stack(list(islice(grey_frames(path), max_frames)))


def grey_frames(path: str | Path) -> Iterator[Tensor]:
    """Read the frames of ``read_clip`` one after another, (H, W) each; only the last one is held in memory."""
    return _frames(path, grey=True)


def read_frames(path: str | Path) -> Iterator[Tensor]:
    """Read the frames of a clip one after another, in colour; only the last one is held in memory.

    Args:
        path: As for ``read_clip``.

    Yields:
        Frames (3, H, W), uint8, red, green and blue; at least one, all of one size.

    Raises:
        InputError: As ``read_clip``, but not before the frame in question is asked for.
    """
    for frame in _frames(path, grey=False):
        yield frame.movedim(-1, 0).contiguous()


def _frames(path: str | Path, grey: bool) -> Iterator[Tensor]:
    """Yields (H, W) in grey or (H, W, 3) in colour, all of one size."""
    path = Path(path).absolute()  # ffmpeg takes "a:b.gif" for a protocol, "/home/a:b.gif" for a file
    if not path.exists():
        raise InputError(f"{path} does not exist: give a video, a GIF or a folder of PNG, JPG or WebP pictures")
    first = None
    for name, frame in (_pictures if path.is_dir() else _video)(path, grey):
        first = first or (name, frame.shape)
        if frame.shape != first[1]:
            raise InputError(
                f"{path}: {first[0]} is {first[1][1]}x{first[1][0]} pixels and {name} is {frame.shape[1]}x"
                f"{frame.shape[0]}: make all frames one size"
            )
        yield frame


def _pictures(folder: Path, grey: bool) -> Iterator[tuple[str, Tensor]]:
    import numpy as np

    for path in picture_paths(folder):
        picture = decode(path, path)
        yield path.name, torch.from_numpy(np.array(picture.convert("L") if grey else picture))


def _video(path: Path, grey: bool) -> Iterator[tuple[str, Tensor]]:
    import av

    count = 0
    try:
        # ffmpeg may open no lists of other files and addresses; what no video is, it may open to be refused by name
        pictures = (name for name in av.formats_available if name.endswith("_pipe"))
        known = ",".join([_FORMATS, "tty", "image2", "wav", "mp3", *pictures])
        options = {"format_whitelist": known}
        with av.open(str(path), options=options, metadata_errors="replace") as container:  # nobody reads its title
            if container.format.name.endswith("_pipe") or "image2" in container.format.name:
                raise InputError(f"{path} is a single picture: give a video, a GIF or a folder of pictures")
            if container.format.name == "tty":  # ffmpeg would play a text file as the film of a terminal
                raise InputError(f"{path} is a text file: give a video, a GIF or a folder of pictures")
            if not container.streams.video:
                raise InputError(f"{path} has no video in it: give a video, a GIF or a folder of pictures")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(f"{path} cannot be read as a video (it is of an unknown kind): give an MP4 or a GIF")
            if stream.width * stream.height > _LARGEST:
                raise InputError(
                    f"{path} is suspiciously large, {stream.width}x{stream.height} pixels: make it smaller"
                )
            for packet in container.demux(stream):
                if packet.is_corrupt:  # ffmpeg itself would go on with the frames there are
                    raise InputError(f"{path} is cut short or damaged: copy it again or re-encode it")
                for frame in packet.decode():
                    count += 1
                    # both are full range: ffmpeg stretches a video's 16 to 235 to 0 to 255
                    pixels = torch.from_numpy(frame.to_ndarray(format="gray" if grey else "rgb24"))
                    # a phone stores its frames lying and says by how many degrees to turn them
                    yield f"frame {count}", pixels.rot90(frame.rotation // 90)
    except (av.FFmpegError, OSError) as error:
        reason = "a length in it is damaged" if error.errno == errno.ENOMEM else error.strerror
        raise InputError(f"{path} cannot be read as a video ({reason}): give an MP4 or a GIF") from error
    if not count:
        raise InputError(f"{path} has no frames in it: give another video")
