"""Data sets from the net: whole or not there."""

import contextlib
import http.client
import io
import os
import shutil
import socket
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_meta.errors import InputError


def download(name: str, fetch: Callable[[Path], object], files: Sequence[str], root: str | Path, by_hand: str) -> None:
    """Download a data set into a temporary folder and move its files to their place when all of them are there.

    Args:
        name: What an error calls the data set.
        fetch: Writes the files below the folder that it is given, with torchvision or urllib.
        files: Paths of the files, below that folder and then below ``root``.
        root: Folder to download into; made where it does not exist.
        by_hand: What to do instead where the download fails, for the error.

    Raises:
        InputError: If the download fails (a server silent for 10 seconds counts) or ``root`` cannot be written.
    """
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".download-", dir=root))  # the same disk, so that a move is atomic
    except OSError as error:
        raise InputError(
            f"cannot write {name} to {root} ({error.strerror}): choose a folder you can write to"
        ) from error
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)  # torchvision sets none and would wait for ever behind a silent firewall
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            fetch(folder)
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / file, root / file)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise InputError(f"{name} could not be downloaded to {root} ({reason}): {by_hand}") from error
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(folder, ignore_errors=True)
