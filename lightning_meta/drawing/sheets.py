"""Pictures made of others: film strips, and sheets of pictures with named columns.

Pictures are uint8 (3, H', W'), as ``add_image`` takes them. Frames are float (H, W), 0 black to 1 white, on any device
and in any precision; values outside are clipped. T is a number of frames, H and W a frame's height and width in pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_meta.drawing.canvas import (
    GAP,
    INK,
    PALE,
    blank_page,
    default_font,
    grey_image,
    to_image,
    to_tensor,
)


def film_strip(rows: dict[str, Tensor], columns: dict[str, Sequence[int]] | None = None, scale: int = 2) -> Tensor:
    """Draw clips as rows of frames, each row with its name on the left and its frame numbers on top.

    The paper's figure 5 of Moving MNIST is ``film_strip({"input": x, "prediction": y, "truth": z}, columns={"input":
    range(1, 11), "prediction": range(11, 21), "truth": range(11, 21)})``.

    Args:
        rows: The clips by name, top to bottom, each (T, H, W) with a T of its own and one H and W for all. A frame of
            NaN, or one that a shorter row does not have, is left blank.
        columns: Frame numbers of each row, one a frame; none: 1 to T. They are written once above rows that share them.
        scale: Side of the square that a pixel becomes.

    Returns:
        Picture (3, H', W'), uint8.
    """
    columns = columns or {name: range(1, len(clip) + 1) for name, clip in rows.items()}
    first = next(iter(rows.values()))
    height, width = first.shape[1] * scale, first.shape[2] * scale
    font = default_font(max(12, min(20, height // 7)))
    small = default_font(max(10, min(16, height // 9)))
    margin = math.ceil(max(font.getlength(name) for name in rows)) + 16
    page, draw = blank_page(
        margin + max(len(clip) for clip in rows.values()) * (width + GAP) + 8,
        8 + len(rows) * (height + GAP + 2 * int(small.size)) + 8,
    )
    y, numbers = 8, []
    for name, clip in rows.items():
        if list(columns[name]) != numbers[: len(columns[name])]:
            y += 4 if numbers else 0  # a group of rows with its own time
            numbers = list(columns[name])
            draw.text((margin - 8, y), "t =", PALE, small, anchor="ra")
            for i, number in enumerate(numbers):
                draw.text((margin + i * (width + GAP) + width // 2, y), str(number), PALE, small, anchor="ma")
            y += int(small.size) + 4
        draw.text((margin - 8, y + height // 2), name, INK, font, anchor="rm")
        for i, frame in enumerate(clip):
            if not frame.isnan().all():
                page.paste(grey_image(frame, scale), (margin + i * (width + GAP), y))
        y += height + GAP
    return to_tensor(page.crop((0, 0, page.width, y + 8 - GAP)))


def image_sheet(rows: list[dict[str, Tensor]], scale: int = 2) -> Tensor:
    """Draw rows of pictures with the names of the columns on top, such as content, style and result of style transfer.

    Args:
        rows: The pictures of each row by name, each (3, H, W) with an H and W of its own: float from 0 to 1, values
            outside are clipped and NaN is black, or uint8. The first row names the columns; a picture that another row
            does not have is left blank.
        scale: Side of the square that a pixel of the largest picture becomes. The others are enlarged to its size with
            their shape kept.

    Returns:
        Picture (3, H', W'), uint8.
    """
    names = list(rows[0])
    pictures = [picture for row in rows for picture in row.values()]
    height = scale * max(picture.shape[1] for picture in pictures)
    width = scale * max(picture.shape[2] for picture in pictures)
    font = default_font(max(12, min(24, height // 8)))
    line = 2 * int(font.size)
    cell = max(width, *(math.ceil(font.getlength(name)) for name in names)) + 2 * GAP
    page, draw = blank_page(len(names) * cell, line + len(rows) * (height + 2 * GAP))
    for i, name in enumerate(names):
        x = i * cell + cell // 2
        draw.text((x, line // 2), name, INK, font, anchor="mm")
        for j, row in enumerate(rows):
            if name in row:
                image = _fitted(row[name], width, height)
                y = line + j * (height + 2 * GAP) + height // 2
                page.paste(image, (x - image.width // 2, y - image.height // 2))
    return to_tensor(page)


def _fitted(picture: Tensor, width: int, height: int):
    """Enlarge (3, H, W) to the largest size of its shape inside ``width`` x ``height``."""
    from PIL import Image

    picture = picture.detach().cpu()
    if picture.is_floating_point():
        picture = (picture.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    image = to_image(picture)
    factor = min(width / image.width, height / image.height)
    # Nearest: a pixel stays a sharp square
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.NEAREST)
