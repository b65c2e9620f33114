from itertools import islice

import numpy as np
import pytest

from lightning_meta.errors import InputError
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.running.segments import Segment, SegmentSampler, evaluation_keys
from lightning_meta.sources.seeding import generator, seed_of, shuffled


def batches(first, count, rank=0, world_size=1, batch_size=2):
    schedule = MetaSchedule(unroll=2, horizon=5)
    sampler = SegmentSampler(schedule.segments, lambda: first, 100, batch_size, rank, world_size)
    assert len(sampler) == 100
    return list(islice(sampler, count))


def test_batches_go_on_from_any_number():
    whole = batches(0, 12)
    for first in (1, 4, 7):
        assert batches(first, 12 - first) == whole[first:]


def test_all_segments_of_a_problem_name_the_same_samples():
    for keys in zip(*(batches(0, 3)[i] for i in range(3)), strict=True):
        assert len({index for index, _ in keys}) == 1
    assert {index for index, _ in batches(0, 3)[0]}.isdisjoint(index for index, _ in batches(0, 4)[3])


def test_two_ranks_see_together_what_one_sees_with_twice_the_batch():
    one = batches(0, 9, batch_size=4)
    two = [a + b for a, b in zip(batches(0, 9, 0, 2), batches(0, 9, 1, 2), strict=True)]
    assert one == two


@pytest.mark.parametrize(("samples", "world_size"), [(7, 2), (4, 4), (5, 1)])
def test_evaluation_covers_every_sample_once(samples, world_size):
    keys = [key for rank in range(world_size) for key in evaluation_keys(samples, 19, rank, world_size)]
    assert sorted(index for index, _ in keys) == list(range(samples))
    assert all(segment == Segment(index, 0, 19, last=True) for index, segment in keys)


def test_random_numbers_are_a_function_of_the_key():
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    assert len({generator(*key).random() for key in np.ndindex(3, 3, 3)}) == 27
    assert len({seed_of(*key) for key in np.ndindex(3, 3, 3)}) == 27
    assert seed_of(0, 0, 1) == 8649202198168436674  # the same on every machine, or no run could be repeated


def test_a_shuffled_stream_takes_everything_once_a_lap_in_a_new_order():
    laps = [[shuffled(lap * 50 + i, 50, 0, 1) for i in range(50)] for lap in range(3)]
    assert all(sorted(lap) == list(range(50)) for lap in laps)
    assert laps[0] != laps[1] != laps[2]
    assert [shuffled(i, 50, 0, 2) for i in range(50)] != laps[0]


def test_fewer_samples_than_processes_are_refused():
    assert [key[0] for key in evaluation_keys(2, 1, rank=1, world_size=2)] == [1]
    with pytest.raises(InputError, match="1 samples for 2 processes: each process needs at least one"):
        evaluation_keys(1, 1, rank=0, world_size=2)
