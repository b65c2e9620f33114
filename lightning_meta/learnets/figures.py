"""Figures of one-shot learners: predicted filters, their responses, and the model's answers.

Images are (3, H, W): uint8, or float from 0 to 1. Characters are (P, P), with ink 1 and paper 0.
"""

import math

import torch
from torch import Tensor
from torchvision.utils import make_grid

from lightning_meta.drawing.sheets import image_sheet

RIGHT, WRONG, UNKNOWN, PLAIN = (0.15, 0.65, 0.3), (0.85, 0.15, 0.15), (0.6, 0.6, 0.6), (1.0, 1.0, 1.0)
RANKS = ("best", "2nd", "3rd", "4th", "5th")


def signed_image(values: Tensor, largest: float) -> Tensor:
    """Colour values (..., H, W) as (..., 3, H, W): zero is white, ``largest`` full red, ``-largest`` full blue.

    >>> import torch
    >>> signed_image(torch.tensor([[1.0, -2.0]]), largest=2).tolist()
    [[[1.0, 0.0]], [[0.5, 0.0]], [[0.5, 1.0]]]
    """
    strength = (values.detach().float().cpu() / max(largest, 1e-12)).clamp(-1, 1)
    return torch.stack([1 + strength.clamp(max=0), 1 - strength.abs(), 1 - strength.clamp(min=0)], -3)


def filter_grid(filters: Tensor, largest: float) -> Tensor:
    """Draw filters (d, f, f) in a square grid, all on the colour scale of ``signed_image``."""
    side = math.ceil(len(filters) ** 0.5)
    return make_grid(signed_image(filters, largest), nrow=side, padding=1, pad_value=0.8)


def ink_image(ink: Tensor) -> Tensor:
    """Draw a character (P, P) in black on white."""
    return (1 - ink.detach().float().cpu()).expand(3, -1, -1)


def framed(image: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """Add a border of two pixels."""
    page = torch.tensor(colour)[:, None, None].repeat(1, image.shape[1] + 4, image.shape[2] + 4)
    page[:, 2:-2, 2:-2] = image
    return page


def answer_sheet(exemplars: Tensor, queries: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Draw up to 20 queries, one a row, each with the five classes of the highest scores.

    The true class has a green frame, a wrong best class a red one. Frames are grey if the label is unknown.

    Args:
        exemplars: One exemplar of each of W classes, (W, P, P).
        queries: (X, P, P).
        scores: (W, X).
        labels: Class of each query, (X,); -1 if unknown.

    Returns:
        Image (3, H', W'), uint8.
    """
    rows = []
    for query, column, label in list(zip(queries, scores.T, labels.tolist(), strict=True))[:20]:
        row = {"query": framed(ink_image(query), PLAIN)}
        for rank, w in zip(RANKS, column.argsort(descending=True).tolist(), strict=False):
            colour = UNKNOWN if label < 0 else RIGHT if w == label else WRONG if rank == "best" else PLAIN
            row[rank] = framed(ink_image(exemplars[w]), colour)
        rows.append(row)
    return image_sheet(rows)


def response_sheet(exemplars: Tensor, query: Tensor, filters: Tensor, responses: Tensor) -> Tensor:
    """Draw how one query responds to the filters of different exemplars (Bertinetto et al. 2016, figure 3).

    Shows the five channels whose responses differ most between the exemplars.

    Args:
        exemplars: (n, P, P).
        query: (P, P).
        filters: Predicted from the exemplars, (n, d, f, f).
        responses: The query filtered with them, (n, d, H, W).

    Returns:
        Image (3, H', W'), uint8.
    """
    chosen = responses.float().var(0, correction=0).mean((1, 2)).argsort(descending=True)[:5].tolist()
    largest, most = filters.abs().max().item(), responses[:, chosen].abs().max().item()
    rows = []
    for z, written, maps in zip(exemplars, filters, responses, strict=True):
        row = {"z": ink_image(z), "filters w(z)": filter_grid(written, largest), "x": ink_image(query)}
        rows.append(row | {f"response {c}": signed_image(maps[c], most) for c in chosen})
    return image_sheet(rows)
