import types

import numpy as np
import pytest
import torch

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.text_data import Readers, ScoredReaders, TextBatch, TextDataModule
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.running.segments import Segment, SegmentSampler


def data_module(rank=0, world_size=1, schedule=None, **options):
    data = TextDataModule(download=False, **options)
    data.trainer = types.SimpleNamespace(global_rank=rank, world_size=world_size)
    schedule = schedule or MetaSchedule(unroll=7)
    data.train_batches = SegmentSampler(schedule.segments, lambda: 0, 20, data.batch_size, rank, world_size)
    return data


def test_readers_go_on_where_they_stopped_and_round_the_end():
    symbols = np.arange(23, dtype=np.uint8)
    readers = Readers(symbols, readers=2, seed=0)
    read = [
        np.concatenate([readers[(j, Segment(0, start, start + 5, False))][0][:-1] for start in range(0, 50, 5)])
        for j in range(2)
    ]
    for line in read:
        assert np.array_equal(np.diff(line.astype(int)) % 23, np.ones(49))
    assert (read[1][0].astype(int) - read[0][0]) % 23 == 23 // 2
    following, scored, _ = readers[(0, Segment(0, 0, 5, False))]
    assert np.array_equal(following[:-1], read[0][:5])
    assert scored.all()
    assert len(scored) == 5


def test_the_seed_says_where_reading_starts_and_a_horizon_ends_it():
    symbols = np.arange(1000)
    starts = {int(Readers(symbols, 1, seed)[(0, Segment(0, 0, 1, False))][0][0]) for seed in range(5)}
    assert len(starts) == 5
    readers = Readers(symbols, 2, 0)
    starts = [int(readers[(2 * p + j, Segment(p, 0, 1, False))][0][0]) for p in range(1, 4) for j in range(2)]
    assert len(set(starts)) == 6
    assert starts[0] == readers[(2, Segment(1, 0, 1, False))][0][0]


@pytest.mark.parametrize("readers", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [2, 5, 40, 41])
@pytest.mark.parametrize("context", [1, 4])
def test_every_symbol_but_the_first_is_scored_once_and_has_its_context(readers, length, context):
    symbols = np.arange(length)
    scored_readers = ScoredReaders(symbols, readers, context)
    seen, batches = [], scored_readers.batches(4, 0, 1)
    assert [batch[0][1].last for batch in batches] == [False] * (len(batches) - 1) + [True]
    before = {reader: [] for reader in range(readers)}
    for batch in batches:
        for reader, segment in batch:
            read, scored, _ = scored_readers[(reader, segment)]
            for symbol, target, counts in zip(read, read[1:], scored, strict=False):
                before[reader].append(symbol)
                if counts:
                    seen.append(target)
                    assert target == symbol + 1
                    assert len(before[reader]) >= min(context, target)
    assert sorted(seen) == list(range(1, length))


def test_two_processes_share_the_readers():
    one = ScoredReaders(np.arange(100), 5, 3).batches(10, 0, 1)
    two = [ScoredReaders(np.arange(100), 5, 3).batches(10, rank, 2) for rank in range(2)]
    for batch, first, second in zip(one, *two, strict=True):
        assert sorted(key[0] for key in batch) == sorted(key[0] for key in first + second)
    data = data_module(world_size=4, readers=2, source="stand-in")
    data.setup("fit")
    with pytest.raises(InputError, match=r"data.readers is 2, but each of 4 processes needs one"):
        data.val_dataloader()


def test_training_batches_continue_and_two_processes_read_what_one_reads():
    def lines(rank, world_size, batch_size):
        data = data_module(rank, world_size, source="stand-in", batch_size=batch_size)
        data.setup("fit")
        loader = iter(data.train_dataloader())
        return [next(loader) for _ in range(3)]

    one = lines(0, 1, 4)
    assert isinstance(one[0], TextBatch)
    assert one[0].symbols.shape == (4, 8)
    assert torch.equal(one[0].symbols[:, -1], one[1].symbols[:, 0])
    for whole, first, second in zip(one, lines(0, 2, 2), lines(1, 2, 2), strict=True):
        assert torch.equal(whole.symbols, torch.cat([first.symbols, second.symbols]))


def test_the_users_text_and_its_parts(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("abcdefghij" * 100)
    data = data_module(text=str(path), batch_size=2, val_symbols=30)
    data.setup("fit")
    assert data.data_name == "mine.txt by characters, 90/5/5 %"
    assert (len(data.train_text), len(data.val_text), len(data.test_text)) == (900, 30, 50)
    assert data.test_samples == 49
    assert data.decode(data.vocabulary.tolist()) == "abcdefghij"
    assert len(data.prompt) == 50


def test_a_prompt_needs_no_text(tmp_path):
    data = data_module(root=str(tmp_path), source="paper", prompt="né")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.symbols.tolist() == [ord("n"), ord("é")]
    data = data_module(root=str(tmp_path), corpus="enwik8", source="paper", prompt="né")
    data.setup("predict")
    assert data.prompt.tolist() == list("né".encode())
    assert data.decode([*"né".encode(), 0xC3]) == "né\N{REPLACEMENT CHARACTER}"


def test_what_does_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"data.prompt is empty"):
        data_module(prompt="").setup("predict")
    with pytest.raises(InputError, match=r"data.context is 0"):
        data_module(context=0)
    path = tmp_path / "short.txt"
    path.write_text("0123456789" * 3)
    data = data_module(text=str(path), batch_size=4)
    with pytest.raises(InputError, match=r"short.txt.*1 characters for validation, fewer than 2: give a longer text"):
        data.setup("fit")
    path.write_text("0123456789" * 8)
    data.setup("fit")
    data.train_batches.batch_size = data.batch_size = 32
    with pytest.raises(InputError, match=r"72 characters for training, too few for 32 readers with 7 each"):
        data.train_dataloader()
    data.train_batches = None
    with pytest.raises(InputError, match="no schedule"):
        data.train_dataloader()
    with pytest.raises(InputError, match="ptb"):
        data_module(root=str(tmp_path), source="paper").setup("fit")


def test_penn_treebank(real_data):
    data = data_module(root=str(real_data), batch_size=8)
    data.setup("fit")
    assert data.data_name == "Penn Treebank by characters"
    assert len(data.vocabulary) == 50
    assert len(data.val_text) == 393_042
