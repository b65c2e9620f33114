"""Download data sets completely or not at all."""

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
    """Download a data set into a temporary folder, and move its files to ``root`` when all are complete.

    Args:
        name: Name of the data set for error messages.
        fetch: Function that downloads the files into the folder that it is given, with torchvision or urllib.
        files: Paths of the files, relative to that folder and to ``root``.
        root: Folder to download into; created if it does not exist.
        by_hand: Instructions for a download by hand, for error messages.

    Raises:
        InputError: If the download fails, the server does not answer for 10 seconds, or ``root`` cannot be written.
    """
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".download-", dir=root))  # on the same disk, so that a move is atomic
    except OSError as error:
        raise InputError(
            f"cannot write {name} to {root} ({error.strerror}): choose a folder you can write to"
        ) from error
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)  # torchvision sets no timeout, and behind a firewall it would wait for ever
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # no progress bars
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
