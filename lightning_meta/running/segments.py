"""Segments of inner problems, and the samplers that turn them into batches.

A training batch is a pure function of the schedule, the seed, the rank and the number of the batch.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from torch.utils.data import Sampler

from lightning_meta.errors import InputError


class Episode(NamedTuple):
    """The shape of a few-shot problem."""

    ways: int  # classes
    shots: int  # exemplars of each class
    queries: int  # further examples of each class


class Segment(NamedTuple):
    """The inner steps ``start <= t < stop`` of one inner problem, which one outer step covers."""

    problem: int
    start: int
    stop: int
    last: bool  # whether the problem ends with this segment
    episode: Episode | None = None  # the shape, if the problem is an episode


Key = tuple[int, Segment]  # the argument of a data set's ``__getitem__``: number of the sample, and which part of it


class SegmentSampler(Sampler[list[Key]]):
    """Yield batches of keys for training, without end; batch `i` depends on `i` and the rank only.

    All segments of a problem have the same samples, so a carried state meets the samples that it belongs to. Two ranks
    with ``batch_size`` samples each see together what one rank with twice the batch size sees.

    Args:
        segments: Function that yields the segments of batches 0, 1, 2, ... (``MetaSchedule.segments``).
        first: Function that returns the number of the first batch. It is called at each ``iter``, so a resumed run
            continues where it stopped.
        length: Number of batches in the run, for the progress bar.
        batch_size: Number of samples of one rank in a batch.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        segments: Callable[[], Iterator[Segment]],
        first: Callable[[], int],
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.segments, self.first, self.length = segments, first, length
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[Key]]:
        for segment in islice(self.segments(), self.first(), None):
            index = (segment.problem * self.world_size + self.rank) * self.batch_size
            yield [(index + j, segment) for j in range(self.batch_size)]

    def __len__(self) -> int:
        return self.length


def evaluation_keys(
    samples: int, horizon: int, rank: int = 0, world_size: int = 1, episode: Episode | None = None
) -> list[Key]:
    """Return this rank's keys of ``samples`` whole problems of ``horizon`` steps, in a fixed order.

    Raises:
        InputError: If there are fewer samples than ranks; the others would wait for a rank without samples.

    >>> [index for index, segment in evaluation_keys(5, horizon=10, rank=1, world_size=2)]
    [1, 3]
    """
    if samples < world_size:
        raise InputError(
            f"{samples} samples for {world_size} processes: each process needs at least one; lower --trainer.devices"
        )
    return [(index, Segment(index, 0, horizon, True, episode)) for index in range(rank, samples, world_size)]
