"""Every training batch is a pure function of the schedule, the seed and its number."""

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
    """Inner steps ``start <= t < stop`` of inner problem number ``problem``: the reach of one outer step."""

    problem: int
    start: int
    stop: int
    last: bool  # the problem ends with this segment
    episode: Episode | None = None  # where the problem is one


Key = tuple[int, Segment]  # what a data set's ``__getitem__`` gets: which sample, and which part of it


class SegmentSampler(Sampler[list[Key]]):
    """Batches of keys for training, endless; batch `i` depends on `i`, the rank and nothing else.

    Every segment of one problem names the same samples, so that a carried state meets the samples it belongs to. Two
    ranks with ``batch_size`` samples each see together what one rank with twice the batch sees.

    Args:
        segments: Makes the segments of batches 0, 1, 2, ... (``MetaSchedule.segments``).
        first: Says which batch comes first; asked at each ``iter``, so that a resumed run goes on where it was.
        length: Batches in the run, for the progress bar.
        batch_size: Samples a rank and batch.
        rank: This process.
        world_size: All processes.
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
    """This rank's part of ``samples`` whole problems of ``horizon`` steps, in a fixed order, each on one rank.

    Raises:
        InputError: A rank would have none, and the others would wait for it.
    """
    if samples < world_size:
        raise InputError(f"{samples} samples for {world_size} processes: each needs one; lower --trainer.devices")
    return [(index, Segment(index, 0, horizon, True, episode)) for index in range(rank, samples, world_size)]
