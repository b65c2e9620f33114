import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.cli import main
from lightning_meta.dynamic_filters.stereo_data import (
    Example,
    RandomCrops,
    RenderedPairs,
    StereoBatch,
    StereoPairsDataModule,
    small,
    squares,
)
from lightning_meta.running.segments import Segment
from lightning_meta.sources.stereo import Views, find_pairs
from tests.conftest import arguments

NAME = "dfn_stereo"
SEGMENT = Segment(0, 0, 1, last=True)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def drive(folder, count, size=(64, 200), disparity=False):
    """Write pairs: every pixel of left view i is 10 i, every pixel of the right view 1 more."""
    for i in range(count):
        save(folder / "image_2" / f"{i}.png", np.full(size, 10 * i, np.uint8))
        save(folder / "image_3" / f"{i}.png", np.full(size, 10 * i + 1, np.uint8))
        if disparity:
            save(folder / "disp_occ_0" / f"{i}.png", np.full(size, 512, np.uint16))


def levels(examples):
    return [int(example.views.left[0, 0]) for example in examples]


def highway(folder, train=20, test=6):
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        arrays[split] = random.integers(0, 256, (2, count, 1, 64, 64), dtype=np.uint8)
        with h5py.File(folder / f"highwayDriving_{split}.h5", "w") as file:
            file["highway_L"], file["highway_R"] = arrays[split]
    return arrays


def test_a_batch_has_zero_to_one_and_nan_for_the_unknown():
    left, right = np.full((2, 16, 16), [[[0]], [[255]]], np.uint8)
    truth = np.full((16, 16), 2.5, np.float32)
    batch = StereoBatch.collate(
        [(Example("a", Views(left, right)), SEGMENT), (Example("b", Views(right, left, None, truth), False), SEGMENT)]
    )
    assert batch.left.shape == batch.right.shape == batch.disparity.shape == (2, 1, 16, 16)
    assert batch.left.dtype == batch.disparity.dtype == torch.float32
    assert batch.left[:, 0, 0, 0].tolist() == [0, 1]
    assert batch.right[:, 0, 0, 0].tolist() == [1, 0]
    assert batch.disparity[0].isnan().all()
    assert (batch.disparity[1] == 2.5).all()
    assert batch.scored.tolist() == [True, False]


def test_drawn_pairs_are_functions_of_seed_split_and_number():
    pictures = [np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)]
    one, same, split, seed = (
        RenderedPairs(pictures, *key, size=16) for key in (("train", 1), ("train", 1), ("val", 1), ("train", 2))
    )
    for i in (5, 0, 5):
        assert (one[i, SEGMENT][0].views.left == same[i, SEGMENT][0].views.left).all()
    assert len({data[0, SEGMENT][0].views.left.tobytes() for data in (one, split, seed)}) == 3


@pytest.mark.parametrize("mirror", [False, True])
def test_windows_are_of_both_views_and_may_be_mirrored(mirror):
    row = np.arange(100, dtype=np.uint8)
    left = np.broadcast_to(row, (64, 100))
    data = RandomCrops([Views(left, left + 2), Views(left + 100, left + 102)], seed=3, size=64, mirror=mirror)
    drawn = [data[i, SEGMENT][0].views for i in range(200)]
    again = RandomCrops(data.pairs, seed=3, size=64, mirror=mirror)[7, SEGMENT][0].views
    assert (again.left == drawn[7].left).all()
    assert {views.left.shape for views in drawn} == {(64, 64)}
    flips = [int(views.left[0, 0]) > int(views.left[0, 1]) for views in drawn]
    assert (sum(flips) == pytest.approx(100, abs=30)) if mirror else not any(flips)
    # In a mirror left and right views change places, so the right one is 2 less there.
    for views, flipped in zip(drawn, flips, strict=True):
        assert (views.right.astype(int) - views.left == (-2 if flipped else 2)).all()
    assert len({int(views.left.min()) for views in drawn}) > 50  # of 37 places in either pair
    firsts = [views.left.min() >= 100 for views in drawn]
    assert all(firsts[i] != firsts[i + 1] for i in range(0, 200, 2))  # each pair in turn


