"""How trackers are tested: VOT's supervised protocol and OTB's one-pass evaluation.

Shapes: T frames of H x W pixels. Boxes are left, top, width, height in pixels, 0-based: (0, 0, W, H) is the whole
picture. Ground truth that is not known is NaN.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_meta.sources.tracks import Track
from lightning_meta.storage.atomic import whole

SKIP = 5  # frames from a failure to the next start
BURN_IN = 10  # frames from a start, itself included, that are too easy to count for the accuracy
SENSITIVITY = 30  # S of the AR plot of VOT 2015

SKIPPED, START, FAILURE, TRACKED = range(4)  # what a frame was; the first three are the toolkit's codes


class Tracker(Protocol):
    """What follows one object: frames are (3, H, W), uint8, boxes (4,)."""

    def start(self, frame: Tensor, box: Tensor) -> None: ...

    def track(self, frame: Tensor) -> Tensor: ...


class SupervisedRun(NamedTuple):
    """A tracker's way through one sequence.

    Attributes:
        outcomes: (T,), ``SKIPPED``, ``START``, ``FAILURE`` or ``TRACKED``.
        boxes: (T, 4), the tracker's; at a start the ground truth, at a skipped frame NaN.
        overlaps: (T,), with the ground truth; NaN at starts, at skipped frames and where the ground truth is unknown.
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
        """Mean overlap of the tracked frames after each burn-in; NaN if none is left."""
        counted = self.outcomes == TRACKED
        for start in self.starts:
            counted[start : start + BURN_IN] = False
        return self.overlaps[counted].nanmean().item()

    @property
    def robustness(self) -> int:
        """Number of failures."""
        return len(self.failures)


class VotSummary(NamedTuple):
    """VOT's measures over a data set."""

    accuracy: float
    failures: int
    reliability: float


def overlap(boxes: Tensor, truth: Tensor, bounds: tuple[int, int] | None = None) -> Tensor:
    """Intersection over union of boxes, exact and not counted in pixels.

    Args:
        boxes: (..., 4), a tracker's. NaN overlaps nothing.
        truth: (..., 4).
        bounds: H and W of the frame, to which both are cut; none: not cut, as in OTB.

    Returns:
        (...), 0 to 1; NaN where the truth is.
    """
    (start, end), (truth_start, truth_end) = _span(boxes, bounds), _span(truth, bounds)
    both = (torch.minimum(end, truth_end) - torch.maximum(start, truth_start)).clamp(min=0).prod(-1)
    union = (end - start).prod(-1) + (truth_end - truth_start).prod(-1) - both
    overlaps = torch.where(union > 0, both / union, 0)
    return overlaps.masked_fill(truth.isnan().any(-1), torch.nan)


def polygon_overlap(box: Tensor, corners: Tensor, bounds: tuple[int, int] | None = None) -> float:
    """Intersection over union of a box and a convex polygon, such as VOT's rotated ground truth; exact.

    Args:
        box: (4,), a tracker's. NaN overlaps nothing.
        corners: (N, 2), x and y, in either sense of rotation.
        bounds: H and W of the frame, to which both are cut; none: not cut.

    Returns:
        0 to 1; NaN where the corners are.
    """
    if corners.isnan().any():
        return math.nan
    start, end = (point.tolist() for point in _span(box.double(), bounds))
    polygon = corners.tolist()
    if bounds is not None:
        polygon = _cut(polygon, (0, 0), bounds[::-1])
    both = _area(_cut(polygon, start, end))
    union = (end[0] - start[0]) * (end[1] - start[1]) + _area(polygon) - both
    return both / union if union > 0 else 0.0


