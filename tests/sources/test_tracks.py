import math
import pickle

import pytest
import torch
from PIL import Image

from lightning_meta.sources import image_files, tracks
from lightning_meta.sources.tracks import (
    got10k,
    has_got10k,
    has_imagenet_vid,
    imagenet_vid,
    moving_objects,
    own_box,
    sequences,
    upright,
)
from tests.conftest import refused


def frames(folder, count, first=1, digits=8, suffix="jpg", size=(40, 30)):
    """Write grey frames; frame t has the value 10 t."""
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(count):
        Image.new("RGB", size, (10 * t,) * 3).save(folder / f"{t + first:0{digits}}.{suffix}", "JPEG")


def is_frame(frame, t, shape=(3, 30, 40)):
    return frame.shape == shape and frame.dtype == torch.uint8 and bool(((frame.float() - 10 * t).abs() <= 1).all())


POLYGON = "10,5,20,5,20,25,10,25"  # upright, 10 by 20


@pytest.mark.parametrize("place", ["", "color"])
def test_a_vot_sequence(tmp_path, place):
    folder = tmp_path / "vot" / "bag"
    frames(folder / place, 3)
    (folder / "groundtruth.txt").write_text(f"{POLYGON}\n12,9,16,12,12,15,8,12\nnan,nan,nan,nan,nan,nan,nan,nan\n")
    (folder / "groundtruth_rect.txt").write_text("1,1,5,5\n" * 3)  # VOT's file takes precedence
    (track,) = sequences(tmp_path)
    assert (track.name, len(track)) == ("vot/bag", 3)
    assert track.corners.shape == (3, 4, 2)
    assert track.corners[0].tolist() == [[10, 5], [20, 5], [20, 25], [10, 25]]
    assert track.boxes.dtype == torch.float32
    assert track.boxes[0].tolist() == [9.5, 4.5, 11, 21]
    width, height = 8 * math.sqrt(0.5) + 1, 6 * math.sqrt(0.5) + 1  # a rhombus fills half of its bounding box
    torch.testing.assert_close(track.boxes[1], torch.tensor([12 - width / 2, 12 - height / 2, width, height]))
    assert track.boxes[2].isnan().all()
    assert all(is_frame(track.frame(t), t) for t in (2, 0, 1))


def test_upright_is_the_formula_for_rotated_rectangles():
    generator = torch.Generator().manual_seed(0)
    centre, size, angle = (torch.rand(20, n, generator=generator, dtype=torch.float64) for n in (2, 2, 1))
    half = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * size[:, None] * 20
    cos, sin = angle.cos(), angle.sin()
    corners = torch.stack([half[..., 0] * cos - half[..., 1] * sin, half[..., 0] * sin + half[..., 1] * cos], -1)
    corners = corners + 100 * centre[:, None]
    for corner, box in zip(corners, upright(corners), strict=True):
        first = (corner[0] - corner[1]).norm() * (corner[1] - corner[2]).norm()
        (xmin, ymin), (xmax, ymax) = corner.min(0).values, corner.max(0).values
        s = (first / ((xmax - xmin) * (ymax - ymin))).sqrt()
        width, height = s * (xmax - xmin) + 1, s * (ymax - ymin) + 1
        x, y = corner.mean(0)
        torch.testing.assert_close(box, torch.stack([x - width / 2, y - height / 2, width, height]))


def test_a_vot_sequence_of_upright_boxes_is_taken_as_it_is(tmp_path):
    frames(tmp_path, 2)
    (tmp_path / "groundtruth.txt").write_text("10.5,5,10,20\n11,5,10,20\n")
    (track,) = sequences(tmp_path)
    assert track.name == tmp_path.name
    assert track.corners is None
    assert track.boxes.tolist() == [[10.5, 5, 10, 20], [11, 5, 10, 20]]


@pytest.mark.parametrize("between", [",", "\t", " ", ", "])
def test_otb_sequences_count_from_1_and_may_end_early(tmp_path, between):
    folder = tmp_path / "Jogging"
    frames(folder / "img", 4, digits=4)
    line = between.join(["5", "6", "10", "12"])
    (folder / "groundtruth_rect.1.txt").write_text(f"{line}\n{line}\n\n")
    (folder / "groundtruth_rect.2.txt").write_text(f"{line}\r\n{between.join('0000')}\r\n{line}\r\n")
    first, second = sequences(tmp_path)
    assert (first.name, second.name) == ("Jogging.1", "Jogging.2")
    assert first.boxes.tolist() == [[4, 5, 10, 12]] * 2
    assert second.boxes[:, 0].isnan().tolist() == [False, True, False]
    assert is_frame(second.frame(2), 2)
    with pytest.raises(IndexError):
        first.frame(2)


