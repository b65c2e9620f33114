"""Pictures for TensorBoard and for files: film strips, optical flow, animations.

Pictures are uint8 (3, H', W'), as ``add_image`` takes them. Frames are float (H, W), 0 black to 1 white, on any device
and in any precision; values outside are clipped. T is a number of frames, H and W a frame's height and width in pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.files import whole

_INK, _PALE, _GAP = (40, 40, 40), (120, 120, 120), 3
_RED, _GREEN = (220, 40, 40), (40, 170, 70)


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
    font = _font(max(12, min(20, height // 7)))
    small = _font(max(10, min(16, height // 9)))
    margin = math.ceil(max(font.getlength(name) for name in rows)) + 16
    page, draw = _page(
        margin + max(len(clip) for clip in rows.values()) * (width + _GAP) + 8,
        8 + len(rows) * (height + _GAP + 2 * int(small.size)) + 8,
    )
    y, numbers = 8, []
    for name, clip in rows.items():
        if list(columns[name]) != numbers[: len(columns[name])]:
            y += 4 if numbers else 0  # a group of rows with its own time
            numbers = list(columns[name])
            draw.text((margin - 8, y), "t =", _PALE, small, anchor="ra")
            for i, number in enumerate(numbers):
                draw.text((margin + i * (width + _GAP) + width // 2, y), str(number), _PALE, small, anchor="ma")
            y += int(small.size) + 4
        draw.text((margin - 8, y + height // 2), name, _INK, font, anchor="rm")
        for i, frame in enumerate(clip):
            if not frame.isnan().all():
                page.paste(_grey(frame, scale), (margin + i * (width + _GAP), y))
        y += height + _GAP
    return _picture(page.crop((0, 0, page.width, y + 8 - _GAP)))


def flow_picture(flow: Tensor, max_flow: float, mask: Tensor | None = None) -> Tensor:
    """Paint a flow field: hue is its direction, saturation its length, white no motion.

    The hue is (atan2(dy, dx) + pi) / (2 pi) as in the authors' pictures of Dynamic Filter Networks (Jia et al. 2016,
    figure 7): right is cyan, left red, down violet, up yellow-green.
    Differs from the paper: the length is divided by ``max_flow``, not by the largest of the picture, so that one colour
    means one length everywhere.

    Args:
        flow: (2, H, W): dx to the right and dy downwards, in pixels.
        max_flow: The length in pixels that gets the full colour; longer ones get it too.
        mask: (H, W), bool, True where the flow means something; grey elsewhere. None: everywhere.

    Returns:
        Picture (3, H, W), uint8.
    """
    dx, dy = flow.detach().float().cpu().nan_to_num(0)
    hue = (torch.atan2(dy, dx) + math.pi) / (2 * math.pi)
    saturation = (torch.hypot(dx, dy) / max_flow).clamp(max=1)
    # HSV to RGB with value 1: each channel is a trapezium over the circle of hues, a third of a turn apart
    thirds = torch.tensor([0.0, 4.0, 2.0])[:, None, None]
    colour = (((hue * 6 + thirds) % 6 - 3).abs() - 1).clamp(0, 1)
    picture = 1 - saturation * (1 - colour)
    if mask is not None:
        picture = torch.where(mask.cpu().bool(), picture, 0.85)
    return (picture * 255).round().to(torch.uint8)


def colour_wheel(size: int) -> Tensor:
    """Draw the legend of ``flow_picture``: the colour at a place is that of the arrow from the centre to it.

    Args:
        size: Side in pixels. The rim of the wheel, ``size / 2`` from the centre, is a flow of length ``max_flow``.

    Returns:
        Picture (3, size, size), uint8, white outside the wheel.
    """
    place = torch.arange(4 * size) / (4 * size) * 2 - 1 + 0.25 / size  # four samples a pixel, for a smooth rim
    flow = torch.stack([place.expand(len(place), -1), place[:, None].expand(-1, len(place))])
    wheel = flow_picture(flow, 1).float()
    wheel = torch.where(torch.hypot(*flow) <= 1, wheel, 255.0)
    return torch.nn.functional.avg_pool2d(wheel, 4).round().to(torch.uint8)


def flow_figure(
    frame: Tensor, flow: Tensor, next_prediction: Tensor, truth: Tensor | None, max_flow: float, scale: int = 4
) -> Tensor:
    """Draw one step of prediction by its flow: last input, flow, prediction, truth and the legend side by side.

    Args:
        frame: The last input frame (H, W).
        flow: (2, H, W): where each pixel of the prediction comes from (dx to the right, dy downwards, in pixels).
        next_prediction: The first predicted frame (H, W).
        truth: The frame that really came (H, W); none: no such panel.
        max_flow: Length in pixels with the full colour, the rim of the legend.
        scale: Side of the square that a pixel becomes.

    Returns:
        Picture (3, H', W'), uint8.
    """
    # Where a black pixel stays black every filter is right, so its flow means nothing
    mask = (frame.detach().cpu() > 0.05) | (next_prediction.detach().cpu() > 0.05)
    panels = {
        "last input": _grey(frame, scale),
        "flow": _image(flow_picture(flow, max_flow, mask), scale),
        "prediction": _grey(next_prediction, scale),
    }
    if truth is not None:
        panels["truth"] = _grey(truth, scale)
    width, height = panels["last input"].size
    font = _font(max(11, min(20, height // 12)))
    line = 2 * int(font.size)
    radius = f"radius {max_flow:g} px"
    cell = max(width, math.ceil(font.getlength("prediction"))) + 2 * _GAP
    wheel = min(width, height) * 5 // 8
    legend = max(wheel, math.ceil(font.getlength("comes from"))) + 8 * _GAP
    page, draw = _page(
        len(panels) * cell + max(legend, math.ceil(font.getlength(radius)) + 2 * _GAP), height + line + line // 2
    )
    for i, (title, panel) in enumerate(panels.items()):
        x = i * cell + cell // 2
        draw.text((x, line // 2), title, _INK, font, anchor="mm")
        page.paste(panel, (x - width // 2, line))
    x = (len(panels) * cell + page.width) // 2
    y = line + height // 2
    page.paste(_image(colour_wheel(wheel)), (x - wheel // 2, y - wheel // 2))
    draw.text((x, y - wheel // 2 - line // 2), "comes from", _INK, font, anchor="mm")
    draw.text((x, y + wheel // 2 + line // 2), radius, _INK, font, anchor="mm")
    return _picture(page)


def animation(inputs: Tensor, predictions: Tensor, truth: Tensor | None = None, scale: int = 4) -> Tensor:
    """Draw the frames of a film of a prediction: input, then prediction on the left, what really came on the right.

    The left panel has a red border during the input and a green one during the prediction, after the marker of the
    authors' films of Dynamic Filter Networks.

    Args:
        inputs: (T, H, W).
        predictions: (T2, H, W).
        truth: The frames that really followed; those beyond T2 are left out, missing ones are grey. None: no right
            panel.
        scale: Side of the square that a pixel becomes.

    Returns:
        Pictures (T + T2, 3, H', W'), uint8, as ``write_gif`` takes them.
    """
    left = [*inputs, *predictions]
    right = [] if truth is None else [*inputs, *truth]
    height, width = inputs.shape[1] * scale, inputs.shape[2] * scale
    font = _font(max(11, min(20, height // 12)))
    line, border = 2 * int(font.size), max(2, scale)
    cell = max(width + 2 * border, math.ceil(font.getlength(f"prediction {len(left)}"))) + 2 * _GAP
    pictures = []
    for t, frame in enumerate(left):
        page, draw = _page(cell if truth is None else 2 * cell, line + height + 2 * border + _GAP)
        name, colour = ("input", _RED) if t < len(inputs) else ("prediction", _GREEN)
        x, y = (cell - width) // 2, line + border
        draw.text((cell // 2, line // 2), f"{name} {t + 1}", colour, font, anchor="mm")
        draw.rectangle((x - border, y - border, x + width + border - 1, y + height + border - 1), colour)
        page.paste(_grey(frame, scale), (x, y))
        if truth is not None:
            x += cell
            draw.text((cell + cell // 2, line // 2), f"truth {t + 1}", _INK, font, anchor="mm")
            draw.rectangle((x, y, x + width - 1, y + height - 1), _PALE)
            if t < len(right):
                page.paste(_grey(right[t], scale), (x, y))
        pictures.append(_picture(page))
    return torch.stack(pictures)


def write_png(path: str | Path, picture: Tensor) -> None:
    """Write a picture as PNG, whole or not at all.

    Args:
        path: File to write; a file already there is replaced.
        picture: (3, H, W), uint8.

    Raises:
        InputError: If the file cannot be written.
    """
    with whole(path) as part:
        _image(picture).save(part, format="PNG")


def _page(width: int, height: int):
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), "white")
    return page, ImageDraw.Draw(page)


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _image(picture: Tensor, scale: int = 1):
    """Turn uint8 (H, W) or (3, H, W) into a Pillow image with pixels of ``scale`` x ``scale``."""
    from PIL import Image

    image = Image.fromarray((picture if picture.ndim == 2 else picture.movedim(0, -1)).cpu().contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _grey(frame: Tensor, scale: int):
    frame = frame.detach().float().cpu().nan_to_num(0).clamp(0, 1)  # a diverged model must not stop the drawing
    return _image((frame * 255).round().to(torch.uint8), scale)


def _picture(page) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(page)).movedim(-1, 0).contiguous()
