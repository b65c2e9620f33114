"""Pictures of learnets: what was predicted, what it responds to, and the answers.

Pictures are (3, H, W): uint8, or float from 0 to 1.
"""

import math

import torch
from torch import Tensor

from lightning_meta.drawing.sheets import picture_sheet

RIGHT, WRONG, UNKNOWN, PLAIN = (0.15, 0.65, 0.3), (0.85, 0.15, 0.15), (0.6, 0.6, 0.6), (1.0, 1.0, 1.0)
PLACES = ("best", "2nd", "3rd", "4th", "5th")


def signed_picture(values: Tensor, largest: float) -> Tensor:
    """Paints values (H, W): white is zero, red positive, blue negative, full colour at ``largest``."""
    strength = (values.detach().float().cpu() / max(largest, 1e-12)).clamp(-1, 1)
    return torch.stack([1 + strength.clamp(max=0), 1 - strength.abs(), 1 - strength.clamp(min=0)])


def filter_mosaic(filters: Tensor, largest: float) -> Tensor:
    """Paints filters (d, f, f) side by side in a square, with one scale of colours."""
    side = math.ceil(len(filters) ** 0.5)
    f = filters.shape[-1] + 1
    mosaic = torch.full((3, side * f - 1, side * f - 1), 0.8)
    for i, values in enumerate(filters):
        y, x = i // side * f, i % side * f
        mosaic[:, y : y + f - 1, x : x + f - 1] = signed_picture(values, largest)
    return mosaic


def ink_picture(ink: Tensor) -> Tensor:
    """A character (P, P), ink 1, as black on white."""
    return (1 - ink.detach().float().cpu()).expand(3, -1, -1)


def framed(picture: Tensor, colour: tuple[float, float, float]) -> Tensor:
    """A picture with a border of two pixels."""
    page = torch.tensor(colour)[:, None, None].repeat(1, picture.shape[1] + 4, picture.shape[2] + 4)
    page[:, 2:-2, 2:-2] = picture
    return page


def answer_sheet(exemplars: Tensor, queries: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Draws each query (at most 20 of them) and the classes that it is most like, best first.

    Args:
        exemplars: One of each class, (W, P, P), ink 1.
        queries: (X, P, P).
        scores: (W, X).
        labels: The class of each query, framed in green where it is shown; -1 where nobody knows. (X,).
    """
    rows = []
    for query, column, label in list(zip(queries, scores.T, labels.tolist(), strict=True))[:20]:
        row = {"query": framed(ink_picture(query), PLAIN)}
        for place, w in zip(PLACES, column.argsort(descending=True).tolist(), strict=False):
            colour = UNKNOWN if label < 0 else RIGHT if w == label else WRONG if place == "best" else PLAIN
            row[place] = framed(ink_picture(exemplars[w]), colour)
        rows.append(row)
    return picture_sheet(rows)


def response_sheet(exemplars: Tensor, query: Tensor, filters: Tensor, responses: Tensor) -> Tensor:
    """Draws what the same input gives behind the filters of different exemplars (Bertinetto et al. 2016, figure 3).

    Args:
        exemplars: (n, P, P), ink 1.
        query: (P, P).
        filters: (n, d, f, f), predicted from the exemplars.
        responses: Of the query, (n, d, H, W); those that differ most between exemplars are shown.
    """
    chosen = responses.float().var(0, correction=0).mean((1, 2)).argsort(descending=True)[:5].tolist()
    largest, most = filters.abs().max().item(), responses[:, chosen].abs().max().item()
    rows = []
    for z, written, maps in zip(exemplars, filters, responses, strict=True):
        row = {"z": ink_picture(z), "filters w(z)": filter_mosaic(written, largest), "x": ink_picture(query)}
        rows.append(row | {f"response {c}": signed_picture(maps[c], most) for c in chosen})
    return picture_sheet(rows)
