"""Text as rows of symbols: Penn Treebank, Wikipedia, a user's own file, and Python's help text as a stand-in.

N is the number of symbols of a part. A symbol is a Unicode code point (uint32) or a byte (uint8).
"""

import gzip
import hashlib
import lzma
import math
import os
import re
import textwrap
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources.cifar import archive_members
from lightning_meta.sources.download import download

_PTB = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
_PTB_FILES = {  # md5
    "ptb.train.txt": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "ptb.valid.txt": "aa0affc06ff7c36e977d7cd49e3839bf",
    "ptb.test.txt": "8b80168b89c18661a38ef683c0dc3721",
}
_PTB_SYMBOLS = 50
_WIKIPEDIA = {"enwik8": 205, "text8": 27}  # different symbols
_WIKIPEDIA_SIZE = 100_000_000  # bytes
_LARGEST = 2**30  # bytes of one unpacked file: what has more is out to fill memory
_AGAIN = "copy or download it again"


class Text(NamedTuple):
    """One text in three parts, in its own order. Validation is for early stopping."""

    train: np.ndarray  # (N,), uint32 or uint8
    val: np.ndarray
    test: np.ndarray


def penn_treebank(root: str | Path) -> Text:
    """Read Penn Treebank as characters, in the split of Mikolov et al. (2012). Writes nothing.

    Words are separated by one blank and sentences by one newline, without the blanks that Mikolov's files have at the
    two ends of each line: they are nearly free to predict, and would flatter bits per character by some 0.02. The
    original has 5,017,482, 393,042 and 442,423 characters, 50 different ones.

    Args:
        root: Folder that holds ``ptb/ptb.{train,valid,test}.txt`` (words; preferred) or
            ``ptb/ptb.char.{train,valid,test}.txt`` (characters with blanks between them, ``_`` for a blank), plain or
            ``.gz``. Both give the same text.

    Raises:
        InputError: If a file is missing, unreadable or cut short, or has other characters than Penn Treebank.
    """
    folder, parts = Path(root) / "ptb", []
    for name in _PTB_FILES:
        path = _ptb_file(root, name)
        if path is None:
            raise InputError(f"Penn Treebank: {name}[.gz] is missing: {_ptb_by_hand(root)}")
        characters = _characters(_content(path), path)
        if not characters.endswith("\n"):
            raise InputError(f"{path} is cut short, its last line has no end: {_AGAIN}")
        if path.name.startswith("ptb.char."):
            characters = characters.replace(" ", "").replace("_", " ")
        lines = characters.removesuffix("\n").split("\n")
        parts.append(_code_points("".join(f"{line.strip(' ')}\n" for line in lines)))
    return _with_at_most(_PTB_SYMBOLS, Text(*parts), "Penn Treebank", folder)


def has_penn_treebank(root: str | Path) -> bool:
    """Whether all three files are there, of words or of characters.

    A file that is there but broken counts: ``penn_treebank`` then names it, and nobody falls back to other data
    unawares.
    """
    return all(_ptb_file(root, name) for name in _PTB_FILES)


def download_penn_treebank(root: str | Path) -> None:
    """Download Mikolov's files of words into ``<root>/ptb``: all three, with the known checksums, or none.

    Args:
        root: Folder to download into; made where it does not exist.

    Raises:
        InputError: If the download fails (a server silent for 10 seconds counts), the archive is not the known one, or
            ``root`` cannot be written.
    """
    from torchvision.datasets.utils import download_url

    members = [PurePosixPath("simple-examples/data", name) for name in _PTB_FILES]

    def fetch(folder: Path) -> None:
        download_url(_PTB, folder)
        with _failed_download(folder):
            found = dict(archive_members(folder / "simple-examples.tgz", members.__contains__))
        (folder / "ptb").mkdir()
        for member, (name, md5) in zip(members, _PTB_FILES.items(), strict=True):
            content = found.get(member) or b""
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise RuntimeError(f"simple-examples.tgz has no {name} or not the known one")
            (folder / "ptb" / name).write_bytes(content)

    download("Penn Treebank", fetch, [f"ptb/{name}" for name in _PTB_FILES], root, _ptb_by_hand(root))


def wikipedia(root: str | Path, name: str) -> Text:
    """Read 100 MB of the English Wikipedia of 2006 (Mahoney; the Hutter Prize's data). Writes nothing.

    Args:
        root: Folder that holds ``text/enwik8`` or ``text/text8``, plain (preferred), ``.gz`` or ``.zip``.
        name: ``enwik8``, the bytes of its XML (205 different ones), or ``text8``, its plain text in 27 characters: a to
            z and the blank.

    Returns:
        The first 90 million symbols, the next 5 and the last 5: the usual split. uint8 for text8 too, it is ASCII.

    Raises:
        InputError: If the file is missing, unreadable, not of 100,000,000 bytes, or not what its name says.
    """
    path = _wikipedia_file(root, name)
    if path is None:
        raise InputError(f"{name} is missing: {_wikipedia_by_hand(root, name)}")
    content = _content(path)
    if len(content) != _WIKIPEDIA_SIZE:
        raise InputError(f"{path} holds {len(content):,} bytes, {name} has {_WIKIPEDIA_SIZE:,}: {_AGAIN}")
    return _with_at_most(_WIKIPEDIA[name], _split(np.frombuffer(content, np.uint8)), name, path)


