import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nan

from lightning_meta.errors import InputError
from lightning_meta.learnets.protocols import (
    BURN_IN,
    FAILURE,
    SKIP,
    SKIPPED,
    START,
    TRACKED,
    SupervisedRun,
    centre_distance,
    one_pass,
    overlap,
    polygon_overlap,
    precision_curve,
    success_curve,
    supervised,
    vot_summary,
    write_vot,
)
from lightning_meta.sources.tracks import Track

BOX = [10.0, 10, 10, 10]
HALF = [15.0, 10, 10, 10]  # overlaps BOX by a third
AWAY = [40.0, 40, 10, 10]
UNKNOWN = [nan] * 4


class Scripted:
    """Predicts ``script[t]`` on frame t, else ``usual``; records its starts and the frames it has seen."""

    def __init__(self, script=None, usual=BOX):
        self.script, self.usual = script or {}, usual
        self.starts, self.seen = {}, []

    def start(self, frame, box):
        self.starts[int(frame[0, 0, 0])] = box.tolist()

    def track(self, frame):
        self.seen.append(int(frame[0, 0, 0]))
        return torch.tensor(self.script.get(self.seen[-1], self.usual))


def still(frames, unknown=(), corners=None, box=BOX):
    """A track whose object does not move; frame t has the value t."""
    boxes = torch.tensor([box] * frames)
    boxes[list(unknown)] = nan
    return Track("still", boxes, lambda t: torch.full((3, 60, 80), t, dtype=torch.uint8), corners)


def lost_at(*frames):
    return Scripted(dict.fromkeys(frames, AWAY))


def rotated(centre, width, height, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    sides = torch.tensor([[width * cos, width * sin], [-height * sin, height * cos]], dtype=torch.float64)
    signs = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    return torch.tensor(centre, dtype=torch.float64) + signs @ sides / 2


def corners_of(box):
    left, top, width, height = box
    right, bottom = left + width, top + height
    return torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]])


@pytest.mark.parametrize(
    ("box", "bounds", "expected"),
    [
        ((5, 0, 10, 10), None, 1 / 3),
        ((0, 0, 10, 10), None, 1),
        ((2, 2, 5, 5), None, 1 / 4),
        ((10, 0, 10, 10), None, 0),  # touches
        ((3, 3, 0, 0), None, 0),
        ((12, 12, -4, -4), None, 0),
        ((0, 0, 10, 20), None, 1 / 2),
        ((0, 0, 10, 20), (10, 30), 1),  # the lower half is below the frame
        ((0, 0, 20, 10), (30, 10), 1),
        ((-10, 0, 20, 10), None, 1 / 2),
        ((-10, 0, 20, 10), (30, 30), 1),
        ((30, 30, 5, 5), (30, 30), 0),
        ((nan, 0, 10, 10), (30, 30), 0),
        ((0, 0, nan, 10), None, 0),
        ((math.inf, 0, math.inf, 10), None, 0),
    ],
)
def test_overlap_with_a_square(box, bounds, expected):
    box, truth = torch.tensor(box).float(), torch.tensor([0.0, 0, 10, 10])
    assert overlap(box, truth, bounds).item() == pytest.approx(expected)
    assert polygon_overlap(box, corners_of(truth), bounds) == pytest.approx(expected)
    assert polygon_overlap(box, corners_of(truth).flip(0), bounds) == pytest.approx(expected)
    if expected == 0:
        assert overlap(box, truth, bounds) == 0 == polygon_overlap(box, corners_of(truth), bounds)


def test_overlap_takes_any_batch_and_keeps_unknown_truth_unknown():
    truth = torch.tensor([BOX, UNKNOWN, [10, 10, 10, nan]])
    overlaps = overlap(torch.tensor([HALF, AWAY])[:, None], truth)
    assert overlaps.shape == (2, 3)
    assert overlaps[:, 0].tolist() == pytest.approx([1 / 3, 0])
    assert overlaps[:, 1:].isnan().all()
    assert overlap(torch.tensor(UNKNOWN), torch.tensor(UNKNOWN)).isnan()
    assert math.isnan(polygon_overlap(torch.tensor(BOX), torch.full((4, 2), nan)))
    outside = torch.tensor(AWAY)
    assert overlap(outside, outside, (30, 30)) == 0  # nothing is left of either


