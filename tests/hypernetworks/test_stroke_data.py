import types

import numpy as np
import pytest
import torch

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.stroke_data import PenStrokesDataModule, StrokeBatch, StrokeDataset
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.running.segments import Segment, SegmentSampler


def sequences(*lengths):
    return [np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32) for n in lengths]


def data_module(schedule=None, **options):
    data = PenStrokesDataModule(**options)
    data.trainer = types.SimpleNamespace(global_rank=0, world_size=1)
    schedule = schedule or MetaSchedule(horizon=300)
    data.train_batches = SegmentSampler(schedule.segments, lambda: 0, 20, data.batch_size)
    return data


def save(path, lines):
    part = np.empty(len(lines), object)
    for i, line in enumerate(lines):
        part[i] = np.concatenate([line[:, :2], line[:, 2:] > 0], 1).astype(np.float32)
    np.savez(path, train=part, valid=part[:3], test=part[:2])
    return str(path)


def test_batches_are_as_long_as_their_longest_and_know_what_is_there():
    lines = sequences(3, 7, 1)
    dataset = StrokeDataset(lines)
    batch = StrokeBatch.collate([dataset[(i, Segment(0, 0, 50, True))] for i in range(3)])
    assert batch.points.shape == (3, 7, 3)
    assert batch.scored.sum(1).tolist() == [2, 6, 0]
    for line, row in zip(lines, batch.points, strict=True):
        assert np.array_equal(row[: len(line)], line)
        assert not row[len(line) :].any()
    first, second, third = (
        StrokeBatch.collate([dataset[(i, Segment(0, start, start + 3, False))] for i in range(3)])
        for start in (0, 3, 9)
    )
    assert first.scored.sum(1).tolist() == [2, 3, 0]
    assert second.scored.sum(1).tolist() == [0, 3, 0]
    assert torch.equal(first.points[1, -1], second.points[1, 0])
    assert not third.scored.any(), "all have ended"


def test_training_sequences_are_shuffled_and_scaled_by_their_number():
    lines = sequences(*range(5, 15))
    dataset, segment = StrokeDataset(lines, seed=1, augment=0.1), Segment(0, 0, 50, True)
    drawn = [dataset[(i, segment)][0] for i in range(20)]
    for lap in (drawn[:10], drawn[10:]):
        assert sorted(map(len, lap)) == list(range(5, 15))
    factors = []
    for sequence in drawn:
        ratio = sequence / lines[len(sequence) - 5]
        np.testing.assert_allclose(ratio[:, 2], 1)
        np.testing.assert_allclose(ratio[:, :2], ratio[0, 0], rtol=1e-4)
        factors.append(ratio[0, 0])
    assert 0.9 <= min(factors) < 0.95
    assert 1.05 < max(factors) <= 1.1
    assert np.array_equal(drawn[3], StrokeDataset(lines, seed=1, augment=0.1)[(3, segment)][0])
    assert [len(s) for s in drawn] != [len(StrokeDataset(lines, seed=2)[(i, segment)][0]) for i in range(20)]


def test_the_users_strokes(tmp_path):
    path = save(tmp_path / "mine.npz", sequences(*range(5, 15)))
    data = data_module(strokes=path, train_sequences=8, batch_size=4)
    data.setup("fit")
    assert data.data_name == "strokes of mine.npz"
    assert (len(data.train), len(data.val), data.test_samples) == (8, 3, 2)
    offsets = np.concatenate(data.train)[:, :2]
    np.testing.assert_allclose(data.scale, offsets.std(0), rtol=1e-5)
    batch = next(iter(data.train_dataloader()))
    assert batch.points.shape[0] == 4
    assert sum(len(b.points) for b in data.val_dataloader()) == 3


def test_what_does_not_fit(tmp_path, recwarn):
    path = save(tmp_path / "mine.npz", sequences(*range(5, 15)))
    data = data_module(MetaSchedule(unroll=5), strokes=path)
    data.setup("fit")
    with pytest.raises(InputError, match=r"longer than all sequences .at most 13 steps.: give --schedule.horizon 13"):
        data.train_dataloader()
    data = data_module(MetaSchedule(horizon=5), strokes=path)
    data.setup("fit")
    with pytest.warns(UserWarning, match="uses 5 of up to 13 steps"):
        data.train_dataloader()
    data.train_batches = None
    with pytest.raises(InputError, match="no schedule"):
        data.train_dataloader()
    with pytest.raises(InputError, match=r"data.augment is 1.0"):
        data_module(augment=1.0)
    with pytest.raises(InputError, match="iam-ondb"):
        data_module(root=str(tmp_path), source="paper").setup("fit")
    with pytest.raises(InputError, match=r"none.xml"):
        data_module(prime=str(tmp_path / "none.xml")).setup("predict")


def test_a_prime_needs_no_data(tmp_path):
    path = tmp_path / "line.xml"
    stroke = '<Stroke><Point x="1" y="2"/><Point x="3" y="5"/></Stroke>'
    path.write_text(f"<WhiteboardCaptureSession><StrokeSet>{stroke}</StrokeSet></WhiteboardCaptureSession>")
    data = data_module(root=str(tmp_path), source="paper", prime=str(path))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.points.tolist() == [[0, 0, 0], [2, 3, 1]]


def test_the_stand_in_says_what_it_is(tmp_path):
    data = data_module(root=str(tmp_path), train_sequences=5, val_sequences=2, test_sequences=3)
    with pytest.warns(UserWarning, match="stand-in for IAM-OnDB"):
        data.setup("fit")
    assert [len(part) for part in (data.train, data.val, data.test)] == [5, 2, 3]


def test_real_strokes(real_data):
    data = data_module(strokes=str(real_data / "strokes" / "kanji" / "short_kanji.npz"))
    data.setup("fit")
    assert (len(data.train), len(data.val), len(data.test)) == (10_000, 600, 500)
    assert next(iter(data.train_dataloader())).points.shape[1] <= 88
