"""Figures of a tracker: exemplars, searches and score maps, and videos with the predicted boxes.

Images are (3, H, W): uint8, or float from 0 to 1.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from lightning_meta.drawing.canvas import to_image, to_tensor
from lightning_meta.drawing.sheets import image_sheet
from lightning_meta.learnets.figures import filter_grid
from lightning_meta.learnets.tracker import STRIDE, UPSAMPLING, peaks, upsample

FOUND, TRUE = (230, 30, 30), (20, 200, 60)


def triplet_sheet(
    exemplars: Tensor, searches: Tensor, scores: Tensor, filters: Tensor | None, centres: list[Tensor | None]
) -> Tensor:
    """Draw exemplars, their filters, searches, and score maps over the searches (Bertinetto et al. 2016, figure 4).

    A red ring marks the highest score, a green ring the object.

    Args:
        exemplars: (B, 3, 127, 127), from 0 to 1.
        searches: (B, 3, S, S), from 0 to 1.
        scores: (B, K, K).
        filters: (B, d, f, f). None: the sheet has no such column.
        centres: The object's centre in each search, (2,), in pixels from the centre of the search; None if the search
            does not show the object.

    Returns:
        Image (3, H', W'), uint8.
    """
    fine = upsample(scores).float().cpu()
    heat = F.avg_pool2d(fine, UPSAMPLING // STRIDE)  # a value for each pixel
    margin = searches.shape[-1] - heat.shape[-1]
    rows = []
    for i, found in enumerate(peaks(fine)):
        search = searches[i].float().cpu()
        strength = (heat[i] - heat[i].amin()) / (heat[i].amax() - heat[i].amin()).clamp(min=1e-12)
        strength = F.pad(strength, (margin // 2, margin - margin // 2) * 2)
        faded = search.mean(0) * (1 - strength)
        row = {"exemplar z": exemplars[i].float().cpu()}
        if filters is not None:
            row["filters w(z)"] = filter_grid(filters[i], filters.abs().max().item())
        row["search x"] = search
        row["scores"] = _with_rings(torch.stack([faded + strength, faded, faded]), {FOUND: found, TRUE: centres[i]})
        rows.append(row)
    return image_sheet(rows, scale=1)


def with_boxes(frames: Iterable[Tensor], boxes: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield each frame (3, H, W), uint8, with its box (4,) drawn on it."""
    for frame, box in zip(frames, boxes, strict=True):
        start, size = box.split(2)
        corners = torch.cat([start, start + (size - 1).clamp(min=0)]).round()
        yield draw_bounding_boxes(frame, corners[None], colors=FOUND, width=max(2, min(frame.shape[1:]) // 160))


def _with_rings(image: Tensor, centres: dict[tuple[int, int, int], Tensor | None]) -> Tensor:
    """Draw a ring of each colour around its centre (2,), in pixels from the centre of a float image."""
    from PIL import ImageDraw

    page = to_image((255 * image.nan_to_num(0).clamp(0, 1)).round().to(torch.uint8))
    for colour, centre in centres.items():
        if centre is not None:
            x, y = (value + length / 2 for value, length in zip(centre.tolist(), page.size, strict=True))
            ImageDraw.Draw(page).ellipse((x - 5, y - 5, x + 5, y + 5), outline=colour, width=2)
    return to_tensor(page)