def has_wikipedia(root: str | Path, name: str) -> bool:
    """Whether the file is there, plain or packed; broken counts, as for ``has_penn_treebank``."""
    return _wikipedia_file(root, name) is not None


def download_wikipedia(root: str | Path, name: str) -> None:
    """Download ``enwik8`` or ``text8`` to ``<root>/text/<name>.zip``: whole or not at all.

    Args:
        root: Folder to download into; made where it does not exist.
        name: As for ``wikipedia``.

    Raises:
        InputError: If the download fails (a server silent for 10 seconds counts), ``wikipedia`` would refuse what came,
            or ``root`` cannot be written.
    """
    from torchvision.datasets.utils import download_url

    by_hand = _wikipedia_by_hand(root, name)

    def fetch(folder: Path) -> None:
        download_url(f"http://mattmahoney.net/dc/{name}.zip", folder / "text")
        with _failed_download(folder):
            wikipedia(folder, name)

    download(name, fetch, [f"text/{name}.zip"], root, by_hand)


def own_text(path: str | Path, kind: str) -> Text:
    """Read any text file: the first 90 % to train on, the next 5 to validate and the last 5 to test.

    Args:
        path: The file, plain, ``.gz`` or a ``.zip`` that holds one file.
        kind: ``characters``: it must be UTF-8; lines end in one newline, whatever system it comes from, and a byte
            order mark is dropped. ``bytes``: as it is.

    Raises:
        InputError: If the file is missing, unreadable, damaged, not UTF-8, or has fewer than 20 symbols.
    """
    _check_kind(kind)
    path = Path(path)
    content = _content(path)
    symbols = np.frombuffer(content, np.uint8) if kind == "bytes" else _code_points(_characters(content, path))
    if len(symbols) < 20:
        raise InputError(f"{path} has {len(symbols)} {kind}, too few to split: give at least 20, better a million")
    return _split(symbols)


def help_text(kind: str) -> Text:
    """The English help text that comes with Python, its topics by name: nothing is downloaded.

    Args:
        kind: ``bytes``: as it is, in UTF-8; 466,273 with Python 3.11. ``characters``: made like Penn Treebank, a
            sentence or heading a line, small letters, ``N`` for a number, a little punctuation, 44 different
            characters; 412,398 with Python 3.11. Other versions of Python have a little more or less.

    Returns:
        The first 90 %, the next 5 and the last 5.
    """
    from pydoc_data.topics import topics

    _check_kind(kind)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    if kind == "bytes":
        return _split(np.frombuffer(text.encode(), np.uint8))
    text = re.sub(r"[‘’]", "'", re.sub(r"[“”]", '"', text.lower()))
    text = re.sub(r"\d+", "N", text)
    text = re.sub(r"([^\w\s])\1{3,}", " ", text)  # lines under headings
    text = re.sub(r"\n\s*\n|(?<=[.?!])\s+", "\0", text)  # ends of paragraphs and of sentences
    text = re.sub(r"[^a-zN.,:;'\"()<>=_*/\0-]+", " ", text)
    return _split(_code_points(re.sub(r"[ \0]*\0[ \0]*", "\n", text).strip() + "\n"))


def vocabulary(text: Text) -> np.ndarray:
    """The different symbols of all three parts (V,), sorted, int64."""
    return np.flatnonzero(sum(_counts(*text)))


def unigram_bits(train: np.ndarray, test: np.ndarray) -> float:
    r"""Bits a symbol of the best guess that knows no context: how often each symbol came in training.

    .. math:: -\frac{1}{N} \sum_n \log_2 \frac{c(x_n) + 1}{\sum_v (c(v) + 1)}

    Here c counts the training part's symbols; v runs over the symbols of both parts, and the 1 keeps it finite.

    Args:
        train: Symbols (N,) to count.
        test: Symbols (N,) to guess.
    """
    known, asked = _counts(train, test)
    seen = (known > 0) | (asked > 0)
    known, asked = known[seen] + 1, asked[seen]
    return float(asked @ (math.log2(known.sum()) - np.log2(known)) / asked.sum())


