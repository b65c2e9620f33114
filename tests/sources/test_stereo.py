import struct

import numpy as np
import pytest
from PIL import Image

from lightning_meta.errors import InputError
from lightning_meta.sources.seeding import generator
from lightning_meta.sources.stereo import Views, find_pairs, read_pfm, textured_layers


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def view(level, size=(10, 20)):
    return np.full(size, level, np.uint8)


def pfm(values, order="<"):
    rows = np.asarray(values, np.float32)[::-1]
    scale = -1.0 if order == "<" else 1.0
    return f"Pf\n{rows.shape[1]} {rows.shape[0]}\n{scale}\n".encode() + rows.astype(f"{order}f4").tobytes()


def warped(left, disparity):
    """Warp the left view by a loop: the right view at x is the left view at x + d, interpolated."""
    right = np.zeros(left.shape)
    for y in range(left.shape[0]):
        for x in range(left.shape[1]):
            whole = int(disparity[y, x])
            part = disparity[y, x] - whole
            at = min(x + whole, left.shape[1] - 1), min(x + whole + 1, left.shape[1] - 1)
            right[y, x] = (1 - part) * left[y, at[0]] + part * left[y, at[1]]
    return right


@pytest.mark.parametrize(
    ("views", "disparities"), [(("image_2", "image_3"), "disp_occ_0"), (("image_0", "image_1"), "disp_occ")]
)
def test_kitti_with_disparities_of_some_left_views(tmp_path, views, disparities):
    for i, name in enumerate(["000000_10", "000000_11"]):
        save(tmp_path / "training" / views[0] / f"{name}.png", view(10 + i))
        save(tmp_path / "training" / views[1] / f"{name}.png", view(20 + i))
    levels = np.full((10, 20), 3 * 256 + 128, np.uint16)
    levels[0] = 0
    save(tmp_path / "training" / disparities / "000000_10.png", levels)
    first, second = find_pairs(tmp_path)
    assert (first.name, second.name) == ("training/000000_10", "training/000000_11")
    found = first.read()
    assert (found.left == 10).all()
    assert (found.right == 20).all()
    assert (found.left_disparity[1:] == 3.5).all()
    assert np.isnan(found.left_disparity[0]).all()
    assert found.right_disparity is None
    assert second.read().left_disparity is None


@pytest.mark.parametrize("views", [("image_l", "image_r"), ("image_0", "image_1"), ("left", "right")])
def test_folders_without_disparities(tmp_path, views):
    for i in (2, 10):
        for level, name in enumerate(views):
            save(tmp_path / "sequence" / name / f"{i}.png", view(level + i))
    pairs = find_pairs(tmp_path / "sequence")
    assert [pair.name for pair in pairs] == ["2", "10"]
    assert [int(pair.read().right[0, 0]) for pair in pairs] == [3, 11]


@pytest.mark.parametrize(("size", "scale"), [((375, 450), 4), ((750, 900), 2), ((10, 20), 8)])
def test_middlebury_2003_has_both_disparities_in_levels_that_its_size_tells(tmp_path, size, scale):
    for name, level in (("im2", 1), ("im6", 2), ("disp2", 40), ("disp6", 48), ("im0", 9), ("im1", 9)):
        save(tmp_path / "cones" / f"{name}.png", view(level, size))
    (pair,) = find_pairs(tmp_path, disparity_scale=8)
    found = pair.read()
    assert (found.left[0, 0], found.right[0, 0]) == (1, 2)
    assert (found.left_disparity == 40 / scale).all()
    assert (found.right_disparity == 48 / scale).all()
    if scale == 8:
        with pytest.raises(InputError, match=r"disp2.png does not say .*: give --data.disparity_scale"):
            find_pairs(tmp_path)[0].read()