def test_otb_david_begins_at_frame_300(tmp_path):
    frames(tmp_path / "David" / "img", 1, first=300, digits=4)
    for t in (*range(1, 300), 301):
        (tmp_path / "David" / "img" / f"{t:04}.jpg").touch()
    (tmp_path / "David" / "groundtruth_rect.txt").write_text("5,6,10,12\n5,6,10,12\n")
    (track,) = sequences(tmp_path)
    assert is_frame(track.frame(0), 0)


def test_sequences_are_found_at_any_depth_by_links_too_but_not_twice(tmp_path):
    for name in ("vot/b", "vot/a", "c", ".hidden/d"):
        frames(tmp_path / "data" / name, 1)
        (tmp_path / "data" / name / "groundtruth.txt").write_text(POLYGON)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "data" / "vot")
    (tmp_path / "data" / "vot" / "back").symlink_to(tmp_path / "data")
    assert [track.name for track in sequences(tmp_path / "data")] == ["c", "vot/a", "vot/b"]
    assert [track.name for track in sequences(tmp_path / "elsewhere")] == ["a", "b"]
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert [track.name for track in sequences(tmp_path / "data")] == ["c", "link/a", "link/b", "vot/a", "vot/b"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("groundtruth.txt", "", ["empty"]),
        ("groundtruth.txt", "1,2,3\n" * 2, ["line 1", "'1,2,3'", "4 or 8 numbers"]),
        ("groundtruth.txt", f"{POLYGON}\n1,2,3,4\n", ["line 2"]),
        ("groundtruth.txt", f"{POLYGON}\n{POLYGON[:-2]}inf\n", ["line 2"]),
        ("groundtruth.txt", f"{POLYGON}\n\x00ÿ\n", ["line 2"]),
        ("groundtruth.txt", f"{POLYGON}\n", ["1 boxes for 2 frames"]),
        ("groundtruth.txt", f"{POLYGON}\n" * 3, ["3 boxes for 2 frames"]),
        ("groundtruth.txt", "1,1,2,2,3,3,4,4\n" * 2, ["first box", "no area"]),
        ("groundtruth.txt", "nan,nan,nan,nan\n" * 2, ["first box", "no area"]),
        ("groundtruth_rect.txt", "5,5,9\n", ["line 1", "4 numbers"]),
        ("groundtruth_rect.txt", "5,5,9,9\n" * 3, ["3 boxes for 2 frames"]),
        ("groundtruth_rect.txt", "5,5,0,9\n", ["first box", "no area"]),
        ("groundtruth_rect.txt", "41,5,9,9\n", ["first box", "40,4,9,9", "40x30"]),
        ("groundtruth_rect.txt", "5,-8,9,9\n", ["first box", "outside"]),
    ],
)
def test_refuses_damaged_ground_truth(tmp_path, file, content, words):
    frames(tmp_path / "a", 2)
    (tmp_path / "a" / file).write_text(content, encoding="latin-1")
    refused(lambda: sequences(tmp_path), str(tmp_path / "a" / file), *words)


def test_refuses_no_sequences_and_no_frames(tmp_path):
    refused(lambda: sequences(tmp_path), "no sequences", "groundtruth.txt")
    refused(lambda: sequences(tmp_path / "none"), "no sequences")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "groundtruth.txt").write_text(POLYGON)
    refused(lambda: sequences(tmp_path), "holds no PNG, JPG or WebP")
    (tmp_path / "a" / "00000001.jpg").write_bytes(b"no picture")
    refused(lambda: sequences(tmp_path), "00000001.jpg is not an image")


def got10k_video(root, name="GOT-10k_Train_000001", absent="0\n1\n0\n"):
    video = root / "GOT-10k" / "train" / name
    frames(video, 3)
    (video / "groundtruth.txt").write_text("1.5,2,3,4\n5,6,7,8\n9,10,11,12\n")
    (video / "absence.label").write_text(absent)
    return video


def test_got10k(tmp_path, monkeypatch):
    assert not has_got10k(tmp_path)
    for name in ("GOT-10k_Train_000002", "GOT-10k_Train_000001"):
        got10k_video(tmp_path, name)
    (tmp_path / "GOT-10k" / "train" / "list.txt").touch()
    assert has_got10k(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tracks, "read_image", pytest.fail)  # frames are opened on demand only
        first, second = got10k(tmp_path)
    assert (first.name, second.name) == ("GOT-10k_Train_000001", "GOT-10k_Train_000002")
    assert first.boxes[[0, 2]].tolist() == [[1.5, 2, 3, 4], [9, 10, 11, 12]]
    assert first.boxes[1].isnan().all()
    assert is_frame(first.frame(2), 2)


