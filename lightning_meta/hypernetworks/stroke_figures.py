"""Pages of handwriting: pen strokes as an image or as SVG.

A sequence is (T, 3): dx, dy and 1 if the pen is lifted after the point, as in ``sources.strokes``.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

from lightning_meta.sources.strokes import to_lines

_INK, _MARGIN = (40, 40, 40), 12
_SHARP = 4  # pages are drawn at this many times their size and reduced, as Pillow does not antialias


def draw(
    sequences: Sequence[np.ndarray],
    columns: int = 1,
    cell: tuple[int, int] = (480, 72),
    scale: Sequence[float] = (1.0, 1.0),
    width: float = 2.0,
) -> Tensor:
    """Draw sequences in a grid of cells, row by row.

    All sequences have one scale, except those that would not fit into their cell.

    Args:
        sequences: Arrays (T, 3). Points after one that is not finite are left out.
        columns: Cells per row. With one column sequences are aligned left, with more they are centred.
        cell: Width and height of a cell in pixels.
        scale: What dx and dy were divided by.
        width: Width of the pen in pixels.

    Returns:
        Image (3, H', W'), uint8.

    >>> import numpy as np
    >>> draw([np.array([[0, 0, 0], [5, 3, 1]], np.float32)]).shape
    torch.Size([3, 72, 480])
    """
    from PIL import Image, ImageDraw

    lines, size = _placed(sequences, columns, cell, scale)
    page = Image.new("RGB", (size[0] * _SHARP, size[1] * _SHARP), "white")
    pen = ImageDraw.Draw(page)
    radius = width * _SHARP / 2
    for line in lines:
        points = [tuple(point) for point in (line * _SHARP).tolist()]
        pen.line(points, _INK, round(2 * radius), joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), _INK)
    return torch.from_numpy(np.array(page.reduce(_SHARP))).movedim(-1, 0).contiguous()


def svg(
    sequences: Sequence[np.ndarray],
    columns: int = 1,
    cell: tuple[int, int] = (480, 72),
    scale: Sequence[float] = (1.0, 1.0),
    width: float = 2.0,
    title: str = "",
) -> str:
    """Return the page of ``draw`` as the text of an SVG file, with a path for each stroke and a title."""
    lines, (W, H) = _placed(sequences, columns, cell, scale)
    paths = "".join(
        f'<path d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in [*line, *line[: len(line) == 1]])}"/>\n' for line in lines
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{W}" height="{H}" viewBox="0 0 {W} {H}">\n'
        f"<title>{escape(title)}</title>\n"
        '<rect width="100%" height="100%" fill="white"/>\n'
        f'<g fill="none" stroke="rgb{_INK}" stroke-width="{width:g}" stroke-linecap="round" stroke-linejoin="round">\n'
        f"{paths}</g>\n</svg>\n"
    )


def _placed(
    sequences: Sequence[np.ndarray], columns: int, cell: tuple[int, int], scale: Sequence[float]
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Return all strokes (n, 2) in pixels, and width and height of their page."""
    room = np.array(cell) - _MARGIN
    drawings = []
    for sequence in sequences:
        finite = np.isfinite(sequence).all(1).cumprod().astype(bool)
        drawings.append(to_lines(sequence[finite], scale) if finite.any() else [])
    boxes = [(np.concatenate(lines).min(0), np.ptp(np.concatenate(lines), axis=0)) for lines in drawings if lines]
    fits = [float((room / np.maximum(extent, 1e-9)).min()) for _, extent in boxes]
    usual = float(np.median(fits)) if fits else 1.0
    placed, boxes, fits = [], iter(boxes), iter(fits)
    for i, lines in enumerate(drawings):
        if lines:
            (corner, extent), zoom = next(boxes), min(usual, next(fits))
            free = room - extent * zoom
            shift = [free[0] / 2 if columns > 1 else 0, free[1] / 2] + np.array(cell) * [i % columns, i // columns]
            placed += [(line - corner) * zoom + shift + _MARGIN / 2 for line in lines]
    rows = -(-len(drawings) // columns)
    return placed, (cell[0] * columns, cell[1] * rows)
