"""Random numbers of a sample as a pure function of a key such as (seed, split, index), in any process."""

from functools import lru_cache

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """Random numbers for one sample: the same key (seed, split, index) gives the same numbers in any process."""
    return np.random.default_rng(key)


def seed_of(*key: int) -> int:
    """A seed for generators that take one number, as scattered as the key's ``generator``."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def shuffled(position: int, size: int, *key: int) -> int:
    """Element ``position`` of an endless stream that runs through ``range(size)`` in a new random order each time."""
    lap, place = divmod(position, size)
    return int(_permutation(size, *key, lap, 1)[place])  # 1: numbers of its own, apart from those of sample `lap`


@lru_cache(maxsize=8)  # neighbouring samples share a lap
def _permutation(size: int, *key: int) -> np.ndarray:
    return generator(*key).permutation(size)
