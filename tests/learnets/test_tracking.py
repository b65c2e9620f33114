import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.cli import main
from lightning_meta.drawing.files import write_mp4
from lightning_meta.errors import InputError
from lightning_meta.learnets.tracker import EXEMPLAR_SIZE
from lightning_meta.learnets.tracking import LearnetTracking
from lightning_meta.learnets.tracking_data import (
    Triplets,
    TripletSet,
    augment,
    from_first_box,
    object_crop,
    own_video,
    split_by_video,
)
from lightning_meta.learnets.tracking_figures import triplet_sheet, with_boxes
from lightning_meta.running.segments import Segment
from lightning_meta.sources.tracks import Track
from lightning_meta.sources.video_files import read_frames
from tests.conftest import arguments

SEGMENT = Segment(0, 0, 1, last=True)
NAME = "learnet_tracking"


def red_square(name: str = "red", frames: int = 60, colour: int = 0) -> Track:
    """A square of 20 pixels that moves over grey."""

    def frame(t: int) -> torch.Tensor:
        picture = torch.full((3, 120, 160), 90, dtype=torch.uint8)
        picture[:, 40:60, 30 + t : 50 + t] = 0
        picture[colour, 40:60, 30 + t : 50 + t] = 250
        return picture

    boxes = torch.tensor([[30.0 + t, 40, 20, 20] for t in range(frames)])
    return Track(name, boxes, frame)


def middle(picture: torch.Tensor) -> torch.Tensor:
    """Centre of the red pixels, (x, y), in pixels from the image's centre."""
    y, x = (picture[0].float() > picture[1].float() + 0.2 * picture.float().max()).nonzero().float().mean(0)
    return torch.stack([x, y]) - (picture.shape[-1] - 1) / 2


def test_the_object_lies_in_the_middle_of_an_exemplar_and_at_the_offset_of_a_search():
    exemplar = torch.from_numpy(object_crop(red_square(), 3, np.zeros(2), EXEMPLAR_SIZE))
    assert exemplar.shape == (3, 127, 127)
    assert middle(exemplar).abs().max() < 0.6
    red = exemplar[0] > exemplar[1] + 50
    assert red.any(0).sum() == pytest.approx(127 / 2, abs=1.5)  # an exemplar's side is twice the object's
    search = torch.from_numpy(object_crop(red_square(), 3, np.array([30.0, -12.0]), 255))
    torch.testing.assert_close(middle(search), torch.tensor([30.0, -12.0]), atol=0.6, rtol=0)


def test_a_triplet_is_a_function_of_seed_and_number():
    videos = [red_square(str(i), colour=i % 3) for i in range(5)]
    one, again = (TripletSet(videos, "train", positives=0.75, augment=True) for _ in range(2))
    for index in (0, 7, 4):
        a, b = one[index, SEGMENT][0], again[index, SEGMENT][0]
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    other = TripletSet(videos, "train", seed=1, positives=0.75)[0, SEGMENT][0]
    assert not np.array_equal(one[0, SEGMENT][0][3], other[3])


def test_positives_are_near_and_negatives_are_of_another_video():
    seen = []

    def spied(name: str, colour: int) -> Track:
        video = red_square(name, 100, colour)
        return Track(name, video.boxes, lambda t: seen.append((name, t)) or video.frame(t))

    videos = [spied("red", 0), spied("green", 1), spied("blue", 2)]
    triplets, labels = TripletSet(videos, "train", positives=0.75, max_distance=9), []
    for index in range(120):
        seen.clear()
        label = triplets[index, SEGMENT][0][2]
        (video, t), (other, u) = seen
        labels.append(label)
        assert (video == other) == (label > 0)
        assert label < 0 or abs(t - u) <= 9
    assert 0.6 < np.mean(np.array(labels) > 0) < 0.9
    assert {abs(o) <= 48 for index in range(20) for o in triplets[index, SEGMENT][0][3]} == {True}


