import math

import numpy as np
import pytest
import torch

from lightning_meta.dynamic_filters.moving_mnist_data import (
    Clips,
    FixedClips,
    MovingDigits,
    MovingMNISTDataModule,
    fixed_test_sequences,
    moving_digits,
    trajectory,
    true_flow,
)
from lightning_meta.errors import InputError
from lightning_meta.running.segments import Segment
from lightning_meta.sources.seeding import generator

SQUARE = np.full((28, 28), 200, np.uint8)


def literal(pictures, frames, random):
    """The authors' rules, one number at a time."""
    tracks = []
    for _ in pictures:
        x, y = random.random(), random.random()
        angle = 2 * math.pi * random.random()
        dx, dy = 0.1 * math.cos(angle), 0.1 * math.sin(angle)
        track = []
        for _ in range(frames):
            x, y = x + dx, y + dy
            if x <= 0:
                x, dx = 0, -dx
            elif x >= 1:
                x, dx = 1, -dx
            if y <= 0:
                y, dy = 0, -dy
            elif y >= 1:
                y, dy = 1, -dy
            track.append((int(36 * x), int(36 * y)))
        tracks.append(track)
    canvas = np.zeros((frames, 64, 64), np.uint8)
    for picture, track in zip(pictures, tracks, strict=True):
        for t, (x, y) in enumerate(track):
            for i in range(28):
                for j in range(28):
                    canvas[t, y + i, x + j] = max(canvas[t, y + i, x + j], picture[i, j])
    return canvas


@pytest.mark.parametrize("index", range(4))
def test_digits_move_as_the_authors_generator_moves_them(index):
    pictures = list(np.random.default_rng(index).integers(0, 256, (2, 28, 28), np.uint8))
    random = generator(0, index)
    fast = moving_digits(pictures, [trajectory(20, random) for _ in pictures])
    assert np.array_equal(fast, literal(pictures, 20, generator(0, index)))


def corners(frames):
    """Return the upper left corner of the square in each frame."""
    return np.array([np.argwhere(frame).min(0) for frame in frames])


def test_speed_is_3_6_pixels_a_frame_at_most_4_along_an_axis():
    moves = []
    for index in range(50):
        way = corners(moving_digits([SQUARE], [trajectory(20, generator(1, index))])).astype(float)
        assert way.min() >= 0
        assert way.max() <= 36
        assert np.abs(np.diff(way, axis=0)).max() <= 4
        inside = ((way > 0) & (way < 36)).all(1)
        moves += [step for step, a, b in zip(np.diff(way, axis=0), inside[:-1], inside[1:], strict=True) if a and b]
    assert np.hypot(*np.array(moves).T).mean() == pytest.approx(3.6, abs=0.1)


def test_overlapping_digits_show_the_brighter_pixel():
    places = [trajectory(200, generator(0, i)) for i in range(2)]
    assert set(np.unique(moving_digits([SQUARE, SQUARE // 2], places))) == {0, 100, 200}


def test_true_flow_takes_every_inked_pixel_to_where_it_was():
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 28, 28), np.uint8))
    pictures[0][:9] = 0
    places = [trajectory(8, generator(0, i)) for i in (1, 2)]
    frames, flow = moving_digits(pictures, places), true_flow(pictures, places)
    assert np.isnan(flow[0]).all()
    for t in range(1, 8):
        assert np.array_equal(frames[t] > 0, ~np.isnan(flow[t]).any(0))
        for y, x in np.argwhere(frames[t]):
            dx, dy = flow[t, :, y, x].astype(int)
            assert frames[t - 1, y + dy, x + dx] >= frames[t, y, x]  # brighter where the other digit lay over it
            digit = next(i for i in (0, 1) if np.array_equal(places[i][t - 1] - places[i][t], (dx, dy)))
            left, top = places[digit][t]
            assert pictures[digit][y - top, x - left] == frames[t, y, x]


def sample(split, seed, index, start=0, stop=19):
    pictures = torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, 28, 28) + 100
    return MovingDigits(pictures, split, seed)[index, Segment(0, start, stop, stop == 19)][0]


def test_a_sample_is_a_function_of_seed_split_and_index():
    assert np.array_equal(sample("train", 0, 3), sample("train", 0, 3))
    others = [sample("train", 1, 3), sample("val", 0, 3), sample("train", 0, 4)]
    assert not any(np.array_equal(sample("train", 0, 3), other) for other in others)


