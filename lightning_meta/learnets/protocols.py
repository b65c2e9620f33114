"""Evaluation of trackers: VOT's supervised protocol and OTB's one-pass evaluation.

Shapes: T frames of H x W pixels. A box is (left, top, width, height) in pixels, counted from 0: (0, 0, W, H) is the
whole image. Unknown ground truth is NaN.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from lightning_meta.sources.tracks import Track
from lightning_meta.storage.atomic import atomic_write

SKIP = 5  # frames from a failure to the next start
BURN_IN = 10  # frames that the accuracy ignores after a start, the start included: they are too easy

SKIPPED, START, FAILURE, TRACKED = range(4)  # outcome of a frame; the VOT toolkit uses the first three codes


class Tracker(Protocol):
    """Interface of a tracker of one object. Frames are (3, H, W), uint8; boxes are (4,)."""

    def start(self, frame: Tensor, box: Tensor) -> None: ...

    def track(self, frame: Tensor) -> Tensor: ...


class SupervisedRun(NamedTuple):
    """Result of the supervised protocol on one sequence.

    Attributes:
        outcomes: (T,), ``SKIPPED``, ``START``, ``FAILURE`` or ``TRACKED``.
        boxes: (T, 4), the tracker's boxes; the ground truth at a start, NaN at a skipped frame.
        overlaps: (T,), overlap with the ground truth; NaN at starts, at skipped frames and if the truth is unknown.
    """

    outcomes: Tensor
    boxes: Tensor
    overlaps: Tensor

    @property
    def starts(self) -> list[int]:
        return (self.outcomes == START).nonzero()[:, 0].tolist()

    @property
    def failures(self) -> list[int]:
        return (self.outcomes == FAILURE).nonzero()[:, 0].tolist()

    @property
    def accuracy(self) -> float:
        """Mean overlap of the tracked frames outside every burn-in; NaN if there are none."""
        counted = self.outcomes == TRACKED
        for start in self.starts:
            counted[start : start + BURN_IN] = False
        return self.overlaps[counted].nanmean().item()


class VotSummary(NamedTuple):
    """VOT's measures of a data set."""

    accuracy: float
    failures: int


def overlap(boxes: Tensor, truth: Tensor, bounds: tuple[int, int] | None = None) -> Tensor:
    """Return the intersection over union of boxes, computed from their areas rather than by counting pixels.

    Args:
        boxes: (..., 4), a tracker's boxes. NaN has overlap 0.
        truth: (..., 4).
        bounds: H and W of the frame. Both boxes are clipped to it. None: no clipping, as in OTB.

    Returns:
        (...), from 0 to 1; NaN if the truth is NaN.

    >>> import torch
    >>> overlap(torch.tensor([5.0, 0, 10, 10]), torch.tensor([0.0, 0, 10, 10]))
    tensor(0.3333)
    """
    (start, end), (truth_start, truth_end) = _span(boxes, bounds), _span(truth, bounds)
    both = (torch.minimum(end, truth_end) - torch.maximum(start, truth_start)).clamp(min=0).prod(-1)
    union = (end - start).prod(-1) + (truth_end - truth_start).prod(-1) - both
    overlaps = torch.where(union > 0, both / union, 0)
    return overlaps.masked_fill(truth.isnan().any(-1), torch.nan)


def polygon_overlap(box: Tensor, corners: Tensor, bounds: tuple[int, int] | None = None) -> float:
    """Return the intersection over union of a box and a convex polygon, such as VOT's rotated ground truth.

    OpenCV computes the areas in float32; the result is accurate to 1e-6.

    Args:
        box: (4,), a tracker's box. NaN has overlap 0.
        corners: (N, 2), x and y, clockwise or counter-clockwise.
        bounds: H and W of the frame. Both shapes are clipped to it. None: no clipping.

    Returns:
        0 to 1; NaN if a corner is NaN.

    >>> import torch
    >>> diamond = torch.tensor([[5.0, 0], [10, 5], [5, 10], [0, 5]])
    >>> polygon_overlap(torch.tensor([0.0, 0, 10, 10]), diamond)
    0.5
    """
    if corners.isnan().any():
        return math.nan
    start, end = _span(box.double(), bounds)
    width, height = (end - start).tolist()
    if not (0 < width < math.inf and 0 < height < math.inf):
        return 0.0
    # Coordinates count from the box: float32 is too coarse for a small box far from the origin.
    polygon = (corners - start).float().numpy()
    both, _ = cv2.intersectConvexConvex(_rectangle(0, 0, width, height), polygon)
    area = cv2.contourArea(polygon)
    if bounds is not None:
        left, top = (-start).tolist()
        area, _ = cv2.intersectConvexConvex(_rectangle(left, top, left + bounds[1], top + bounds[0]), polygon)
    return both / (width * height + area - both)