def test_got10k_refuses_what_is_not_whole(tmp_path):
    refused(lambda: got10k(tmp_path, "val"), "GOT-10k/val is missing")
    video = got10k_video(tmp_path, absent="0\n0\n")
    refused(lambda: got10k(tmp_path), str(video), "3 boxes and 2 absences for 3 frames")
    (video / "absence.label").unlink()
    refused(lambda: got10k(tmp_path), "absence.label cannot be read")
    (tmp_path / "GOT-10k" / "val").mkdir()
    refused(lambda: got10k(tmp_path, "val"), "holds no videos")


def annotation(*objects):
    boxes = "".join(
        f"<object><trackid>{track}</trackid><name>n01</name><bndbox><xmax>{right}</xmax><xmin>{x}</xmin>"
        f"<ymax>{bottom}</ymax><ymin>{y}</ymin></bndbox><occluded>0</occluded></object>"
        for track, x, y, right, bottom in objects
    )
    return f"<annotation><folder>a/b</folder><size><width>40</width><height>30</height></size>{boxes}</annotation>"


def vid_video(root, *annotations, video="train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_00000000"):
    frames(root / "ILSVRC2015" / "Data" / "VID" / video, len(annotations), first=0, digits=6, suffix="JPEG")
    folder = root / "ILSVRC2015" / "Annotations" / "VID" / video
    folder.mkdir(parents=True)
    for t, text in enumerate(annotations):
        (folder / f"{t:06}.xml").write_text(text)
    return folder


def test_imagenet_vid(tmp_path, monkeypatch):
    assert not has_imagenet_vid(tmp_path)
    seen = annotation((0, 1, 2, 11, 22)), annotation((0, 2, 2, 12, 22), (1, 5, 6, 15, 9)), annotation()
    vid_video(tmp_path, *seen)
    vid_video(tmp_path, annotation((3, 1, 2, 1, 22)), video="val/ILSVRC2015_val_00000000")
    assert has_imagenet_vid(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tracks, "read_image", pytest.fail)
        first, second = imagenet_vid(tmp_path)
        (val,) = imagenet_vid(tmp_path, "val")
    assert first.name == "ILSVRC2015_VID_train_0000/ILSVRC2015_train_00000000/0"
    assert first.boxes[:2].tolist() == [[1, 2, 10, 20], [2, 2, 10, 20]]
    assert second.boxes[1].tolist() == [5, 6, 10, 3]
    assert first.boxes.isnan().all(1).tolist() == [False, False, True]
    assert second.boxes.isnan().all(1).tolist() == [True, False, True]
    assert all(is_frame(second.frame(t), t) for t in range(3))
    assert val.name == "ILSVRC2015_val_00000000/3"
    assert val.boxes.isnan().all()  # without an area


LAUGHS = '<!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>' + annotation(("&b;", 1, 2, 3, 4))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (annotation((0, 1, 2, 11, 22))[:-9].encode(), "damaged"),
        (b"", "damaged"),
        (annotation((0, 1, "", 11, 22)).encode(), "damaged"),
        (annotation(("", 1, 2, 11, 22)).encode(), "damaged"),
        (b"<annotation><object><trackid>0</trackid></object></annotation>", "damaged"),
        (LAUGHS.encode(), "document type"),
        (LAUGHS.encode("utf-16"), "document type"),
    ],
)
def test_imagenet_vid_refuses_damaged_and_suspicious_annotations(tmp_path, content, word):
    folder = vid_video(tmp_path, annotation((0, 1, 2, 11, 22)))
    (folder / "000000.xml").write_bytes(content)
    refused(lambda: imagenet_vid(tmp_path), str(folder / "000000.xml"), word)


def test_imagenet_vid_refuses_what_is_missing(tmp_path):
    vid_video(tmp_path, annotation())
    refused(lambda: imagenet_vid(tmp_path), "no annotated objects")
    refused(lambda: imagenet_vid(tmp_path, "val"), "Annotations/VID/val is missing")
    (tmp_path / "ILSVRC2015" / "Data").rename(tmp_path / "Data")
    refused(lambda: imagenet_vid(tmp_path), "Data/VID/train is missing")


@pytest.mark.parametrize("box", ["10,5,20,10", " 10, 5 ,20.0,1e1", [10, 5, 20, 10], torch.tensor([10.0, 5, 20, 10])])
def test_own_box(box):
    checked = own_box(box, height=30, width=40)
    assert checked.dtype == torch.float32
    assert checked.tolist() == [10, 5, 20, 10]


