"""Images of a translator's attention, uint8 (3, H', W')."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def attention_image(weights: Tensor, source: Sequence[str], target: Sequence[str]) -> Tensor:
    """Draw attention weights as a matrix: one row per target subword, one column per source subword.

    White is 0, dark blue is 1.

    Args:
        weights: (T, S).
        source: S subwords, above the columns.
        target: T subwords, left of the rows.

    Returns:
        Image (3, H', W'), uint8.

    >>> import torch
    >>> attention_image(torch.eye(2), ["a", "b"], ["c", "d"]).dtype
    torch.uint8
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = 0.3 * len(source), 0.3 * len(target)  # inches
    across, down = (0.09 * max(4, *map(len, names)) + 0.3 for names in (target, source))
    size = across + width + 0.2, down + height + 0.2
    figure = Figure(size, dpi=100)
    axes = figure.add_axes((across / size[0], 0.2 / size[1], width / size[0], height / size[1]))
    axes.imshow(weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(source)), source, rotation=90, family="DejaVu Sans Mono", parse_math=False)
    axes.set_yticks(range(len(target)), target, family="DejaVu Sans Mono", parse_math=False)
    axes.set_xticks(np.arange(len(source) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(target) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).movedim(-1, 0).contiguous()