def test_overlap_with_a_rotated_square():
    box = torch.tensor([0.0, 0, 10, 10])
    side = 10 * math.sqrt(2)
    inscribed = rotated((5, 5), side / 2, side / 2, math.pi / 4)  # its corners are the midpoints of the box's sides
    assert polygon_overlap(box, inscribed) == pytest.approx(1 / 2, abs=1e-12)
    around = rotated((5, 5), side, side, math.pi / 4)  # the box's corners are the midpoints of its sides
    assert polygon_overlap(box, around) == pytest.approx(1 / 2, abs=1e-12)
    at_corner = rotated((0, 0), side / 2, side / 2, math.pi / 4)  # a quarter, 12.5, of its 50 is in the box
    assert polygon_overlap(box, at_corner) == pytest.approx(12.5 / (100 + 50 - 12.5), abs=1e-12)
    assert polygon_overlap(box, at_corner, (20, 20)) == pytest.approx(12.5 / 100, abs=1e-12)
    octagon = rotated((5, 5), 10, 10, math.pi / 4)  # two squares of the same size: a regular octagon
    assert polygon_overlap(box, octagon) == pytest.approx(1 / math.sqrt(2), abs=1e-6)  # OpenCV: float32
    beside = rotated((14, 14), side / 2, side / 2, math.pi / 4)  # only the bounding boxes overlap
    assert polygon_overlap(box, beside) == 0


def clip(polygon, start, end):
    """Sutherland and Hodgman (1974): cut a convex polygon by one side of a box after the other."""
    for axis, limit, sign in [(0, start[0], 1), (0, end[0], -1), (1, start[1], 1), (1, end[1], -1)]:
        polygon, former = [], polygon
        for p, q in pairwise(former[-1:] + former):
            inside_p, inside_q = sign * (p[axis] - limit), sign * (q[axis] - limit)
            if (inside_p > 0) != (inside_q > 0):
                share = inside_p / (inside_p - inside_q)
                polygon.append([a + share * (b - a) for a, b in zip(p, q, strict=True)])
            if inside_q > 0:
                polygon.append(q)
    return polygon


def area(polygon):
    return abs(sum(p[0] * q[1] - q[0] * p[1] for p, q in pairwise(polygon[-1:] + polygon))) / 2


@pytest.mark.parametrize("far", [0, 4000])
def test_overlap_with_rotated_rectangles_is_that_of_clipping_in_float64(far):
    random, failures = np.random.default_rng(0), 0
    for _ in range(500):
        limit = far + 18
        corners = rotated(far + random.uniform(0, 20, 2), *random.uniform(2, 12, 2), random.uniform(0, math.pi))
        box = torch.tensor([*(far + random.uniform(-5, 20, 2)), *random.uniform(2, 12, 2)])
        start, end = (point.clamp(0, limit).tolist() for point in (box[:2], box[:2] + box[2:]))
        polygon = clip(corners.tolist(), (0, 0), (limit, limit))
        both = area(clip(polygon, start, end))
        union = math.prod(e - s for s, e in zip(start, end, strict=True)) + area(polygon) - both
        expected = both / union if union > 0 else 0
        found = polygon_overlap(box, corners, (limit, limit))
        assert found == pytest.approx(expected, abs=1e-6)
        assert (found == 0) == (expected == 0)
        failures += found == 0
    assert 50 < failures < 450


