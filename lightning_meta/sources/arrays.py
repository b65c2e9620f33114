"""NumPy archives (.npz) with limited size."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.lib.npyio import NpzFile

_LARGEST = 2**30  # bytes of all arrays of an archive


def open_npz(path: str | Path) -> "NpzFile":
    """Open an .npz file as a mapping from names to arrays. Arrays are read on access and must not hold objects.

    Raises:
        ValueError: If all arrays together are larger than 1 GiB. For a damaged file NumPy, zipfile and tokenize raise
            all sorts of exceptions.
    """
    import numpy as np

    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _LARGEST:
            raise ValueError("it unpacks to more than 1 GiB")
    return np.load(path, allow_pickle=False)