def supervised(tracker: Tracker, track: Track) -> SupervisedRun:
    """Test a tracker as in VOT 2013 to 2019: after each failure it starts again from the ground truth.

    The tracker starts on the first frame. It has failed if its box, clipped to the frame, has overlap 0 with the ground
    truth. It then starts again ``SKIP`` frames later, or, if the ground truth is unknown there, as soon as it is known.
    A frame without ground truth is never a failure. If the track has rotated ground truth (``corners``), overlaps are
    computed with it.

    Differs from the toolkit: overlaps are computed from areas; the toolkit counts pixels of rounded regions.

    >>> from lightning_meta.learnets.tracker import StillTracker
    >>> from lightning_meta.sources.tracks import moving_objects
    >>> run = supervised(StillTracker(), moving_objects(0, seed=0, frames=20, size=64))
    >>> run.boxes.shape, run.starts, run.failures
    (torch.Size([20, 4]), [0, 17], [12])
    """
    known = ~track.boxes.isnan().any(-1)
    outcomes = torch.full((len(track),), SKIPPED)
    boxes = torch.full_like(track.boxes, torch.nan)
    overlaps = boxes[:, 0].clone()
    tracking, ready = False, 0
    for t in range(len(track)):
        if tracking:
            frame = track.frame(t)
            bounds = tuple(frame.shape[1:])
            boxes[t] = tracker.track(frame)
            if track.corners is None:
                overlaps[t] = overlap(boxes[t], track.boxes[t], bounds)
            elif known[t]:
                overlaps[t] = polygon_overlap(boxes[t], track.corners[t], bounds)
            tracking = bool(overlaps[t] != 0)
            outcomes[t], ready = (TRACKED, ready) if tracking else (FAILURE, t + SKIP)
        elif t >= ready and known[t]:
            tracker.start(track.frame(t), track.boxes[t])
            outcomes[t], boxes[t], tracking = START, track.boxes[t], True
    return SupervisedRun(outcomes, boxes, overlaps)


def vot_summary(runs: Sequence[SupervisedRun]) -> VotSummary:
    """Return the mean accuracy, weighted by sequence length, and the total number of failures.

    Differs from the toolkit: the mean ignores a sequence without an accuracy, which the toolkit counts as 0.
    """
    accuracies = [(run.accuracy, len(run.outcomes)) for run in runs if not math.isnan(run.accuracy)]
    weight = sum(length for _, length in accuracies)
    accuracy = sum(value * length for value, length in accuracies) / weight if weight else math.nan
    return VotSummary(accuracy, sum(len(run.failures) for run in runs))


def write_vot(path: str | Path, run: SupervisedRun) -> None:
    """Write a trajectory in the VOT toolkit's format (``SEQUENCE_001.txt``), atomically.

    Each line is one frame: 1 for a start, 2 for a failure, 0 for a skipped frame, else left, top, width and height.

    Raises:
        InputError: If the file cannot be written.
    """
    lines = [
        ",".join(f"{number:.4f}" for number in box) if outcome == TRACKED else str(outcome)
        for outcome, box in zip(run.outcomes.tolist(), run.boxes.tolist(), strict=True)
    ]
    with atomic_write(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines))


def one_pass(tracker: Tracker, track: Track) -> Tensor:
    """Test a tracker as in OTB: start it once, on the first known ground truth, and never restart it.

    Returns:
        Boxes (T, 4): NaN before the start, the ground truth at the start.
    """
    known = ~track.boxes.isnan().any(-1)
    boxes = torch.full_like(track.boxes, torch.nan)
    for t in range(len(track)):
        if known[:t].any():
            boxes[t] = tracker.track(track.frame(t))
        elif known[t]:
            tracker.start(track.frame(t), track.boxes[t])
            boxes[t] = track.boxes[t]
    return boxes


def success_curve(overlaps: Tensor) -> Tensor:
    """Return the share of frames whose overlap exceeds each of the thresholds 0, 0.05, ..., 1: (21,).

    The mean is OTB's area under the curve. It is at most 20 / 21, because no overlap exceeds 1.

    Args:
        overlaps: (T,). NaN (unknown ground truth) does not count.

    >>> import torch
    >>> success_curve(torch.tensor([1.0, 0.5])).mean()
    tensor(0.7143)
    """
    thresholds = torch.arange(21, dtype=overlaps.dtype) / 20
    return (overlaps[~overlaps.isnan()] > thresholds[:, None]).to(overlaps.dtype).mean(1)


def centre_distance(boxes: Tensor, truth: Tensor) -> Tensor:
    """Return the distances in pixels between the centres of boxes (..., 4) and of the truth (..., 4): (...).

    A distance is NaN if the truth is NaN, and infinite if only the box is.

    >>> import torch
    >>> centre_distance(torch.tensor([3.0, 4, 10, 10]), torch.tensor([0.0, 0, 10, 10]))
    tensor(5.)
    """
    centres, truth_centres = (box[..., :2] + box[..., 2:] / 2 for box in (boxes, truth))
    distances = torch.linalg.vector_norm(centres - truth_centres, dim=-1)
    return distances.nan_to_num(torch.inf).masked_fill(truth.isnan().any(-1), torch.nan)


def precision_curve(distances: Tensor) -> Tensor:
    """Return the share of frames whose centre is at most 0, 1, ..., 50 pixels off: (51,).

    OTB's precision is the value at 20 pixels.

    Args:
        distances: (T,), from ``centre_distance``. NaN does not count.

    >>> import torch
    >>> precision_curve(torch.tensor([5.0, 30.0]))[[0, 20, 50]]
    tensor([0.0000, 0.5000, 1.0000])
    """
    thresholds = torch.arange(51)
    return (distances[~distances.isnan()] <= thresholds[:, None]).to(distances.dtype).mean(1)


def _span(boxes: Tensor, bounds: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return the upper left and lower right corners, each (..., 2), clipped to the bounds."""
    start, size = boxes.split(2, -1)
    end = start + size
    if bounds is not None:
        limit = torch.tensor(bounds[::-1]).to(boxes)
        start, end = (point.clamp(min=torch.zeros_like(limit), max=limit) for point in (start, end))
    return start, end


def _rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float32)