@pytest.mark.parametrize("seed", range(4))
def test_overlap_with_rotated_rectangles_is_what_points_at_random_say(seed):
    def draw(count, low, high):
        return low + (high - low) * torch.rand(count, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    centre, size, box = draw(2, 5, 15), draw(2, 6, 20), torch.cat([draw(2, -5, 8), draw(2, 8, 15)])
    angle = draw(1, 0, math.pi).item()
    corners = rotated(centre.tolist(), *size.tolist(), angle)
    n, bounds = 400_000, (20, 16)
    points = torch.stack([draw(n, 0, bounds[1]), draw(n, 0, bounds[0])], 1)
    in_box = ((points > box[:2]) & (points < box[:2] + box[2:])).all(1)
    sides = corners.roll(-1, 0) - corners
    offsets = points[:, None] - corners
    in_polygon = (sides[:, 0] * offsets[..., 1] - sides[:, 1] * offsets[..., 0] > 0).all(1)
    expected = (in_box & in_polygon).sum() / (in_box | in_polygon).sum()
    assert 0.02 < expected < 0.98
    assert polygon_overlap(box, corners, bounds) == pytest.approx(expected.item(), abs=0.005)


def test_a_failure_is_followed_by_a_start_five_frames_later():
    tracker = lost_at(7)
    run = supervised(tracker, still(20))
    assert run.outcomes.tolist() == [START] + [TRACKED] * 6 + [FAILURE] + [SKIPPED] * 4 + [START] + [TRACKED] * 7
    assert (run.starts, run.failures) == ([0, 12], [7])
    assert tracker.starts == {0: BOX, 12: BOX}
    assert tracker.seen == [*range(1, 8), *range(13, 20)]
    assert run.boxes[[0, 5, 7, 12]].tolist() == [BOX, BOX, AWAY, BOX]
    assert run.boxes[8:12].isnan().all()
    assert run.overlaps[[0, *range(8, 13)]].isnan().all()
    assert run.overlaps[[1, 7, 13]].tolist() == [1, 0, 1]
    assert SKIP == 5


@pytest.mark.parametrize(("failure", "starts"), [(14, [0, 19]), (15, [0]), (19, [0])])
def test_a_failure_in_the_last_five_frames_ends_the_run(failure, starts):
    run = supervised(lost_at(failure), still(20))
    assert (run.starts, run.failures) == (starts, [failure])


def test_failing_at_once_and_again():
    run = supervised(lost_at(*range(100)), still(20))
    assert (run.starts, run.failures) == ([0, 6, 12, 18], [1, 7, 13, 19])
    assert math.isnan(run.accuracy)


@pytest.mark.parametrize("lost", [UNKNOWN, [nan, 10.0, 10, 10], [10.0, 10, 0, 0], [10.0, 60, 10, 10]])
def test_a_box_that_is_no_box_or_outside_the_frame_is_a_failure(lost):
    assert supervised(Scripted({7: lost}), still(20)).failures == [7]


def test_the_burn_in_counts_the_start():
    assert BURN_IN == 10
    script = dict.fromkeys(range(1, 10), HALF)
    assert supervised(Scripted(script), still(20)).accuracy == 1
    assert supervised(Scripted(script | {10: HALF}), still(20)).accuracy == pytest.approx(1 - 2 / 3 / 10)
    assert supervised(Scripted(usual=HALF), still(11)).accuracy == pytest.approx(1 / 3)  # frame 10 alone
    assert math.isnan(supervised(Scripted(), still(10)).accuracy)


def test_accuracy_leaves_out_failures_skipped_frames_and_every_burn_in():
    script = {10: HALF, 11: HALF, 12: AWAY} | {t: [10.0, 10, 5, 10] for t in range(18, 27)} | {28: HALF}
    run = supervised(Scripted(script), still(30))
    assert run.starts == [0, 17]
    assert run.accuracy == pytest.approx((1 / 3 + 1 / 3 + 1 + 1 / 3 + 1) / 5)  # frames 10, 11, 27, 28, 29


def test_where_the_truth_is_unknown_nothing_starts_fails_or_counts():
    tracker = Scripted({4: AWAY, 20: AWAY, 28: AWAY} | dict.fromkeys(range(29, 50), HALF))
    run = supervised(tracker, still(40, unknown=[0, 1, 20, 33, 34, 36]))
    assert (run.starts, run.failures) == ([2, 9, 35], [4, 28])
    assert run.outcomes[:2].tolist() == [SKIPPED] * 2
    assert run.outcomes[20] == TRACKED
    assert run.overlaps[[20, 36]].isnan().all()
    assert run.accuracy == 1
    run = supervised(tracker, still(5, unknown=range(5)))
    assert (run.starts, run.failures, math.isnan(run.accuracy)) == ([], [], True)


def test_rotated_truth_is_what_counts_where_there_is_one():
    diamond = rotated((15, 15), 5 * math.sqrt(2), 5 * math.sqrt(2), math.pi / 4)  # half of BOX
    track = still(20, corners=diamond.repeat(20, 1, 1))
    run = supervised(Scripted({14: [10.0, 10, 2, 2]}), track)  # in a corner of BOX, beside the diamond
    assert run.failures == [14]
    assert run.accuracy == pytest.approx(1 / 2)
    track.boxes[14], track.corners[14] = nan, 0  # four equal corners are an unknown truth
    run = supervised(Scripted(), track)
    assert (run.failures, run.overlaps[14].isnan().item()) == ([], True)


def test_both_are_cut_to_the_frame():
    box = [70.0, 10, 20, 10]  # the right half is outside of the 80 pixels
    for corners in (None, corners_of(box).expand(12, 4, 2)):
        track = still(12, corners=corners, box=box)
        assert supervised(Scripted(usual=[70.0, 10, 10, 10]), track).accuracy == 1


def test_summary_of_a_data_set():
    good = supervised(Scripted(), still(40))
    poor = supervised(Scripted({13: AWAY}, usual=HALF), still(20))  # counts frames 10 to 12
    lost = supervised(lost_at(*range(100)), still(15))
    summary = vot_summary([good, poor, lost])
    assert summary.accuracy == pytest.approx((40 * 1 + 20 / 3) / 60)
    assert summary.failures == 4
    assert math.isnan(vot_summary([lost]).accuracy)


def test_the_file_for_the_toolkit(tmp_path):
    path = tmp_path / "still_001.txt"
    write_vot(path, supervised(lost_at(1), still(3)))
    assert path.read_text() == "1\n2\n0\n"
    write_vot(path, supervised(Scripted({1: [1.5, -2, 1e3 / 3, 20], 2: AWAY}), still(9)))
    box = "10.0000,10.0000,10.0000,10.0000"
    assert path.read_text().splitlines() == ["1", "1.5000,-2.0000,333.3333,20.0000", *"200001", box]
    assert path.read_text().endswith("\n")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    run = SupervisedRun(torch.tensor([START]), torch.tensor([BOX]), torch.tensor([nan]))
    with pytest.raises(InputError, match="cannot write"):
        write_vot(tmp_path / "none" / "still_001.txt", run)


def test_one_pass_never_starts_again():
    tracker = lost_at(3, 4)
    boxes = one_pass(tracker, still(6))
    assert boxes.tolist() == [BOX, BOX, BOX, AWAY, AWAY, BOX]
    assert tracker.starts == {0: BOX}
    assert tracker.seen == [1, 2, 3, 4, 5]


def test_one_pass_starts_where_the_truth_begins():
    tracker = Scripted(usual=HALF)
    boxes = one_pass(tracker, still(5, unknown=[0, 1, 3]))
    assert boxes[:2].isnan().all()
    assert boxes[2:].tolist() == [BOX, HALF, HALF]
    assert tracker.starts == {2: BOX}


def test_success_curve_of_a_constant_box():
    track = still(5, unknown=[3])
    curve = success_curve(overlap(one_pass(Scripted(usual=HALF), track), track.boxes))
    assert curve.shape == (21,)
    assert curve[:7].tolist() == [1] * 7  # thresholds 0 to 0.3; frame 0 is given
    assert curve[7:20].tolist() == [0.25] * 13
    assert curve[20] == 0
    assert curve.mean().item() == pytest.approx((7 + 13 / 4) / 21)
    assert success_curve(torch.ones(3)).mean().item() == pytest.approx(20 / 21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_overlap_at_a_threshold_is_not_above_it(dtype):
    for k in range(21):
        curve = success_curve(torch.tensor([k / 20], dtype=dtype))
        assert curve.tolist() == [1] * k + [0] * (21 - k)
        assert curve.dtype == dtype
    assert success_curve(torch.tensor([nan])).isnan().all()
    assert success_curve(torch.tensor([0.0, 1e-6])).sum() == 0.5


def test_precision_curve_of_a_constant_box():
    track = still(6, unknown=[5])
    script = {1: [13.0, 14, 10, 10], 2: [0.0, 0, 30, 30], 3: [30.0, 10, 10, 10], 4: UNKNOWN}
    distances = centre_distance(one_pass(Scripted(script), track), track.boxes)
    assert distances[:4].tolist() == [0, 5, 0, 20]
    assert distances[4] > 50
    assert distances[5].isnan()
    curve = precision_curve(distances)
    assert curve.shape == (51,)
    assert curve.tolist() == pytest.approx([0.4] * 5 + [0.6] * 15 + [0.8] * 31)
