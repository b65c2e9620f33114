"""Write files atomically: a reader sees the old file or the complete new one, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lightning_meta.errors import InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move the file to ``path`` at the end.

    If the process is killed or writing fails, the previous file stays as it was.

    Raises:
        InputError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/a.txt") as part:
        ...         _ = part.write_text("new")
        ...     Path(f"{folder}/a.txt").read_text()
        'new'
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
    """Return this process's rank: several processes of a run may write the same file at the same time."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def lost_worker(error: BaseException) -> bool:
    """Return whether the error says that a data loader's worker process died, or that its connection broke."""
    died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
    return died or isinstance(error, ConnectionResetError)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
