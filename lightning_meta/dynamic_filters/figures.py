"""Pictures of optical flow and animations of predictions.

Pictures are uint8 (3, H', W'), frames float (H, W) from 0 (black) to 1 (white); values outside are clipped."""

import math

import torch
from torch import Tensor

from lightning_meta.drawing.canvas import (
    GAP,
    GREEN,
    INK,
    PALE,
    RED,
    blank_page,
    default_font,
    grey_image,
    to_image,
    to_tensor,
)


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
        "last input": grey_image(frame, scale),
        "flow": to_image(flow_picture(flow, max_flow, mask), scale),
        "prediction": grey_image(next_prediction, scale),
    }
    if truth is not None:
        panels["truth"] = grey_image(truth, scale)
    width, height = panels["last input"].size
    font = default_font(max(11, min(20, height // 12)))
    line = 2 * int(font.size)
    radius = f"radius {max_flow:g} px"
    cell = max(width, math.ceil(font.getlength("prediction"))) + 2 * GAP
    wheel = min(width, height) * 5 // 8
    legend = max(wheel, math.ceil(font.getlength("comes from"))) + 8 * GAP
    page, draw = blank_page(
        len(panels) * cell + max(legend, math.ceil(font.getlength(radius)) + 2 * GAP), height + line + line // 2
    )
    for i, (title, panel) in enumerate(panels.items()):
        x = i * cell + cell // 2
        draw.text((x, line // 2), title, INK, font, anchor="mm")
        page.paste(panel, (x - width // 2, line))
    x = (len(panels) * cell + page.width) // 2
    y = line + height // 2
    page.paste(to_image(colour_wheel(wheel)), (x - wheel // 2, y - wheel // 2))
    draw.text((x, y - wheel // 2 - line // 2), "comes from", INK, font, anchor="mm")
    draw.text((x, y + wheel // 2 + line // 2), radius, INK, font, anchor="mm")
    return to_tensor(page)


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
    font = default_font(max(11, min(20, height // 12)))
    line, border = 2 * int(font.size), max(2, scale)
    cell = max(width + 2 * border, math.ceil(font.getlength(f"prediction {len(left)}"))) + 2 * GAP
    pictures = []
    for t, frame in enumerate(left):
        page, draw = blank_page(cell if truth is None else 2 * cell, line + height + 2 * border + GAP)
        name, colour = ("input", RED) if t < len(inputs) else ("prediction", GREEN)
        x, y = (cell - width) // 2, line + border
        draw.text((cell // 2, line // 2), f"{name} {t + 1}", colour, font, anchor="mm")
        draw.rectangle((x - border, y - border, x + width + border - 1, y + height + border - 1), colour)
        page.paste(grey_image(frame, scale), (x, y))
        if truth is not None:
            x += cell
            draw.text((cell + cell // 2, line // 2), f"truth {t + 1}", INK, font, anchor="mm")
            draw.rectangle((x, y, x + width - 1, y + height - 1), PALE)
            if t < len(right):
                page.paste(grey_image(right[t], scale), (x, y))
        pictures.append(to_tensor(page))
    return torch.stack(pictures)