def test_small_pairs_know_the_right_views_disparity(tmp_path):
    drive(tmp_path, 1, size=(128, 256), disparity=True)
    levels = np.full((128, 256), 512, np.uint16)
    levels[:, :128] = 1024
    save(tmp_path / "disp_occ_0" / "0.png", levels)
    views = small(find_pairs(tmp_path)[0], 64)
    assert views.left.shape == (64, 128)
    assert views.left_disparity is None
    assert (views.right_disparity[:, 64:] == 2).all()  # of 4 in twice the size, and in the mirror
    assert (views.right_disparity[:, :64] == 1).all()
    assert (views.left[0, 0], views.right[0, 0]) == (1, 0)


def test_squares_are_spread_over_the_width(tmp_path):
    for name in ("left", "right"):
        save(tmp_path / "a" / f"{name}.png", np.tile(np.arange(212, dtype=np.uint8), (64, 1)))
        save(tmp_path / "b" / f"{name}.png", np.tile(np.arange(90, dtype=np.uint8)[:, None], (1, 64)))
    found = list(squares(find_pairs(tmp_path), 64))
    assert [example.name for example in found] == ["a_0", "a_1", "a_2", "b"]
    assert levels(found) == [0, 74, 148, 13]
    assert {example.views.left.shape for example in found} == {(64, 64)}


def test_a_drive_is_split_in_time_and_small_folders_are_for_disparities(tmp_path):
    drive(tmp_path / "stereo" / "drive", 20)
    drive(tmp_path / "stereo" / "known", 1, disparity=True)
    drive(tmp_path / "stereo" / "unknown", 2)
    data = StereoPairsDataModule(root=str(tmp_path), test_pairs=8)
    data.setup("fit")
    assert [int(views.left[0, 0]) for views in data.sets["train"].pairs] == list(range(0, 140, 10))
    assert levels(data.examples["val"]) == [140, 140, 140, 150, 150, 150]
    assert levels(data.examples["test"]) == [160, 160, 160, 170, 170, 170, 180, 180, *[1, 1, 1]]
    assert [example.scored for example in data.examples["test"]] == [True] * 8 + [False] * 3
    assert data.test_samples == 8
    assert len(data.truths) == 3
    everywhere, each = data.mean_disparities()
    assert everywhere.item() == pytest.approx(2)
    assert each.shape == (1, 64, 64)
    assert data.data_name == "23 pairs of stereo"
    assert data.mean_view().shape == (1, 64, 64)
    assert 60 < data.mean_view().mean() * 255 < 70


def test_the_papers_recording_is_read_and_split(tmp_path):
    arrays = highway(tmp_path / "highway")
    data = StereoPairsDataModule(root=str(tmp_path), source="paper", test_pairs=4)
    data.setup("fit")
    assert len(data.sets["train"].pairs) == 18
    assert len(data.examples["val"]) == 2
    assert len(data.examples["test"]) == data.test_samples == 4
    assert (data.sets["train"].pairs[3].left == arrays["train"][0, 3, 0].T).all()
    assert (data.examples["val"][0].views.right == arrays["train"][1, 18, 0].T).all()
    assert (data.examples["test"][2].views.right == arrays["test"][1, 2, 0].T).all()
    assert not data.truths
    assert data.data_name == "highway driving"


def test_auto_takes_the_recording_first_then_pairs_then_draws(tmp_path):
    drive(tmp_path / "stereo", 12)
    for part, name in (("drawn", "drawn scenes"), ("stereo", "12 pairs of stereo"), ("highway", "highway driving")):
        root = tmp_path if part != "drawn" else tmp_path / "none"
        if part == "highway":
            highway(tmp_path / "highway")
        data = StereoPairsDataModule(
            root=str(root), source="stand-in" if part == "drawn" else "auto", val_pairs=2, test_pairs=2
        )
        data.setup("fit")
        assert data.data_name.startswith(name)


