"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lightning_meta.errors import InputError


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Gives a place beside ``path`` to write to, and moves it there at the end: a kill leaves the former file whole.

    Raises:
        InputError: If it cannot be written; what was there before is still there.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part{_rank() or ''}")  # on the same disk, so that the replacement is atomic
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if lost_worker(error):
            raise
        raise InputError(f"cannot write {path} ({error}): free the disk or choose another place") from error
    finally:
        part.unlink(missing_ok=True)


def _rank() -> int:
    """This process's number among those of a run, which may write the same file at the same time."""
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )


def lost_worker(error: BaseException) -> bool:
    """Whether a process of a data loader died: torch says so, or the batch that it was handing over was cut off."""
    said = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    return said or isinstance(error, ConnectionResetError)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, UTF-8, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
