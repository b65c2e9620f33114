"""What a recurrent network does along a text or a line (Ha et al. 2016, figures 4, 5 and 7), in uint8 (3, H', W')."""

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
    colour, the larger the change of W_h when the symbol was read; a fiftieth of the passage's changes has full colour.

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
    scale = None if changes is None else _opacity(changes)
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


def annotated_line(
    points: np.ndarray, lifted: np.ndarray, changes: Tensor, size: tuple[int, int] = (640, 90)
) -> Tensor:
    """Draw a line of handwriting five times: in ink, and once for each gate, in colour where its weights moved.

    Args:
        points: (T, 2), where the pen was.
        lifted: (T,), bool: whether it was lifted after the point.
        changes: (T, 4), of the gates i, f, g, o; a fiftieth of the line's changes has full colour.
        size: Width and height of each drawing in pixels, at the most; the line is made to fit.
    """
    from PIL import Image, ImageDraw

    (width, height), margin, sharp = size, 24, 3  # drawn in three times the size, then reduced: Pillow does not smooth
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


def _opacity(changes: Tensor) -> Tensor:
    """0 to 1. The largest changes, as the first ones from an empty state are, would leave the others pale."""
    return (changes / changes.quantile(0.98).clamp(min=1e-12)).clamp(max=1)


def _mono(size: int):
    """A font with one width, and with more letters than most."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), size)


def _tensor(image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous()