def spoilt(folder, what):
    if what == "no partner":
        drive(folder / "stereo", 10)
        (folder / "stereo" / "image_3" / "4.png").unlink()
    elif what == "sizes":
        drive(folder / "stereo", 10)
        save(folder / "stereo" / "image_3" / "4.png", np.zeros((64, 100), np.uint8))
    elif what == "small":
        drive(folder / "stereo", 10, size=(64, 15))
    elif what == "few":
        drive(folder / "stereo", 9)
    elif what == "scale":
        drive(folder / "stereo" / "drive", 10)
        for name in ("left", "right", "disp"):
            save(folder / "stereo" / "own" / f"{name}.png", np.ones((64, 64), np.uint8))
    elif what == "layout":
        save(folder / "stereo" / "holiday.png", np.zeros((64, 64), np.uint8))
    elif what == "one file":
        highway(folder / "highway")
        (folder / "highway" / "highwayDriving_test.h5").unlink()
    elif what == "short":
        highway(folder / "highway", train=9)
    elif what == "damaged":
        highway(folder / "highway")
        (folder / "highway" / "highwayDriving_test.h5").write_bytes(b"no")


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("no partner", [], "4.png has no partner of that name"),
        ("sizes", [], "give two views of one size"),
        ("small", [], "0.png is 15x64 pixels: views need at least 16x16"),
        ("few", [], "training needs a folder with at least 10 pairs"),
        ("scale", [], "disp.png does not say how many of its levels are one pixel: give --data.disparity_scale"),
        ("layout", [], "holds no stereo pairs in a known layout"),
        ("one file", ["--data.size=64"], "highwayDriving_test.h5 is missing"),
        ("short", ["--data.size=64"], "has 9 training pairs, too few"),
        ("damaged", ["--data.size=64"], "highwayDriving_test.h5 cannot be read as HDF5"),
        ("damaged", [], "the highway recording has 64"),
        (
            "",
            ["--data.source=paper", "--data.size=64"],
            "highwayDriving_train.h5 is missing: put the authors'",
        ),
        ("", ["--data.size=65"], "data.size is 65"),
        ("", ["--data.size=14"], "data.size is 14"),
        ("", ["--data.disparity_scale=0"], "data.disparity_scale is 0.0"),
        ("", ["--data.pairs=/nowhere/at/all"], "/nowhere/at/all is not a folder"),
        ("", ["--model.kernel_width=12"], "model.kernel_width is 12: choose an odd number"),
        ("", ["--model.untied_bias=true", "--data.source=stand-in"], "untied biases need 64x64"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(what, options, message, tmp_path):
    spoilt(tmp_path / "no-data", what)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments(NAME, tmp_path, *options)])
    assert str(stop.value).startswith("error: ")
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_predict_takes_all_of_a_users_pairs(tmp_path):
    common = arguments(NAME, tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.size=16")
    main(["fit", *common, "--data.source=stand-in"])
    truth = np.full((32, 70), 40, np.uint8)
    for name in ("cat_left", "cat_right", "dog_left", "dog_right"):
        save(tmp_path / "own" / f"{name}.png", np.random.default_rng(0).integers(0, 256, (32, 70), dtype=np.uint8))
    save(tmp_path / "own" / "dog_disp.png", truth)
    options = [f"--data.pairs={tmp_path / 'own'}", "--data.predict_pairs=1", "--data.batch_size=3"]
    with pytest.raises(SystemExit, match=r"dog_disp.png does not say"):
        main(["predict", *common, *options])
    main(["predict", *common, *options, "--data.disparity_scale=10"])
    written = sorted((tmp_path / NAME / "predictions").iterdir())
    assert [path.name for path in written] == ["cat_0.png", "cat_1.png", "dog_0.png", "dog_1.png"]


def test_the_real_pairs_are_split(real_data):
    data = StereoPairsDataModule(root=str(real_data))
    data.setup("fit")
    assert len(data.sets["train"].pairs) == 35
    assert data.sets["train"].pairs[0].left.shape == (64, 212)
    assert len(data.examples["val"]) == 3 * 5
    assert data.test_samples == 3 * 11
    names = [example.name for example in data.examples["test"] if not example.scored]
    assert names == ["middlebury2003_cones", "middlebury2014_motorcycle_motorcycle"]
    assert 3 < data.mean_disparities()[0] < 7
