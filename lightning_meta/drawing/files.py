"""Write pictures and animations as PNG, GIF and MP4 files, atomically."""

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path

from torch import Tensor

from lightning_meta.drawing.canvas import to_image
from lightning_meta.errors import InputError
from lightning_meta.storage.atomic import atomic_write


def write_png(path: str | Path, picture: Tensor) -> None:
    """Write a picture as PNG, whole or not at all.

    Args:
        path: File to write; a file already there is replaced.
        picture: (3, H, W), uint8.

    Raises:
        InputError: If the file cannot be written.
    """
    with atomic_write(path) as part:
        to_image(picture).save(part, format="PNG")


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
    with atomic_write(path) as part:
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
    with atomic_write(path) as part:
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
