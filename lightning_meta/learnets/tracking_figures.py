"""Pictures of a tracker: what it was shown, where it found it, and its boxes in a video.

Pictures are (3, H, W): uint8, or float from 0 to 1.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_meta.drawing.canvas import to_image, to_tensor
from lightning_meta.drawing.sheets import picture_sheet
from lightning_meta.learnets.figures import filter_mosaic
from lightning_meta.learnets.tracker import STRIDE, UPSAMPLING, peaks, upsample

FOUND, TRUE = (230, 30, 30), (20, 200, 60)


def triplet_sheet(
    exemplars: Tensor, searches: Tensor, scores: Tensor, filters: Tensor | None, centres: list[Tensor | None]
) -> Tensor:
    """Draws exemplars, their filters, searches, and the score maps over them (Bertinetto et al. 2016, figure 4).

    A red ring is where the score is highest, a green one where the object is.

    Args:
        exemplars: (B, 3, 127, 127), from 0 to 1.
        searches: (B, 3, S, S).
        scores: (B, K, K).
        filters: (B, d, f, f). None: no such column.
        centres: The object's, (2,), in pixels from the centre of the search; None where it is not there.

    Returns:
        Picture (3, H', W'), uint8.
    """
    fine = upsample(scores).float().cpu()
    heat = F.avg_pool2d(fine, UPSAMPLING // STRIDE)  # a value for each pixel
    margin = searches.shape[-1] - heat.shape[-1]
    rows = []
    for i, found in enumerate(peaks(fine)):
        search = searches[i].float().cpu()
        shown = (heat[i] - heat[i].amin()) / (heat[i].amax() - heat[i].amin()).clamp(min=1e-12)
        shown = F.pad(shown, (margin // 2, margin - margin // 2) * 2)
        warm = search.mean(0) * (1 - shown)
        overlay = _ringed(torch.stack([warm + shown, warm, warm]), found, FOUND)
        row = {"exemplar z": exemplars[i].float().cpu()}
        if filters is not None:
            row["filters w(z)"] = filter_mosaic(filters[i], filters.abs().max().item())
        here = centres[i]
        row["search x"] = search
        row["scores"] = overlay if here is None else _ringed(overlay, here, TRUE)
        rows.append(row)
    return picture_sheet(rows, scale=1)


def with_boxes(frames: Iterable[Tensor], boxes: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames (3, H, W), uint8, one after another, each with its box (4,) drawn in."""
    from PIL import ImageDraw

    for frame, box in zip(frames, boxes, strict=True):
        left, top, width, height = box.tolist()
        page = to_image(frame)
        thick = max(2, min(frame.shape[1:]) // 160)
        ImageDraw.Draw(page).rectangle((left, top, left + width - 1, top + height - 1), outline=FOUND, width=thick)
        yield to_tensor(page)


def _ringed(picture: Tensor, place: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """A picture with a ring around a place (2,), in pixels from its centre."""
    from PIL import ImageDraw

    if picture.is_floating_point():
        picture = (255 * picture.nan_to_num(0).clamp(0, 1)).round().to(torch.uint8)
    page = to_image(picture)
    x, y = (value + length / 2 for value, length in zip(place.tolist(), page.size, strict=True))
    ImageDraw.Draw(page).ellipse((x - 5, y - 5, x + 5, y + 5), outline=colour, width=2)
    return to_tensor(page)