def test_middlebury_2014_and_files_with_a_common_beginning(tmp_path):
    truth = np.arange(200, dtype=np.float32).reshape(10, 20)
    truth[3, 4] = np.inf
    for start, names in (("a", ("im0", "im1")), ("b", ("cat_left", "cat_right")), ("c", ("left", "right"))):
        for level, name in enumerate(names):
            save(tmp_path / start / f"{name}.png", view(level))
    (tmp_path / "a" / "disp0.pfm").write_bytes(pfm(truth))
    (tmp_path / "a" / "calib.txt").write_text("cam0=[1 0 0; 0 1 0; 0 0 1]\n")
    np.savez(tmp_path / "b" / "cat_disp.npz", truth)
    np.save(tmp_path / "c" / "disp_right.npy", truth)
    pairs = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a", "b/cat", "c"]
    known = np.where(np.isfinite(truth), truth, np.nan)
    np.testing.assert_array_equal(pairs[0].read().left_disparity, known)
    np.testing.assert_array_equal(pairs[1].read().left_disparity, known)
    np.testing.assert_array_equal(pairs[2].read().right_disparity, known)
    assert pairs[2].read().left_disparity is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_begins_with_the_lowest_row(tmp_path, order):
    values = np.array([[1.5, -2], [np.inf, 4], [5, 6]], np.float32)
    (tmp_path / "x.pfm").write_bytes(pfm(values, order))
    found = read_pfm(tmp_path / "x.pfm")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.float32
    header, first = (tmp_path / "x.pfm").read_bytes()[:-24], (tmp_path / "x.pfm").read_bytes()[-24:-20]
    assert header.startswith(b"Pf\n2 3\n")
    assert struct.unpack(f"{order}f", first) == (5.0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PF\n1 1\n-1.0\n" + bytes(12), "is no grey portable float map"),
        (b"hello", "is no grey portable float map"),
        (b"Pf\n2 3\n1.2.3\n", "is no grey portable float map"),
        (b"Pf\n2 3\n-1.0\n" + bytes(23), "23 bytes follow the header, which promises 2x3"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_no_pfm(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.pfm").write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.pfm.*{message}"):
        read_pfm(tmp_path / "x.pfm")


def broken(folder, what):
    """Write a pair with one fault."""
    save(folder / "left.png", view(1))
    save(folder / "right.png", view(1, (10, 21)) if what == "sizes" else view(1))
    truth = np.ones((10, 20), np.float32)
    if what == "scale":
        save(folder / "disp.png", view(4))
    elif what == "disparity size":
        np.save(folder / "disp.npy", truth[:, 1:])
    elif what == "negative":
        np.save(folder / "disp.npy", -truth)
    elif what == "unknown":
        (folder / "disp.pfm").write_bytes(pfm(np.inf * truth))
    elif what == "pickle":
        np.save(folder / "disp.npy", np.array([[{}]]), allow_pickle=True)
    elif what == "two arrays":
        np.savez(folder / "disp.npz", a=truth, b=truth)
    elif what == "three axes":
        np.save(folder / "disp.npy", truth[None])
    elif what == "not npz":
        (folder / "disp.npz").write_bytes(b"PK\3\4 no")
    elif what == "colour":
        save(folder / "disp.png", np.ones((10, 20, 3), np.uint8))
    elif what == "not png":
        (folder / "disp.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sizes", "left.png is 20x10 pixels, .*right.png is 21x10: give two views of one size"),
        ("scale", "disp.png does not say .* give --data.disparity_scale"),
        ("disparity size", "disp.npy is 19x10 pixels, its view is 20x10"),
        ("negative", "disp.npy has negative disparities"),
        ("unknown", "disp.pfm has no known disparity"),
        ("pickle", "disp.npy is not a file of one NumPy array"),
        ("two arrays", "disp.npz is not a file of one NumPy array"),
        ("three axes", r"disp.npy holds float32 \(1, 10, 20\)"),
        ("not npz", "disp.npz is not a file of one NumPy array"),
        ("colour", "disp.png is not a grey image"),
        ("not png", "disp.png cannot be decoded"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(tmp_path, what, message):
    broken(tmp_path, what)
    (pair,) = find_pairs(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        pair.read()
    assert "\n" not in str(error.value)


def test_a_view_without_its_partner_is_named(tmp_path):
    for name in ("image_2/1.png", "image_2/2.png", "image_3/1.png"):
        save(tmp_path / "a" / name, view(1))
    with pytest.raises(InputError, match=r"image_2/2.png has no partner of that name in .*image_3"):
        find_pairs(tmp_path)
    save(tmp_path / "b" / "image_3" / "1.png", view(1))
    with pytest.raises(InputError, match=r"image_3 has no folder image_2 beside it"):
        find_pairs(tmp_path / "b")
    save(tmp_path / "c" / "cat_right.png", view(1))
    with pytest.raises(InputError, match=r"cat_right.png has no partner cat_left.png"):
        find_pairs(tmp_path / "c")
    save(tmp_path / "d" / "im2.png", view(1))
    with pytest.raises(InputError, match=r"im2.png has no partner im6.png"):
        find_pairs(tmp_path / "d")


def test_folders_without_pairs_say_how_to_name_them(tmp_path):
    save(tmp_path / "a" / "holiday.png", view(1))
    with pytest.raises(InputError, match=r"holds no stereo pairs in a known layout: name them left.png"):
        find_pairs(tmp_path)
    with pytest.raises(InputError, match=r"missing is not a folder"):
        find_pairs(tmp_path / "missing")


def test_a_folder_that_links_to_itself_ends(tmp_path):
    save(tmp_path / "a" / "left.png", view(1))
    save(tmp_path / "a" / "right.png", view(1))
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [pair.name for pair in find_pairs(tmp_path)] == ["a"]


def test_scaling_averages_areas_and_shrinks_disparities():
    random = np.random.default_rng(0)
    left, right = random.integers(0, 256, (2, 20, 50), dtype=np.uint8)
    truth = random.uniform(1, 9, (20, 50)).astype(np.float32)
    truth[:3, :5] = np.nan
    truth[5:10, :3] = np.nan
    found = Views(left, right, truth).scaled(4)
    blocks = left.reshape(4, 5, 10, 5).mean((1, 3))
    assert np.abs(found.left - blocks).max() <= 0.5
    assert found.left.dtype == np.uint8
    assert found.right_disparity is None
    expected = np.nanmean(truth.reshape(4, 5, 10, 5).swapaxes(1, 2).reshape(4, 10, 25), 2) / 5
    expected[0, 0] = expected[1, 0] = np.nan  # 15 of 25 are unknown
    np.testing.assert_allclose(found.left_disparity, expected, rtol=1e-5)
    # If the sides do not divide, a pixel that overlaps two new ones counts in both by its overlap.
    third = Views(np.array([[0, 30, 60], [0, 30, 60], [90, 90, 90]], np.uint8), np.zeros((3, 3), np.uint8)).scaled(2)
    assert third.left.tolist() == [[10, 50], [63, 77]]


def test_a_mirrored_pair_is_a_pair():
    """Mirroring turns the left view's disparity into the right view's."""
    y, x = np.mgrid[:100, :100]
    smooth = (128 + 60 * np.sin(x / 3 + y / 9) + 60 * np.sin(x / 7 - y / 5)).astype(np.uint8)
    views = textured_layers([smooth], 64, generator(3))
    for pair in (views, views.mirrored()):
        near = pair.right_disparity.max() + 1
        inside = np.arange(64) < 64 - near
        error = np.abs(warped(pair.left, pair.right_disparity) - pair.right)[:, inside]
        copied = np.abs(pair.left.astype(float) - pair.right)[:, inside]
        assert np.median(error) < 1 < np.median(copied)
    mirrored = Views(views.left, views.right, views.left_disparity).mirrored()
    np.testing.assert_array_equal(mirrored.right_disparity, views.left_disparity[:, ::-1])
    assert mirrored.left_disparity is None
    np.testing.assert_array_equal(mirrored.left, views.right[:, ::-1])
    again = views.mirrored().mirrored()
    assert all((one == other).all() for one, other in zip(views, again, strict=True))


@pytest.mark.parametrize("size", [16, 64])
def test_drawn_scenes_are_layers_with_known_disparities(size):
    pictures = [np.random.default_rng(i).integers(0, 256, (80, 90), dtype=np.uint8) for i in range(2)]
    for i in range(20):
        views, same = (textured_layers(pictures, size, generator(i)) for _ in range(2))
        assert all((one == other).all() for one, other in zip(views, same, strict=True))
        assert [part.dtype for part in views] == [np.uint8, np.uint8, np.float32, np.float32]
        assert {part.shape for part in views} == {(size, size)}
        right = views.right_disparity
        assert 0 < right.min() < right.max() <= 6 * size / 64
        assert (right[0] < right[-1].max()).all()  # the wall is behind the ground
        # Except for rounding and the borders of layers, the right view is the warped left view.
        inside = np.arange(size) < size - right.max() - 1
        assert (np.abs(warped(views.left, right) - views.right)[:, inside] < 1.01).mean() > 0.85
        # Both disparities describe one scene: pixel x of the right view is at x + d in the left view. A pixel of the
        # left view without such a partner is hidden in the right view.
        partner = np.rint(np.arange(size) + right).astype(int)
        there = np.take_along_axis(views.left_disparity, partner.clip(max=size - 1), 1)
        assert (np.abs(there - right)[partner < size] < 0.01).mean() > 0.9
    one, other = (textured_layers(pictures, size, generator(i)).left for i in range(2))
    assert (one != other).any()


def test_real_pairs_match_their_disparities(real_data):
    pairs = find_pairs(real_data / "stereo")
    by_folder = {}
    for pair in pairs:
        by_folder.setdefault(pair.folder.name, []).append(pair)
    assert {name: len(group) for name, group in by_folder.items()} == {
        "KITTI_sequence_1": 51,
        "cones": 1,
        "motorcycle": 1,
    }
    assert by_folder["KITTI_sequence_1"][0].read().left.shape == (185, 613)
    for name, largest in (("cones", 55.0), ("motorcycle", 60.0)):
        views = by_folder[name][0].read()
        assert largest - 5 < np.nanmax(views.left_disparity) <= largest + 5
        for pair in (views, views.mirrored()):
            if pair.right_disparity is None:
                continue
            known = np.isfinite(pair.right_disparity)
            known[:, -70:] = False
            moved = warped(pair.left, np.nan_to_num(pair.right_disparity))
            assert np.median(np.abs(moved - pair.right)[known]) < 6
            assert np.median(np.abs(pair.left.astype(float) - pair.right)[known]) > 15