def test_a_segment_is_a_cut_of_its_sequence():
    whole = sample("train", 0, 5)
    assert whole.shape == (20, 64, 64)
    assert np.array_equal(sample("train", 0, 5, 0, 12), whole[:13])
    assert np.array_equal(sample("train", 0, 5, 12, 19), whole[12:])


def test_every_digit_is_used_once_before_any_is_used_again():
    pictures = torch.arange(1, 41, dtype=torch.uint8)[:, None, None].expand(40, 28, 28)
    data = MovingDigits(pictures, "train", 0)
    seen = [set(np.unique(data.sequence(index, 100)[0])) - {0} for index in range(20)]
    assert sum(len(values) for values in seen) == 40
    assert set.union(*seen) == set(range(1, 41))


def test_batches_are_in_zero_to_one():
    frames = np.full((3, 64, 64), 255, np.uint8)
    batch = Clips.collate([(frames, Segment(0, 0, 2, True), None), (frames // 5, Segment(0, 0, 2, True), None)])
    assert batch.flow is None
    assert batch.frames.shape == (2, 3, 1, 64, 64)
    assert batch.frames.dtype == torch.float32
    assert [value.item() for value in batch.frames[:, 0, 0, 0, 0]] == pytest.approx([1, 0.2])


@pytest.mark.parametrize(("name", "axes"), [("bouncing_mnist_test", (0, 1)), ("mnist_test_seq", (1, 0))])
def test_the_fixed_test_set_in_both_layouts(tmp_path, name, axes):
    sequences = np.random.default_rng(0).integers(0, 256, (3, 20, 64, 64), np.uint8)
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / f"{name}.npy", sequences.transpose(*axes, 2, 3))
    read = fixed_test_sequences(tmp_path)
    assert np.array_equal(read, sequences)
    assert np.array_equal(FixedClips(read)[2, Segment(2, 0, 19, True)][0], sequences[2])


def test_more_test_sequences_than_the_fixed_set_has(tmp_path):
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "bouncing_mnist_test.npy", np.zeros((3, 20, 64, 64), np.uint8))
    options = {"root": str(tmp_path), "source": "stand-in", "test_set": "fixed"}
    with pytest.raises(InputError, match=r"has 3 sequences, fewer than --data\.test_sequences 4: lower that"):
        MovingMNISTDataModule(**options, test_sequences=4).setup("test")
    data = MovingMNISTDataModule(**options, test_sequences=3)
    data.setup("test")
    assert data.test_name.startswith("the fixed test sequences")


def test_a_wrong_fixed_test_set_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no bouncing_mnist_test\.npy or mnist_test_seq\.npy"):
        fixed_test_sequences(tmp_path)
    path = tmp_path / "MovingMNIST" / "mnist_test_seq.npy"
    path.parent.mkdir()
    for content in (
        np.zeros((20, 3, 32, 32), np.uint8),
        np.zeros((20, 3, 64, 64)),
        np.zeros((10, 3, 64, 64), np.uint8),
    ):
        np.save(path, content)
        with pytest.raises(InputError, match="not uint8"):
            fixed_test_sequences(tmp_path)
    for content in (b"", b"\x93NUMPY nonsense", path.read_bytes()[:-50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is not a readable \.npy file"):
            fixed_test_sequences(tmp_path)


def test_a_failed_download_falls_back_to_the_stand_in(tmp_path, monkeypatch):
    from lightning_meta.sources import digits

    def fail(root):
        raise InputError("no network")

    monkeypatch.setattr(digits, "download_mnist", fail)
    data = MovingMNISTDataModule(root=str(tmp_path))
    data.prepare_data()
    with pytest.warns(UserWarning, match="MNIST not found in .*: this run uses scikit-learn's 8x8 digits, a stand-in"):
        data.setup("fit")
    data = MovingMNISTDataModule(root=str(tmp_path), source="paper")
    data.prepare_data()
    with pytest.raises(InputError):
        data.setup("fit")


def test_splits_share_no_digit(real_data):
    data = MovingMNISTDataModule(root=str(real_data), source="paper")
    data.prepare_data()
    data.setup("test")
    assert [len(s.images) for s in (data.sets["train"], data.sets["val"], data.sets["test"])] == [
        50_000,
        10_000,
        10_000,
    ]
    assert data.data_name == "MNIST"
    mean = data.mean_frame()
    assert mean.shape == (1, 64, 64)
    assert mean.mean().item() == pytest.approx(2 * 33.3 / 255 * (28 / 64) ** 2, rel=0.1)  # two digits, some overlap
