"""Random numbers as a pure function of a key such as (seed, split, index), the same in every process."""

from functools import lru_cache

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """Return a random generator for one sample: the same key gives the same numbers in every process.

    Example:
        >>> a, b = generator(0, 1, 2), generator(0, 1, 2)
        >>> bool(a.random() == b.random())
        True
    """
    return np.random.default_rng(key)


def seed_of(*key: int) -> int:
    """Return a 64-bit seed for generators that take a single number, independent between keys.

    Example:
        >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(0, 2)
        (True, False)
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def shuffled(position: int, size: int, *key: int) -> int:
    """Return element ``position`` of an endless stream of epochs, each a new random permutation of ``range(size)``.

    Example:
        >>> sorted(shuffled(position, 4, 0) for position in range(4, 8))
        [0, 1, 2, 3]
    """
    epoch, place = divmod(position, size)
    return int(_permutation(size, *key, epoch, 1)[place])  # the 1 makes the key differ from that of sample `epoch`


@lru_cache(maxsize=8)  # neighbouring samples are in the same epoch
def _permutation(size: int, *key: int) -> np.ndarray:
    return generator(*key).permutation(size)