def test_own_box_may_reach_beyond_the_frame():
    assert own_box("-5,25,10,10", 30, 40).tolist() == [-5, 25, 10, 10]


@pytest.mark.parametrize(
    ("box", "word"),
    [
        ("", "four numbers"),
        ("1,2,3", "four numbers"),
        ("1,2,3,4,5", "four numbers"),
        ("1,2,3,x", "four numbers"),
        ("1,2,3,nan", "four numbers"),
        ("1,2,3,1e99", "four numbers"),
        (7, "four numbers"),
        ([1, 2, 3, None], "four numbers"),
        ("1,2,0,4", "no area"),
        ("1,2,3,-4", "no area"),
        ("40,2,3,4", "outside"),
        ("1,30,3,4", "outside"),
        ("-3,2,3,4", "outside"),
        ("1,-4,3,4", "outside"),
    ],
)
def test_own_box_refuses(box, word):
    refused(lambda: own_box(box, height=30, width=40), "the box", word)


def test_moving_objects_are_a_function_of_seed_and_index():
    track = moving_objects(3, seed=1, frames=5, size=64)
    assert len(track) == 5
    assert track.boxes.dtype == torch.float32
    shown = [track.frame(t) for t in range(5)]
    assert shown[0].shape == (3, 64, 64)
    assert shown[0].dtype == torch.uint8
    again = pickle.loads(pickle.dumps(moving_objects(3, seed=1, frames=5, size=64)))
    assert all(torch.equal(again.frame(t), shown[t]) for t in (4, 1, 0))  # frames are independent
    assert torch.equal(again.boxes, track.boxes)
    for other in (moving_objects(4, 1, 5, 64), moving_objects(3, 2, 5, 64)):
        assert not torch.equal(other.boxes, track.boxes)
        assert (other.frame(0).float() - shown[0].float()).abs().mean() > 5


@pytest.mark.parametrize("index", range(6))
def test_the_boxes_of_moving_objects_are_where_they_are(index, monkeypatch):
    black = {name: torch.zeros(3, 90, 90) for name in ("china", "flower", "grace_hopper", "minduka")}
    monkeypatch.setattr(tracks, "_photographs", lambda: black)
    track = moving_objects(index, seed=0, frames=30, size=120)
    second, first = track.frame.objects
    first.patch, second.patch = first.patch + 200, second.patch + 0
    assert track.boxes[:, :2].min() >= 0
    assert (track.boxes[:, :2] + track.boxes[:, 2:]).max() <= 120
    for t in (0, 13, 29):
        y, x = (track.frame(t).float().mean(0) > 60).nonzero().T
        x, y, w, h = x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1
        assert (track.boxes[t] - torch.tensor([x, y, w, h])).abs().max() < 2


def test_moving_objects_move_smoothly_and_change_their_size():
    boxes = torch.stack([moving_objects(i, seed=0).boxes for i in range(20)])
    step = (boxes[:, 1:] - boxes[:, :-1])[..., :2].norm(dim=-1)
    assert 2 < step.mean() < 8  # pixels of 240 from frame to frame
    assert step.max() < 16
    size = boxes[..., 2:].prod(-1).sqrt()
    assert 1.3 < (size.amax(1) / size.amin(1)).mean() < 2
    assert 20 < size.min() < size.max() < 110


def test_moving_objects_leave_the_photographs_alone():
    before = {name: picture.clone() for name, picture in tracks._photographs().items()}
    moving_objects(0, seed=0).frame(0)
    for name, picture in image_files.bundled_photographs().items():
        assert torch.equal(before[name], picture)
        assert torch.equal(tracks._photographs()[name], picture)


def test_real_sequences(real_data):
    if not (real_data / "tracking").is_dir():
        pytest.skip("no tracking/ among the real data")
    found = {track.name: track for track in sequences(real_data / "tracking")}
    lengths = {name: len(track) for name, track in found.items()}
    otb = {"otb/Basketball": 725, "otb/David": 471, "otb/Dudek20": 20}
    assert lengths == {"davis/car-shadow": 40, "vot/bag": 196} | otb
    assert found["otb/Basketball"].boxes[0].tolist() == [197, 213, 34, 81]
    assert found["vot/bag"].corners.shape == (196, 4, 2)
    for track in found.values():
        H, W = track.frame(len(track) - 1).shape[1:]
        assert not track.boxes.isnan().any()
        x, y = (track.boxes[:, :2] + track.boxes[:, 2:] / 2).unbind(1)
        assert ((x > 0) & (x < W) & (y > 0) & (y < H)).all()
