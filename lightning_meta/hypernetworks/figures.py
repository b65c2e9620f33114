"""Pictures of kernels and of answers, uint8 (3, H', W')."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_meta.drawing.canvas import GAP, GREEN, INK, RED, blank_page, default_font, to_image, to_tensor

_WIDE = 320  # pixels that a picture of kernels has at least


def kernel_grid(kernel: Tensor) -> Tensor:
    """Draws a kernel as a grid of its filters, a row an output channel (Ha et al. 2016, figures 2, 8, 12 and 13).

    Grey is 0, white the largest absolute value and black its negative, on one scale for all filters.

    Args:
        kernel: (out, in, f, f); filters of a single input channel are laid out in a square.
    """
    out, inputs, f, _ = kernel.shape
    columns = inputs if inputs > 1 else math.ceil(out**0.5)
    values = kernel.detach().float().cpu().flatten(0, 1).nan_to_num(0)
    grey = (127.5 * (1 + values / values.abs().max().clamp(min=1e-12))).round()
    cells = torch.nn.functional.pad(grey, (0, 1, 0, 1), value=255)  # lines of one pixel
    rows = -(-len(cells) // columns)
    cells = torch.cat([cells, cells.new_full((rows * columns - len(cells), f + 1, f + 1), 255)])
    picture = cells.unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * (f + 1), columns * (f + 1))[:-1, :-1]
    scale = -(-_WIDE // picture.shape[1])
    picture = picture.to(torch.uint8).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return picture.expand(3, -1, -1).contiguous()


def answer_sheet(pictures: Tensor, answers: Sequence[str], right: Sequence[bool | None], scale: int = 2) -> Tensor:
    """Draws pictures with an answer under each: green where it is right, red where it is wrong.

    Args:
        pictures: (n, 1 or 3, H, W), 0 to 1.
        answers: What is written.
        right: None where nobody knows.
        scale: Side of the square that a pixel becomes.
    """
    pictures = (pictures.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = (scale * side for side in pictures.shape[-2:])
    font = default_font(13)
    cell = max(width, *(math.ceil(font.getlength(answer)) for answer in answers)) + 4 * GAP
    line = height + 24
    columns = math.ceil(len(answers) ** 0.5)
    page, draw = blank_page(columns * cell, -(-len(answers) // columns) * line)
    for i, (picture, answer, known) in enumerate(zip(pictures, answers, right, strict=True)):
        x, y = i % columns * cell + cell // 2, i // columns * line + GAP
        page.paste(to_image(picture.expand(3, -1, -1), scale), (x - width // 2, y))
        colour = INK if known is None else GREEN if known else RED
        draw.text((x, y + height + 9), answer, colour, font, anchor="mm")
    return to_tensor(page)
