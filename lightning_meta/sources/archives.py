"""Files of data sets, read into memory without trust: nothing is unpacked to disk, and sizes are limited.

Of a damaged file the standard library raises all sorts of exceptions; here each becomes a one-line InputError.
"""

import gzip
import os
import stat
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from lightning_meta.errors import InputError

AGAIN = "copy or download it again"
_LARGEST, _LARGEST_SUM = 2**26, 2**29  # bytes of one unpacked file (a batch of CIFAR-10 has 31 million) and of all
_RATIO = 20  # an archive may also unpack to this many times its own size


def first_present(folder: Path, *names: str) -> Path | None:
    """Return the first of these files that is in the folder. A dangling link counts, as a file that is broken."""
    return next((folder / name for name in names if os.path.lexists(folder / name)), None)


def read_file(path: Path, largest: int) -> bytearray:
    """Read a file, unpacked in memory if its name ends in ``.gz`` or ``.zip``. A ``.zip`` must hold exactly one file.

    Args:
        path: The file.
        largest: Largest number of bytes that it may hold, unpacked.

    Raises:
        InputError: If the file is missing, unreadable, damaged, encrypted or larger than ``largest``, or a ``.zip``
            that holds no file or several.
    """
    packed = path.suffix.lower()
    if packed == ".zip":
        files = [file for _, file in archive_members(path, lambda name: True, largest) if file is not None]
        if len(files) != 1:
            raise InputError(f"{path} holds {len(files)} files: give a .zip that holds exactly one")
        return bytearray(files[0])
    content = bytearray()
    try:
        with (gzip.open if packed == ".gz" else open)(path, "rb") as file:
            while len(content) <= largest and (block := file.read(2**20)):
                content += block
    except Exception as error:
        raise _refusal(path, packed, error) from error
    if len(content) > largest:
        raise InputError(f"{path} holds more than {largest:,} bytes: give a smaller file")
    return content


def archive_members(
    path: Path, wanted: Callable[[PurePosixPath], bool], largest: int = _LARGEST
) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Yield the folders (with None) and the wanted files (with their content) of an archive. Links are skipped.

    Args:
        path: A ``.zip`` or ``.npz``, or a ``.tar`` in any compression that ``tarfile`` reads. Nothing is written.
        wanted: Whether to read the file of this name.
        largest: Largest size in bytes of one unpacked file.

    Raises:
        InputError: If the archive is missing, damaged, encrypted or of another kind, has paths that leave it, a wanted
            file larger than ``largest``, or unpacks to more than 512 MiB and 20 times its own size.
    """

    def checked_name(name: str) -> PurePosixPath:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise InputError(f"{path} holds {name!r}, which lies outside of it: do not trust this archive")
        return inside

    def check_size(name: PurePosixPath, size: int) -> None:
        nonlocal left
        if size > largest:
            raise InputError(
                f"{path} holds {name} of {size:,} bytes, more than {largest:,}: make it smaller or remove it"
            )
        left -= size
        if left < 0:
            raise InputError(f"{path} unpacks to many times its own size: do not trust this archive")

    try:
        left = max(_LARGEST_SUM, _RATIO * path.stat().st_size)
        if path.suffix.lower() in (".zip", ".npz"):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    name = checked_name(member.filename)
                    if member.is_dir():
                        yield name, None
                    elif wanted(name) and not stat.S_ISLNK(member.external_attr >> 16):
                        check_size(name, member.file_size)
                        yield name, _read_member(archive, member)
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = checked_name(member.name)
                    if member.isdir():
                        yield name, None
                    elif member.isreg() and wanted(name):
                        check_size(name, member.size)
                        yield name, archive.extractfile(member).read()
                # tarfile takes a damaged header for the end and reads neither what follows nor the checksum
                while rest := archive.fileobj.read(2**20):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("data follow its end")
    except InputError:
        raise
    except Exception as error:
        raise _refusal(path, ".zip, .npz or .tar", error) from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Read a file of a ``.zip``, and at most as many bytes as its header says (``archive.read`` has no limit)."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
        raise zipfile.BadZipFile("it is not compressed by deflate")
    with archive.open(member) as file:
        content = file.read(member.file_size)
        if len(content) < member.file_size or file.read(1):
            raise zipfile.BadZipFile(f"the size of {member.filename!r} differs from its header")
    return content


def _refusal(path: Path, kind: str, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{path} cannot be read ({error.strerror}): put a readable file there")
    return InputError(f"{path} is damaged, encrypted, or no {kind} file ({reason(error)}): {AGAIN}")


def reason(error: Exception) -> str:
    """Return the first line of an exception's message, shortened, or else the name of its class."""
    return textwrap.shorten((str(error) or type(error).__name__).splitlines()[0].rstrip(":"), 120, placeholder=" ...")
