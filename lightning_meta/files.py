"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_meta.errors import InputError


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Gives a place beside ``path`` to write to, and moves it there at the end: a kill leaves the former file whole.

    Raises:
        InputError: If it cannot be written; what was there before is still there.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")  # on the same disk, so that the replacement is atomic
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(f"cannot write {path} ({error}): free the disk or choose another place") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, UTF-8, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