def supervised(tracker: Tracker, track: Track) -> SupervisedRun:
    """Test a tracker as in VOT 2013 to 2019: what loses the object is put back on it.

    The tracker starts on the first frame. Where its box, cut to the frame, does not overlap the ground truth at all, it
    has failed, and starts again ``SKIP`` frames later (or, the ground truth there being unknown, as soon as it is
    known). Where the ground truth is unknown nothing can fail. Overlaps are with the rotated ground truth, if there is
    one. Differs from the toolkit: overlaps are exact, the toolkit counts pixels of rounded regions.
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
    """Accuracy weighted by the sequences' lengths, failures in all, and the reliability of the AR plot.

    Reliability is exp(-S F / N), the chance of S frames without a failure at F failures in N frames.
    Differs from the toolkit: a sequence without an accuracy is left out of the mean, where the toolkit counts it as 0;
    F / N is failures a frame, where the Python toolkit takes failures a sequence.
    """
    frames = sum(len(run.outcomes) for run in runs)
    failures = sum(run.robustness for run in runs)
    accuracies = [(run.accuracy, len(run.outcomes)) for run in runs if not math.isnan(run.accuracy)]
    weight = sum(length for _, length in accuracies)
    accuracy = sum(value * length for value, length in accuracies) / weight if weight else math.nan
    return VotSummary(accuracy, failures, math.exp(-SENSITIVITY * failures / frames))


def expected_average_overlap(runs: Sequence[SupervisedRun], low: int = 108, high: int = 371) -> float:
    """EAO: the mean overlap to expect of a tracker that is never put back, over n = low ... high frames after a start.

    Each start gives a stretch of overlaps (the frames whose ground truth is known). One that ends in a failure is
    followed by zeros for ever; one that ends with the sequence says nothing of longer ones. The value at n is the mean,
    over the stretches that say something of n frames, of their mean over the first n; the measure is the mean of these
    values. As in the toolkit n does not count the start, and ends at the longest stretch of all.

    Args:
        runs: One for each sequence.
        low: 108 in VOT 2015.
        high: 371 in VOT 2015.

    Returns:
        0 to 1; NaN if no stretch is as long as ``low``.
    """
    stretches = [stretch for run in runs for stretch in _stretches(run)]
    longest = max((len(overlaps) for overlaps, _ in stretches), default=0)
    lengths = torch.arange(1, longest + 1)
    table = torch.zeros(len(stretches), longest)
    counted = torch.zeros(len(stretches), longest, dtype=torch.bool)
    for i, (overlaps, failed) in enumerate(stretches):
        table[i, : len(overlaps)] = overlaps
        counted[i] = (lengths <= len(overlaps)) | failed
    curve = (table.cumsum(1) / lengths * counted).sum(0) / counted.sum(0)
    return curve[low - 1 : high].mean().item()


def write_vot(path: str | Path, run: SupervisedRun) -> None:
    """Write a trajectory as the VOT toolkit reads it (``SEQUENCE_001.txt``), whole or not at all.

    One line a frame: 1 at a start, 2 at a failure, 0 where skipped, else left, top, width and height.

    Raises:
        InputError: If the file cannot be written.
    """
    lines = [
        ",".join(f"{number:.4f}" for number in box) if outcome == TRACKED else str(outcome)
        for outcome, box in zip(run.outcomes.tolist(), run.boxes.tolist(), strict=True)
    ]
    with whole(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines))


def one_pass(tracker: Tracker, track: Track) -> Tensor:
    """Test a tracker as in OTB: started once, on the first known ground truth, and left alone.

    Returns:
        Boxes (T, 4): at the start the ground truth, before it NaN.
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
    """Share of frames with an overlap above each of the thresholds 0, 0.05, ... 1: (21,).

    Its mean is OTB's area under the curve, at most 20 / 21, since no overlap is above 1.

    Args:
        overlaps: (T,); frames that are NaN, their ground truth being unknown, do not count.
    """
    thresholds = torch.arange(21, dtype=overlaps.dtype) / 20
    return (overlaps[~overlaps.isnan()] > thresholds[:, None]).to(overlaps.dtype).mean(1)


def centre_distance(boxes: Tensor, truth: Tensor) -> Tensor:
    """Distance of the centres in pixels: (..., 4) and (..., 4) to (...); NaN where the truth is, infinite for NaN."""
    centres, truth_centres = (box[..., :2] + box[..., 2:] / 2 for box in (boxes, truth))
    distances = torch.linalg.vector_norm(centres - truth_centres, dim=-1)
    return distances.nan_to_num(torch.inf).masked_fill(truth.isnan().any(-1), torch.nan)


def precision_curve(distances: Tensor) -> Tensor:
    """Share of frames whose centre is at most 0, 1, ... 50 pixels off: (51,). OTB's precision is number 20.

    Args:
        distances: (T,), of ``centre_distance``; frames that are NaN do not count.
    """
    thresholds = torch.arange(51)
    return (distances[~distances.isnan()] <= thresholds[:, None]).to(distances.dtype).mean(1)


def _span(boxes: Tensor, bounds: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Upper left and lower right corners, each (..., 2)."""
    start, size = boxes.split(2, -1)
    end = start + size
    if bounds is not None:
        limit = torch.tensor(bounds[::-1]).to(boxes)
        start, end = (point.clamp(min=torch.zeros_like(limit), max=limit) for point in (start, end))
    return start, end


def _cut(polygon: list, start: Sequence[float], end: Sequence[float]) -> list:
    """The part of a convex polygon within a box (Sutherland and Hodgman 1974): one side of the box after the other.

    What only touches the box is outside of it, so that the overlap is then exactly 0.
    """
    for axis in (0, 1):
        for limit, sign in ((start[axis], 1), (end[axis], -1)):
            former, polygon = polygon, []
            for p, q in pairwise(former[-1:] + former):
                inside_p, inside_q = sign * (p[axis] - limit), sign * (q[axis] - limit)
                if (inside_p > 0) != (inside_q > 0):
                    share = inside_p / (inside_p - inside_q)
                    polygon.append([a + share * (b - a) for a, b in zip(p, q, strict=True)])
                if inside_q > 0:
                    polygon.append(q)
    return polygon


def _area(polygon: list) -> float:
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in pairwise(polygon[-1:] + polygon))) / 2


def _stretches(run: SupervisedRun) -> Iterator[tuple[Tensor, bool]]:
    """The overlaps after each start, and whether a failure follows them."""
    failures = run.failures
    for i, start in enumerate(run.starts):
        failed = i < len(failures)
        overlaps = run.overlaps[start + 1 : failures[i] if failed else None]
        yield overlaps[~overlaps.isnan()], failed
