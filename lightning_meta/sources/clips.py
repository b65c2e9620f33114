"""A clip's frames: those of a user's video, animated GIF or folder of pictures, and files written from frames.

T is the number of frames, H and W their height and width in pixels. Frames are uint8, 0 black to 255 white.
"""

import errno
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.files import whole
from lightning_meta.sources.photos import decode, picture_paths

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


def write_gif(path: str | Path, frames: Tensor, fps: float = 10) -> None:
    """Write an animated GIF that plays for ever, whole or not at all.

    Args:
        path: File to write; a file already there is replaced.
        frames: (T, H, W) grey or (T, 3, H, W) RGB, uint8. Grey values are kept; a coloured frame gets the 256 colours
            that suit it best. Equal neighbours are stored once and shown for longer.
        fps: Frames a second. GIF counts in hundredths of a second: 10, 20 and 25 are exact, above 50 is not shown.

    Raises:
        InputError: If the file cannot be written.
    """
    from PIL import Image

    pictures = [Image.fromarray(frame.numpy()) for frame in (frames if frames.ndim == 3 else frames.movedim(1, -1))]
    with whole(path) as part:
        pictures[0].save(
            part, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
        )


def write_mp4(path: str | Path, frames: Iterable[Tensor], fps: float) -> None:
    """Write an MP4 video, whole or not at all: H.264, or MPEG-4 part 2 where this ffmpeg has no encoder for it.

    Args:
        path: File to write; a file already there is replaced.
        frames: (3, H, W), uint8, all of one size; at least one. They are taken one after another, so that a long video
            need not fit into memory. Both formats want even sizes: an odd one gets its last row or column twice.
        fps: Frames a second.

    Raises:
        InputError: If there are no frames or the file cannot be written, and whatever taking a frame raises.
    """
    import av
    import numpy as np

    frames = iter(frames)
    first = next(frames, None)  # before anything is written
    if first is None:
        raise InputError(f"{path} would have no frames in it: give at least one")
    H, W = first.shape[1:]
    with whole(path) as part:
        try:
            # a full path: see _frames; the format: part's suffix says nothing
            with av.open(str(part.absolute()), "w", format="mp4") as container:
                h264 = "libx264" in av.codecs_available
                stream = container.add_stream(
                    "libx264" if h264 else "mpeg4",
                    rate=Fraction(fps).limit_denominator(1001),
                    options={"crf": "18"} if h264 else {"b": "8M"},  # hardly to be told from the frames
                )
                stream.height, stream.width, stream.pix_fmt = H + H % 2, W + W % 2, "yuv420p"
                for frame in chain([first], frames):
                    pixels = np.pad(frame.movedim(0, -1).numpy(), ((0, H % 2), (0, W % 2), (0, 0)), "edge")
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode())
        except av.FFmpegError as error:
            raise OSError(error.strerror) from error


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