def test_frames_without_a_box_are_passed_over():
    video = red_square(frames=12)
    video.boxes[:7] = math.nan
    used = []
    spied = Track("red", video.boxes, lambda t: used.append(t) or video.frame(t))
    triplets = TripletSet([spied], "test")
    for index in range(20):
        triplets[index, SEGMENT]
    assert set(used) == set(range(7, 12))
    assert torch.equal(from_first_box(spied).box, video.boxes[7])
    assert len(list(from_first_box(spied).frames())) == 5


def test_one_video_has_no_negatives():
    with pytest.raises(InputError, match="at least 2"):
        TripletSet([red_square()], "train", positives=0.75)


def test_changes_move_the_object_by_what_the_offset_says():
    samples = [TripletSet([red_square()], "train", augment=True)[i, SEGMENT] for i in range(6)]
    batch = Triplets.collate(samples)
    ready = batch.prepare()
    assert ready.changes is None
    assert not torch.equal(ready.offset, batch.offset)
    for search, offset, change in zip(ready.searches, ready.offset, batch.changes[:, 1], strict=True):
        if change[6] > 0.3:  # otherwise it is not red enough to find
            torch.testing.assert_close(middle(search), offset, atol=1.0, rtol=0)


def test_no_change_changes_nothing():
    pictures = torch.rand(2, 3, 31, 31)
    none = torch.tensor([1.0, 1, 0, 0, 0, 1, 1]).expand(2, 7)
    torch.testing.assert_close(augment(pictures, none), pictures, atol=1e-4, rtol=0)
    grey = augment(pictures, torch.tensor([1.0, 1, 0, 0, 0, 1, 0]).expand(2, 7))
    torch.testing.assert_close(grey[:, 0], grey[:, 2], atol=1e-5, rtol=0)


def test_objects_of_one_video_are_on_one_side():
    videos = [red_square(f"part/video{i // 2}/{i % 2}", 2) for i in range(40)]
    train, val = split_by_video(videos)
    assert len(val) == 4
    assert len(train) == 36
    names = [{video.name.rpartition("/")[0] for video in side} for side in (train, val)]
    assert not names[0] & names[1]


def test_a_video_needs_a_box_within_its_first_frame(tmp_path):
    write_mp4(tmp_path / "clip.mp4", [red_square().frame(t) for t in range(3)], fps=10)
    path = str(tmp_path / "clip.mp4")
    assert own_video(path, [30, 40, 20, 20]).name == "clip"
    with pytest.raises(InputError, match=r"--data\.box"):
        own_video(path, None)
    with pytest.raises(InputError, match="outside the frame of 160x120"):
        own_video(path, [200, 40, 20, 20])
    with pytest.raises(InputError, match="no area"):
        own_video(path, [30, 40, 0, 20])
    (tmp_path / "empty").mkdir()
    for wrong in ("missing.mp4", "empty"):
        with pytest.raises(InputError, match=wrong):
            own_video(str(tmp_path / wrong), [30, 40, 20, 20])


