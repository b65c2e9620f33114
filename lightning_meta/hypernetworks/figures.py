"""Images of kernels and of answers, uint8 (3, H', W')."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_meta.drawing.canvas import GAP, GREEN, INK, RED, blank_page, default_font, to_image, to_tensor

_MIN_WIDTH = 320  # of an image of kernels, in pixels


def kernel_grid(kernel: Tensor) -> Tensor:
    """Draw a kernel as a grid of its filters, one row per output channel (Ha et al. 2016, figures 2, 8, 12 and 13).

    Grey is 0, white the largest absolute value and black its negative, on one scale for all filters.

    Args:
        kernel: (out, in, f, f). With a single input channel the filters form a square.

    Returns:
        Image (3, H', W'), uint8.

    >>> import torch
    >>> kernel_grid(torch.randn(16, 16, 7, 7)).shape  # filters of 7 pixels and lines of 1, enlarged 3 times
    torch.Size([3, 381, 381])
    """
    out, inputs, f, _ = kernel.shape
    columns = inputs if inputs > 1 else math.ceil(out**0.5)
    values = kernel.detach().float().cpu().flatten(0, 1).nan_to_num(0)
    grey = (127.5 * (1 + values / values.abs().max().clamp(min=1e-12))).round()
    cells = torch.nn.functional.pad(grey, (0, 1, 0, 1), value=255)  # lines of one pixel
    rows = -(-len(cells) // columns)
    cells = torch.cat([cells, cells.new_full((rows * columns - len(cells), f + 1, f + 1), 255)])
    image = cells.unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * (f + 1), columns * (f + 1))[:-1, :-1]
    scale = -(-_MIN_WIDTH // image.shape[1])
    image = image.to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return image.expand(3, -1, -1).contiguous()


def answer_sheet(images: Tensor, answers: Sequence[str], right: Sequence[bool | None], scale: int = 2) -> Tensor:
    """Draw images with an answer below each: green if it is right, red if it is wrong.

    Args:
        images: (n, 1 or 3, H, W), 0 to 1.
        answers: Text below each image.
        right: Whether each answer is right. None: unknown, drawn in black.
        scale: Factor by which images are enlarged.

    Returns:
        Image (3, H', W'), uint8.
    """
    images = (images.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = (scale * side for side in images.shape[-2:])
    font = default_font(13)
    cell = max(width, *(math.ceil(font.getlength(answer)) for answer in answers)) + 4 * GAP
    line = height + 24
    columns = math.ceil(len(answers) ** 0.5)
    page, draw = blank_page(columns * cell, -(-len(answers) // columns) * line)
    for i, (image, answer, known) in enumerate(zip(images, answers, right, strict=True)):
        x, y = i % columns * cell + cell // 2, i // columns * line + GAP
        page.paste(to_image(image.expand(3, -1, -1), scale), (x - width // 2, y))
        colour = INK if known is None else GREEN if known else RED
        draw.text((x, y + height + 9), answer, colour, font, anchor="mm")
    return to_tensor(page)
