"""Figures of optical flow and animations of predictions.

Images are uint8 (3, H', W'); frames are float (H, W) from 0 (black) to 1 (white), values outside are clipped.
"""

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
    """Draw a flow field: the hue is its direction, the saturation its length; white is no motion.

    The hue is (atan2(dy, dx) + pi) / (2 pi), as in figure 7 of De Brabandere et al. 2016: right is cyan, left red, down
    violet, up yellow-green.
    Differs from the paper: lengths are divided by ``max_flow``, not by the largest length in the image, so colours are
    comparable between images.

    Args:
        flow: Flow (2, H, W): dx to the right and dy downwards, in pixels.
        max_flow: Length in pixels from which on a colour is fully saturated.
        mask: Mask (H, W) of bool; the image is grey where it is False. None: no mask.

    Returns:
        Image (3, H, W), uint8.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.figures import flow_picture
        >>> flow_picture(torch.tensor([2.0, 0.0]).view(2, 1, 1), max_flow=2).flatten()  # right: cyan
        tensor([  0, 255, 255], dtype=torch.uint8)
    """
    dx, dy = flow.detach().float().cpu().nan_to_num(0)
    hue = (torch.atan2(dy, dx) + math.pi) / (2 * math.pi)
    saturation = (torch.hypot(dx, dy) / max_flow).clamp(max=1)
    # HSV to RGB with value 1: each channel is a trapezoid over the circle of hues; they are a third of a turn apart.
    thirds = torch.tensor([0.0, 4.0, 2.0])[:, None, None]
    colour = (((hue * 6 + thirds) % 6 - 3).abs() - 1).clamp(0, 1)
    image = 1 - saturation * (1 - colour)
    if mask is not None:
        image = torch.where(mask.cpu().bool(), image, 0.85)
    return (image * 255).round().to(torch.uint8)


def colour_wheel(size: int) -> Tensor:
    """Draw the legend of ``flow_picture``: each pixel has the colour of the flow from the centre to it.

    Args:
        size: Side in pixels. The rim of the wheel stands for a flow of length ``max_flow``.

    Returns:
        Image (3, size, size), uint8, white outside the wheel.
    """
    place = torch.arange(4 * size) / (4 * size) * 2 - 1 + 0.25 / size  # 4 x 4 samples per pixel, for a smooth rim
    flow = torch.stack([place.expand(len(place), -1), place[:, None].expand(-1, len(place))])
    wheel = flow_picture(flow, 1).float()
    wheel = torch.where(torch.hypot(*flow) <= 1, wheel, 255.0)
    return torch.nn.functional.avg_pool2d(wheel, 4).round().to(torch.uint8)


def flow_figure(
    frame: Tensor, flow: Tensor, next_prediction: Tensor, truth: Tensor | None, max_flow: float, scale: int = 4
) -> Tensor:
    """Draw the flow of one prediction: last input, flow, prediction, truth and the legend side by side.

    Args:
        frame: Last input frame (H, W).
        flow: Displacements (2, H, W) to where predicted pixels come from: dx to the right, dy downwards, in pixels.
        next_prediction: First predicted frame (H, W).
        truth: True frame (H, W); None leaves this panel out.
        max_flow: Length in pixels from which on a colour is fully saturated: the rim of the legend.
        scale: Side of the square that represents a pixel.

    Returns:
        Image (3, H', W'), uint8.
    """
    # If a black pixel stays black, every filter is right, so its flow has no meaning.
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
    """Draw the frames of an animation: inputs, then predictions on the left, the true frames on the right.

    The left panel has a red border during the inputs and a green one during the predictions, as in the authors'
    animations.

    Args:
        inputs: Given frames (T, H, W).
        predictions: Predicted frames (T2, H, W).
        truth: True frames that follow the inputs. Those beyond T2 are left out, missing ones are grey. None leaves the
            right panel out.
        scale: Side of the square that represents a pixel.

    Returns:
        Images (T + T2, 3, H', W'), uint8, for ``write_gif``.
    """
    left = [*inputs, *predictions]
    right = [] if truth is None else [*inputs, *truth]
    height, width = inputs.shape[1] * scale, inputs.shape[2] * scale
    font = default_font(max(11, min(20, height // 12)))
    line, border = 2 * int(font.size), max(2, scale)
    cell = max(width + 2 * border, math.ceil(font.getlength(f"prediction {len(left)}"))) + 2 * GAP
    images = []
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
        images.append(to_tensor(page))
    return torch.stack(images)
