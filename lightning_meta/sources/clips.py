"""A user's own clip as grey frames: a video, an animated GIF or a folder of pictures.

T is the number of frames, H and W their height and width in pixels. Frames are uint8, 0 black to 255 white.
"""

from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.files import whole
from lightning_meta.sources.photos import picture_paths


def read_clip(path: str | Path, max_frames: int | None = None) -> Tensor:
    """Read the frames of a clip, in order and in grey (ITU-R BT.601 luma, full range).

    Args:
        path: A video or an animated GIF (anything that ffmpeg reads), or a folder of PNG or JPG pictures in natural
            order (``frame2`` before ``frame10``; hidden files and other kinds of file are passed over).
        max_frames: Stop after this many frames; none: read all.

    Returns:
        Frames (T, H, W), uint8, T at least 1. A GIF's frames come one each, however long each is shown.

    Raises:
        InputError: If the path is missing or a single picture, holds no frames, cannot be decoded, or its frames
            differ in size.
    """
    path = Path(path).absolute()  # ffmpeg takes "a:b.gif" for a protocol, "/home/a:b.gif" for a file
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}: ask for at least 1")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a video, a GIF or a folder of PNG or JPG pictures")
    named = _pictures(path, max_frames) if path.is_dir() else _video(path, max_frames)
    first = named[0][1].shape
    for name, frame in named:
        if frame.shape != first:
            raise InputError(
                f"{path}: {named[0][0]} is {first[1]}x{first[0]} pixels and {name} is {frame.shape[1]}x"
                f"{frame.shape[0]}: make all frames one size"
            )
    return torch.stack([frame for _, frame in named])


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


def _pictures(folder: Path, max_frames: int | None) -> list[tuple[str, Tensor]]:
    import numpy as np
    from PIL import Image

    named = []
    for path in picture_paths(folder)[:max_frames]:
        try:
            with Image.open(path) as picture:
                deep = picture.mode.startswith("I")  # 16 bits, which convert("L") would clip instead of scale
                grey = np.array(picture) >> 8 if deep else np.array(picture.convert("L"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be decoded ({error}): replace or remove it") from error
        named.append((path.name, torch.from_numpy(grey.astype(np.uint8))))
    return named


def _video(path: Path, max_frames: int | None) -> list[tuple[str, Tensor]]:
    import av

    try:
        with av.open(str(path)) as container:
            if container.format.name.endswith("_pipe") or "image2" in container.format.name:
                raise InputError(f"{path} is a single picture: give a video, a GIF or a folder of pictures")
            if container.format.name == "tty":  # ffmpeg would play a text file as the film of a terminal
                raise InputError(f"{path} is a text file: give a video, a GIF or a folder of pictures")
            if not container.streams.video:
                raise InputError(f"{path} has no video in it: give a video, a GIF or a folder of pictures")
            named = []
            for packet in container.demux(video=0):
                if packet.is_corrupt:  # ffmpeg itself would go on with the frames there are
                    raise InputError(f"{path} is cut short or damaged: copy it again or re-encode it")
                for frame in packet.decode():
                    # ffmpeg's grey is full range: it stretches a video's 16 to 235 to 0 to 255
                    grey = torch.from_numpy(frame.to_ndarray(format="gray"))
                    # a phone stores its frames lying and says by how many degrees to turn them
                    named.append((f"frame {len(named) + 1}", grey.rot90(frame.rotation // 90)))
                    if len(named) == max_frames:
                        return named
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error.strerror}): give an MP4 or a GIF") from error
    if not named:
        raise InputError(f"{path} has no frames in it: give another video")
    return named
