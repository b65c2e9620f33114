"""Pictures of what a language model does along a text (Ha et al. 2016, figures 4 and 5), uint8 (3, H', W')."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# The authors' colours, in their order; the gates' places in i, f, g, o.
GATES = {"i": (0, (204, 0, 0)), "g": (2, (0, 153, 0)), "f": (1, (0, 102, 204)), "o": (3, (255, 204, 0))}
_GIVEN, _WRITTEN, _PALE = (0, 90, 160), (30, 30, 30), (120, 120, 120)
_CELL, _LINE, _ROW = 10, 20, 8  # pixels: width of a letter, height of a line of letters and of a row of cells


def annotated_text(
    letters: Sequence[str], bits: Sequence[float | None], changes: Tensor | None, given: int, width: int = 80
) -> Tensor:
    """Draw a text with what each symbol cost the model, and how far its weights moved there.

    Under each line of letters lies a grey row, black where a symbol took 8 bits, and then a row a gate: the more
    colour, the larger the change of W_h when the symbol was read; full colour is the largest change of the passage.

    Args:
        letters: n, one a symbol.
        bits: n; None where a symbol was not predicted.
        changes: (n, 4), of the gates i, f, g, o; None: no such rows.
        given: How many of the letters were given (blue), not written by the model.
        width: Letters of a line.
    """
    from PIL import Image, ImageDraw

    rows = ["bits", *(GATES if changes is not None else ())]
    height = _LINE + len(rows) * _ROW + 8
    lines = range(0, len(letters), width)
    margin = 48
    page = Image.new("RGB", (margin + width * _CELL + 12, len(lines) * height + 12), "white")
    draw, font, small = ImageDraw.Draw(page), _mono(15), _mono(9)
    scale = None if changes is None else changes / changes.max().clamp(min=1e-12)
    for line, start in enumerate(lines):
        y = 8 + line * height
        for k, name in enumerate(rows):
            draw.text((margin - 6, y + _LINE + k * _ROW + _ROW // 2), name, _PALE, small, anchor="rm")
        for i in range(start, min(start + width, len(letters))):
            x = margin + (i - start) * _CELL
            colour = _GIVEN if i < given else _WRITTEN
            letter = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}.get(
                letters[i], letters[i]
            )
            draw.text((x + _CELL // 2, y + _LINE // 2), letter, colour, font, anchor="mm")
            amounts = [(min(1.0, (bits[i] or 0) / 8), (0, 0, 0))]
            if scale is not None:
                amounts += [(scale[i, gate].item(), full) for gate, full in GATES.values()]
            for k, (amount, full) in enumerate(amounts):
                shade = tuple(round(255 - amount * (255 - channel)) for channel in full)
                top = y + _LINE + k * _ROW
                draw.rectangle((x, top, x + _CELL - 1, top + _ROW - 2), shade)
    return _tensor(page)


def histogram(values: Tensor, bins: int = 20) -> Tensor:
    """Draw which part of the values of tanh(c_t), of all units and steps, lies in each of the bins of [-1, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    counts = torch.histc(values.float(), bins, -1, 1) / values.numel()
    figure = Figure((4, 3), dpi=100, layout="tight")
    axes = figure.subplots()
    axes.bar(((torch.arange(bins) + 0.5) / bins * 2 - 1).tolist(), counts.tolist(), 2 / bins, edgecolor="white")
    axes.set(xlabel="tanh of the cells", ylabel="part", xlim=(-1, 1))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _tensor(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))


def _mono(size: int):
    """A font with one width, and with more letters than most."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), size)


def _tensor(image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous()
