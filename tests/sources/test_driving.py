import h5py
import numpy as np
import pytest

from lightning_meta.errors import InputError
from lightning_meta.sources.driving import read_highway


def test_the_highway_recording_is_turned_upright(tmp_path):
    floats = np.random.default_rng(0).random((3, 1, 64, 64), np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["highway_L"], file["highway_R"] = floats, (255 * floats).astype(np.uint8)
    left, right = read_highway(tmp_path / "x.h5", ["highway_L", "highway_R"])
    assert left.shape == right.shape == (3, 64, 64)
    assert left.dtype == right.dtype == np.uint8
    assert (left[1, 5, 9], right[1, 5, 9]) == (np.rint(255 * floats[1, 0, 9, 5]), int(255 * floats[1, 0, 9, 5]))
    (alone,) = read_highway(tmp_path / "x.h5", ["highway_R"])
    assert (alone == right).all()


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (["highway_R"], "no array 'highway_R', only"),
        (["group"], "no array 'group', only"),
        (["shape"], r"shape is uint8 \(3, 1, 64, 63\)"),
        (["axes"], r"axes is uint8 \(3, 64, 64\)"),
        (["empty"], r"empty is uint8 \(0, 1, 64, 64\)"),
        (["kind"], r"kind is int64 \(3, 1, 64, 64\)"),
        (["large"], "large has values outside 0 to 1"),
        (["nan"], "nan has values outside 0 to 1"),
        (["highway_L", "two"], "3 of highway_L, 2 of two"),
    ],
)
def test_another_file_is_not_the_highway_recording(tmp_path, views, message):
    right = np.zeros((3, 1, 64, 64), np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["highway_L"], file["two"], file["empty"] = right, right[:2], right[:0]
        file["shape"], file["axes"], file["kind"] = right[..., 1:], right[:, 0], right.astype(np.int64)
        file["large"], file["nan"] = right + 1.5, right + np.nan
        file.create_group("group")
    with pytest.raises(InputError, match=rf"x\.h5.*{message}") as error:
        read_highway(tmp_path / "x.h5", views)
    assert "\n" not in str(error.value)


def test_a_recording_that_is_missing_or_cut_short_is_named(tmp_path):
    with pytest.raises(InputError, match=r"x\.h5 is missing: put the authors' file there"):
        read_highway(tmp_path / "x.h5", ["highway_L"])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["highway_L"] = np.ones((3, 1, 64, 64), np.uint8)
    whole = (tmp_path / "x.h5").read_bytes()
    for part in (b"no", whole[: len(whole) // 2]):
        (tmp_path / "x.h5").write_bytes(part)
        with pytest.raises(InputError, match=r"x\.h5 cannot be read as HDF5"):
            read_highway(tmp_path / "x.h5", ["highway_L"])
