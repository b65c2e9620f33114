"""Images of what a recurrent network computes along a sequence (Ha et al. 2016, figures 4, 5 and 7).

Images are (3, H', W'), uint8.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# The authors' colours and order; each gate's position in i, f, g, o.
GATES = {"i": (0, (204, 0, 0)), "g": (2, (0, 153, 0)), "f": (1, (0, 102, 204)), "o": (3, (255, 204, 0))}
_GIVEN, _WRITTEN, _PALE = (0, 90, 160), (30, 30, 30), (120, 120, 120)
_CELL, _LINE, _ROW = 10, 20, 8  # pixels: width of a character, height of a line of text and of a coloured row


def annotated_text(
    characters: Sequence[str], bits: Sequence[float | None], changes: Tensor | None, given: int, width: int = 80
) -> Tensor:
    """Draw a text with the cost of each symbol and the change of the weights at it.

    Below each line of text is a grey row, which is black for a symbol that cost 8 bits, and then a row for each gate.
    Its colour is the stronger, the more W_h changed when the symbol was read; the largest 2 % have full colour.

    Args:
        characters: n, one for each symbol.
        bits: n costs; None for a symbol that was not predicted.
        changes: Change of W_h of the gates i, f, g, o, (n, 4). None: no such rows.
        given: Number of characters of the prompt; they are blue.
        width: Characters per line.
    """
    from PIL import Image, ImageDraw

    rows = ["bits", *(GATES if changes is not None else ())]
    height = _LINE + len(rows) * _ROW + 8
    lines = range(0, len(characters), width)
    margin = 48
    page = Image.new("RGB", (margin + width * _CELL + 12, len(lines) * height + 12), "white")
    draw, font, small = ImageDraw.Draw(page), _mono(15), _mono(9)
    scale = None if changes is None else _opacity(changes)
    for line, start in enumerate(lines):
        y = 8 + line * height
        for k, name in enumerate(rows):
            draw.text((margin - 6, y + _LINE + k * _ROW + _ROW // 2), name, _PALE, small, anchor="rm")
        for i in range(start, min(start + width, len(characters))):
            x = margin + (i - start) * _CELL
            colour = _GIVEN if i < given else _WRITTEN
            character = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}.get(
                characters[i], characters[i]
            )
            draw.text((x + _CELL // 2, y + _LINE // 2), character, colour, font, anchor="mm")
            amounts = [(min(1.0, (bits[i] or 0) / 8), (0, 0, 0))]
            if scale is not None:
                amounts += [(scale[i, gate].item(), full) for gate, full in GATES.values()]
            for k, (amount, full) in enumerate(amounts):
                shade = tuple(round(255 - amount * (255 - channel)) for channel in full)
                top = y + _LINE + k * _ROW
                draw.rectangle((x, top, x + _CELL - 1, top + _ROW - 2), shade)
    return _tensor(page)


def annotated_line(
    points: np.ndarray, lifted: np.ndarray, changes: Tensor, size: tuple[int, int] = (640, 90)
) -> Tensor:
    """Draw a line of handwriting five times: in ink, and once for each gate, coloured by the change of its weights.

    Args:
        points: Positions of the pen, (T, 2).
        lifted: Whether the pen is lifted after the point, (T,), bool.
        changes: Change of W_h of the gates i, f, g, o, (T, 4); the largest 2 % have full colour.
        size: Largest width and height of each drawing in pixels; the line is scaled to fit.
    """
    from PIL import Image, ImageDraw

    (width, height), margin, sharp = (
        size,
        24,
        3,
    )  # drawn at three times the size and reduced, as Pillow does not antialias
    low, high = points.min(0), points.max(0)
    zoom = min((np.array([width - 2 * margin, height - 24]) / np.maximum(high - low, 1e-9)).min(), 4.0)
    places = ((points - (low + high) / 2 * [0, 1] - low * [1, 0]) * zoom + [margin + 16, height / 2]) * sharp
    page = Image.new("RGB", (round(places[:, 0].max()) + margin * sharp, 5 * height * sharp), "white")
    draw, font = ImageDraw.Draw(page), _mono(14 * sharp)
    scale = _opacity(changes)
    for row, name in enumerate(["", *GATES]):
        gate, full = GATES.get(name, (None, _WRITTEN))
        draw.text((8 * sharp, (row + 0.5) * height * sharp), name, full, font, anchor="lm")
        shift = np.array([0, row * height * sharp])
        for t in np.flatnonzero(~lifted[:-1]):
            amount = 1.0 if gate is None else 0.08 + 0.92 * scale[t + 1, gate].item()
            shade = tuple(round(255 - amount * (255 - channel)) for channel in full)
            draw.line([tuple(place + shift) for place in places[t : t + 2]], shade, 3 * sharp, joint="curve")
    return _tensor(page.reduce(sharp))


def histogram(values: Tensor, bins: int = 20) -> Tensor:
    """Draw a histogram of tanh(c_t) over all units and steps, with bins from -1 to 1."""
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


def _opacity(changes: Tensor) -> Tensor:
    """Scale changes to 0 to 1. The largest 2 %, such as the first steps, get 1; otherwise all others would be pale."""
    return (changes / changes.quantile(0.98).clamp(min=1e-12)).clamp(max=1)


def _mono(size: int):
    """Load a monospaced font that has many characters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), size)


def _tensor(image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous()