def compressed_bits(test: np.ndarray, how: str) -> float:
    """Bits a symbol of these symbols packed by a general compressor, all by themselves.

    Args:
        test: Bytes (N,), uint8, or code points (N,), packed as UTF-8.
        how: ``gzip`` (zlib's level 9, without gzip's header) or ``xz`` (preset 9, extreme).

    Raises:
        InputError: If ``how`` is neither.
    """
    if how not in ("gzip", "xz"):
        raise InputError(f"there is no compressor {how!r} here: choose gzip or xz")
    content = test.tobytes() if test.dtype == np.uint8 else test.astype("<u4").tobytes().decode("utf-32-le").encode()
    packed = zlib.compress(content, 9) if how == "gzip" else lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(test)


def _present(folder: Path, *names: str) -> Path | None:
    # lexists: a dangling link is a broken file, not an absent one
    return next((folder / name for name in names if os.path.lexists(folder / name)), None)


def _ptb_file(root: str | Path, name: str) -> Path | None:
    characters = name.replace("ptb.", "ptb.char.")
    return _present(Path(root) / "ptb", name, f"{name}.gz", characters, f"{characters}.gz")


def _ptb_by_hand(root: str | Path) -> str:
    return f"get {_PTB} and put {', '.join(_PTB_FILES)} of its folder data into {Path(root) / 'ptb'}"


def _wikipedia_file(root: str | Path, name: str) -> Path | None:
    _check_name(name)
    return _present(Path(root) / "text", name, f"{name}.gz", f"{name}.zip")


def _wikipedia_by_hand(root: str | Path, name: str) -> str:
    _check_name(name)
    return f"get mattmahoney.net/dc/{name}.zip and put it into {Path(root) / 'text'}"


def _check_name(name: str) -> None:
    if name not in _WIKIPEDIA:
        raise InputError(f"there is no {name!r} here: choose {' or '.join(_WIKIPEDIA)}")


def _check_kind(kind: str) -> None:
    if kind not in ("characters", "bytes"):
        raise InputError(f"a text cannot be read as {kind!r}: choose characters or bytes")


@contextmanager
def _failed_download(folder: Path) -> Iterator[None]:
    """Turns a refusal of what was downloaded into a failure of the download, which knows no temporary folder."""
    try:
        yield
    except InputError as error:
        raise RuntimeError(str(error).replace(f"{folder}{os.sep}", "")) from error


def _content(path: Path) -> bytearray:
    """What a file holds, unpacked in memory where its name ends in .gz or .zip, and never nothing."""
    content, packed = bytearray(), path.suffix.lower()
    try:
        with open(path, "rb") as file:
            if packed == ".gz":
                file = gzip.GzipFile(fileobj=file)
            elif packed == ".zip":
                file = _only_member(path, zipfile.ZipFile(file))
            while block := file.read(2**20):
                content += block
                if len(content) > _LARGEST:
                    raise InputError(f"{path} holds more than {_LARGEST:,} bytes: give a part of it")
    except InputError:
        raise
    except Exception as error:  # over a damaged archive gzip and zipfile raise all sorts
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{path} cannot be read ({error.strerror}): put a text file there") from error
        reason = textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" ...")
        raise InputError(f"{path} is damaged, encrypted, or no {packed} file ({reason}): {_AGAIN}") from error
    if not content:
        raise InputError(f"{path} is empty: {_AGAIN}")
    return content


def _only_member(path: Path, archive: zipfile.ZipFile) -> IO[bytes]:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise InputError(f"{path} holds {len(members)} files: pack one text alone")
    name, size = PurePosixPath(members[0].filename), members[0].file_size
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"{path} holds {str(name)!r}, which lies outside of it: do not trust this archive")
    if size > _LARGEST:
        raise InputError(f"{path} holds a file of {size:,} bytes, more than {_LARGEST:,}: give a part of it")
    if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
        raise InputError(f"{path} is packed with something else than deflate: pack it again")
    return archive.open(members[0])


def _characters(content: bytearray, path: Path) -> str:
    """UTF-8 with one newline at the end of each line, whatever system it comes from."""
    try:
        characters = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8, its byte {error.start:,} is 0x{content[error.start]:02x}: convert it, or read bytes"
        ) from error
    return characters.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _code_points(characters: str) -> np.ndarray:
    return np.frombuffer(characters.encode("utf-32-le"), "<u4")


def _split(symbols: np.ndarray) -> Text:
    """90, 5 and 5 % in order, without copies."""
    N = len(symbols)
    return Text(*np.split(symbols, [N * 90 // 100, N * 95 // 100]))


def _with_at_most(most: int, text: Text, name: str, path: Path) -> Text:
    found = len(vocabulary(text))
    if found > most:
        raise InputError(f"{path} has {found} different symbols, {name} has {most}: {_AGAIN}")
    return text


def _counts(*parts: np.ndarray) -> list[np.ndarray]:
    """How often each symbol comes in each part, a piece at a time: bincount turns what it counts into int64."""
    size, piece = 1 + max(int(part.max()) for part in parts), 2**22
    return [sum(np.bincount(part[i : i + piece], minlength=size) for i in range(0, len(part), piece)) for part in parts]