def test_predict_follows_the_users_box(tmp_path):
    """Two squares pass each other. One training step leaves the network random, but it finds plain squares."""
    main(["fit", *arguments(NAME, tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1")])
    pictures, written = tmp_path / "my clip", tmp_path / NAME / "predictions"
    pictures.mkdir()
    squares = [[(20 + 3 * t, 30) for t in range(20)], [(120 - 3 * t, 70) for t in range(20)]]
    for t in range(20):
        picture = np.full((120, 160, 3), 90, np.uint8)
        for colour, square in enumerate(squares):
            x, y = square[t]
            picture[y : y + 20, x : x + 20] = 250 * np.eye(3)[colour + 1]  # green, blue
        Image.fromarray(picture).save(pictures / f"{t:02d}.png")
    options = arguments(NAME, tmp_path, f"--data.video={pictures}")
    for square in squares:
        start = [*square[0], 20, 20]
        main(["predict", *options, f"--data.box={start}"])
        boxes = np.loadtxt(written / "my clip.txt", delimiter=",")
        assert boxes.shape == (20, 4)
        assert boxes[0].tolist() == start
        assert np.abs(boxes[:, :2] - square).max() < 6  # of 57 pixels that it moves
        drawn = list(read_frames(written / "my clip.mp4"))
        assert [frame.shape for frame in drawn] == [(3, 120, 160)] * 20
        y, x = ((drawn[-1][0] > 150) & (drawn[-1][1] < 100)).nonzero().double().mean(0).tolist()  # the red frame
        assert [x, y] == pytest.approx((boxes[-1, :2] + 9.5).tolist(), abs=8)
    with pytest.raises(SystemExit, match="outside the frame"):
        main(["predict", *options, "--data.box=[300,40,20,20]"])


def test_test_writes_vot_results_and_measures(tmp_path):
    sequence = tmp_path / "sequences" / "red"
    sequence.mkdir(parents=True)
    video = red_square(frames=14)
    for t in range(14):
        Image.fromarray(video.frame(t).movedim(0, -1).numpy()).save(sequence / f"{t:08d}.jpg")
    np.savetxt(sequence / "groundtruth.txt", video.boxes.numpy(), delimiter=",")
    options = arguments(NAME, tmp_path, f"--data.sequences={sequence.parent}", "--trainer.max_steps=1")
    main(["fit", *options, "--trainer.val_check_interval=1"])
    lines = (tmp_path / NAME / "vot" / "red.txt").read_text().splitlines()
    assert len(lines) == 14
    assert lines[0] == "1"
    record = json.loads((tmp_path / NAME / "results.json").read_text())
    assert record["data"].endswith("; 1 sequences of sequences/")
    further = {measure["measure"]: measure for measure in record["further"]}
    assert {"VOT accuracy", "VOT failures", "OTB success", "OTB precision"} <= further.keys()
    still = next(iter(record["baselines"]))
    overlaps = [max(20 - t, 0) / (20 + min(t, 20)) for t in range(1, 14)]  # of two squares that move apart
    assert further["VOT accuracy"]["baselines"][still] == pytest.approx(np.mean(overlaps[9:]), abs=1e-5)
    assert further["OTB precision"]["baselines"][still] == 1
    expected = np.mean([np.mean([o > threshold / 20 for o in overlaps]) for threshold in range(21)])
    assert further["OTB success"]["baselines"][still] == pytest.approx(expected, abs=1e-5)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit, match="no sequences"):
        main(["test", *options, f"--data.sequences={tmp_path / 'nothing'}"])


@pytest.mark.parametrize("variant", ["siamese", "unshared", "factorised", "learnet"])
def test_every_variant_learns_a_repeated_batch(variant):
    torch.manual_seed(0)
    module = LearnetTracking(variant, "D", "D", balanced=True)
    triplets = TripletSet(
        [red_square(str(i), colour=i % 3) for i in range(3)], "train", search_size=239, positives=0.75
    )
    batch = Triplets.collate([triplets[i, SEGMENT] for i in range(4)]).prepare()
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.02, momentum=0.9), []
    for _ in range(8):
        loss = module.loss(module(batch)[0], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_pictures_are_drawn():
    sheet = triplet_sheet(
        torch.full((2, 3, 127, 127), 0.5),
        torch.full((2, 3, 255, 255), 0.5),
        torch.rand(2, 17, 17),
        torch.randn(2, 48, 5, 5),
        [torch.tensor([8.0, 0.0]), None],
    )
    assert sheet.dtype == torch.uint8
    assert sheet.shape[1] > 2 * 255
    green = (sheet[1].int() - sheet[0].int()) > 150
    assert green.any()  # the object's ring, in the first row only
    assert not green[sheet.shape[1] // 2 + 30 :].any()
    frame = torch.zeros(3, 60, 80, dtype=torch.uint8)
    (drawn,) = with_boxes([frame], [torch.tensor([-10.0, 20, 50, 20])])
    assert drawn[0, 20, :40].eq(230).all()
    assert drawn[:, :19].eq(0).all()


def test_a_video_can_be_read_twice():
    video = from_first_box(red_square(frames=3))
    assert all(torch.equal(a, b) for a, b in zip(video.frames(), video.frames(), strict=True))
