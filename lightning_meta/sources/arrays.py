"""NumPy's archives."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.lib.npyio import NpzFile

_LARGEST = 2**30  # bytes of all arrays of an archive; what has more is out to fill memory


def open_npz(path: str | Path) -> "NpzFile":
    """The arrays of an .npz file by name; each is read when it is asked for, and none may hold objects.

    Raises:
        ValueError: They are larger than 1 GiB. Over a damaged file NumPy, zipfile and tokenize raise all sorts.
    """
    import numpy as np

    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _LARGEST:
            raise ValueError("it unpacks to more than 1 GiB")
    return np.load(path, allow_pickle=False)
