"""Text as arrays of symbols: Penn Treebank, Wikipedia, the user's own file, and Python's help text as a stand-in.

N is the number of symbols of a part. A symbol is a Unicode code point (uint32) or a byte (uint8).
"""

import hashlib
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources.archives import AGAIN, archive_members, first_present, read_file
from lightning_meta.sources.download import download

_PTB = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
_PTB_FILES = {  # md5
    "ptb.train.txt": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "ptb.valid.txt": "aa0affc06ff7c36e977d7cd49e3839bf",
    "ptb.test.txt": "8b80168b89c18661a38ef683c0dc3721",
}
_PTB_SYMBOLS = 50
_WIKIPEDIA = {"enwik8": 205, "text8": 27}  # number of different symbols
_WIKIPEDIA_SIZE = 100_000_000  # bytes
_LARGEST = 2**30  # bytes of one unpacked file


class TextSplits(NamedTuple):
    """The three consecutive parts of one text."""

    train: np.ndarray  # (N,), uint32 or uint8
    val: np.ndarray
    test: np.ndarray


def penn_treebank(root: str | Path) -> TextSplits:
    """Read Penn Treebank as characters, in the split of Mikolov et al. (2012).

    Words are separated by one space and sentences by one newline. The spaces at the two ends of each line of Mikolov's
    files are removed: they are almost free to predict and would lower the bits per character by about 0.02. The
    original has 5,017,482, 393,042 and 442,423 characters, 50 different ones.

    Args:
        root: Folder that holds ``ptb/ptb.{train,valid,test}.txt`` (words; preferred) or
            ``ptb/ptb.char.{train,valid,test}.txt`` (characters separated by spaces, ``_`` for a space), plain or
            ``.gz``. Both give the same text.

    Raises:
        InputError: If a file is missing, unreadable or truncated, or the files have more than 50 different characters.
    """
    folder, parts = Path(root) / "ptb", []
    for name in _PTB_FILES:
        path = _ptb_file(root, name)
        if path is None:
            raise InputError(f"Penn Treebank: {name}[.gz] is missing: {_ptb_by_hand(root)}")
        characters = _characters(_content(path), path)
        if not characters.endswith("\n"):
            raise InputError(f"{path} is truncated, its last line does not end in a newline: {AGAIN}")
        if path.name.startswith("ptb.char."):
            characters = characters.replace(" ", "").replace("_", " ")
        lines = characters.removesuffix("\n").split("\n")
        parts.append(_code_points("".join(f"{line.strip(' ')}\n" for line in lines)))
    return _with_at_most(_PTB_SYMBOLS, TextSplits(*parts), "Penn Treebank", folder)


def has_penn_treebank(root: str | Path) -> bool:
    """Return whether all three files exist, as words or as characters.

    Broken files count as existing: ``penn_treebank`` then reports them, instead of a silent fallback to other data.
    """
    return all(_ptb_file(root, name) for name in _PTB_FILES)


def download_penn_treebank(root: str | Path) -> None:
    """Download Mikolov's three files of words into ``<root>/ptb``. A failed download leaves nothing behind.

    Args:
        root: Folder to download into; created if it does not exist.

    Raises:
        InputError: If the download fails, the server does not answer for 10 seconds, a checksum is wrong, or ``root``
            cannot be written.
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
                raise RuntimeError(f"simple-examples.tgz holds no {name} with the known checksum")
            (folder / "ptb" / name).write_bytes(content)

    download("Penn Treebank", fetch, [f"ptb/{name}" for name in _PTB_FILES], root, _ptb_by_hand(root))


def wikipedia(root: str | Path, name: str) -> TextSplits:
    """Read 100 MB of the English Wikipedia of 2006 (Mahoney; the data of the Hutter Prize).

    Args:
        root: Folder that holds ``text/enwik8`` or ``text/text8``, plain (preferred), ``.gz`` or ``.zip``.
        name: ``enwik8``, the bytes of its XML (205 different ones), or ``text8``, its plain text in 27 characters: a to
            z and the space.

    Returns:
        The usual split: the first 90 million symbols, the next 5 million and the last 5 million, uint8.

    Raises:
        InputError: If the file is missing, unreadable, not of 100,000,000 bytes, or has too many different symbols.
    """
    path = _wikipedia_file(root, name)
    if path is None:
        raise InputError(f"{name} is missing: {_wikipedia_by_hand(root, name)}")
    content = _content(path)
    if len(content) != _WIKIPEDIA_SIZE:
        raise InputError(f"{path} holds {len(content):,} bytes, but {name} has {_WIKIPEDIA_SIZE:,}: {AGAIN}")
    return _with_at_most(_WIKIPEDIA[name], _split(np.frombuffer(content, np.uint8)), name, path)


def has_wikipedia(root: str | Path, name: str) -> bool:
    """Return whether the file exists, plain or packed. As in ``has_penn_treebank``, a broken file counts."""
    return _wikipedia_file(root, name) is not None


def download_wikipedia(root: str | Path, name: str) -> None:
    """Download ``enwik8`` or ``text8`` to ``<root>/text/<name>.zip``. A failed download leaves nothing behind.

    Args:
        root: Folder to download into; created if it does not exist.
        name: As for ``wikipedia``.

    Raises:
        InputError: If the download fails, the server does not answer for 10 seconds, ``wikipedia`` refuses the file,
            or ``root`` cannot be written.
    """
    from torchvision.datasets.utils import download_url

    by_hand = _wikipedia_by_hand(root, name)

    def fetch(folder: Path) -> None:
        download_url(f"http://mattmahoney.net/dc/{name}.zip", folder / "text")
        with _failed_download(folder):
            wikipedia(folder, name)

    download(name, fetch, [f"text/{name}.zip"], root, by_hand)


def own_text(path: str | Path, kind: str) -> TextSplits:
    """Read any text file. The first 90 % are for training, the next 5 % for validation and the last 5 % for test.

    Args:
        path: The file, plain, ``.gz`` or a ``.zip`` that holds one file.
        kind: ``characters``: decode UTF-8, convert line ends to newlines and drop a byte order mark. ``bytes``: read
            the bytes unchanged.

    Raises:
        InputError: If the file is missing, unreadable, damaged, not UTF-8, or has fewer than 20 symbols.
    """
    _check_kind(kind)
    path = Path(path)
    content = _content(path)
    symbols = np.frombuffer(content, np.uint8) if kind == "bytes" else _code_points(_characters(content, path))
    if len(symbols) < 20:
        raise InputError(f"{path} has {len(symbols)} {kind}, too few to split: give at least 20 (better a million)")
    return _split(symbols)


def help_text(kind: str) -> TextSplits:
    """Return Python's own English help text, its topics sorted by name. Nothing is downloaded.

    Args:
        kind: ``bytes``: the text in UTF-8; 466,273 bytes in Python 3.11. ``characters``: in the style of Penn
            Treebank, with one sentence or heading per line, lower case, ``N`` for a number and little punctuation;
            412,398 characters in Python 3.11, 44 different ones. Other versions of Python differ a little.

    Returns:
        The first 90 %, the next 5 % and the last 5 %.

    Example:
        >>> train, val, test = help_text("characters")
        >>> train.dtype, bool(len(train) > 10 * len(test))
        (dtype('uint32'), True)
    """
    from pydoc_data.topics import topics

    _check_kind(kind)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    if kind == "bytes":
        return _split(np.frombuffer(text.encode(), np.uint8))
    text = re.sub(r"[‘’]", "'", re.sub(r"[“”]", '"', text.lower()))
    text = re.sub(r"\d+", "N", text)
    text = re.sub(r"([^\w\s])\1{3,}", " ", text)  # rules below headings
    text = re.sub(r"\n\s*\n|(?<=[.?!])\s+", "\0", text)  # ends of paragraphs and sentences
    text = re.sub(r"[^a-zN.,:;'\"()<>=_*/\0-]+", " ", text)
    return _split(_code_points(re.sub(r"[ \0]*\0[ \0]*", "\n", text).strip() + "\n"))


def vocabulary(text: TextSplits) -> np.ndarray:
    """Return the different symbols (V,) of all three parts, sorted, int64."""
    return np.flatnonzero(sum(_counts(*text)))


def unigram_bits(train: np.ndarray, test: np.ndarray) -> float:
    r"""Return the bits per symbol of a unigram model, which predicts each symbol by its frequency in training.

    .. math:: -\frac{1}{N} \sum_n \log_2 \frac{c(x_n) + 1}{\sum_v (c(v) + 1)}

    Here c counts symbols in the training part, v runs over the symbols of both parts, and adding 1 keeps the logarithm
    finite (Laplace smoothing).

    Args:
        train: Symbols to count, one axis.
        test: Symbols (N,) to predict.

    Example:
        >>> import numpy as np
        >>> unigram_bits(np.array([1, 2, 1, 2]), np.array([1, 2]))
        1.0
    """
    known, asked = _counts(train, test)
    seen = (known > 0) | (asked > 0)
    known, asked = known[seen] + 1, asked[seen]
    return float(asked @ (math.log2(known.sum()) - np.log2(known)) / asked.sum())


def compressed_bits(test: np.ndarray, how: str) -> float:
    """Return the bits per symbol after compression by a general-purpose compressor.

    Args:
        test: Bytes (N,), uint8, or code points (N,), which are compressed as UTF-8.
        how: ``gzip`` (zlib's level 9, without gzip's header) or ``xz`` (preset 9, extreme).

    Raises:
        InputError: If ``how`` is neither.

    Example:
        >>> import numpy as np
        >>> compressed_bits(np.zeros(800, np.uint8), "gzip") < 0.2
        True
    """
    if how not in ("gzip", "xz"):
        raise InputError(f"there is no compressor {how!r} here: choose gzip or xz")
    content = test.tobytes() if test.dtype == np.uint8 else test.astype("<u4").tobytes().decode("utf-32-le").encode()
    packed = zlib.compress(content, 9) if how == "gzip" else lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(test)


def _ptb_file(root: str | Path, name: str) -> Path | None:
    characters = name.replace("ptb.", "ptb.char.")
    return first_present(Path(root) / "ptb", name, f"{name}.gz", characters, f"{characters}.gz")


def _ptb_by_hand(root: str | Path) -> str:
    return f"get {_PTB} and put {', '.join(_PTB_FILES)} from its folder data into {Path(root) / 'ptb'}"


def _wikipedia_file(root: str | Path, name: str) -> Path | None:
    _check_name(name)
    return first_present(Path(root) / "text", name, f"{name}.gz", f"{name}.zip")


def _wikipedia_by_hand(root: str | Path, name: str) -> str:
    _check_name(name)
    return f"get mattmahoney.net/dc/{name}.zip and put it into {Path(root) / 'text'}"


def _check_name(name: str) -> None:
    if name not in _WIKIPEDIA:
        raise InputError(f"unknown text {name!r}: choose {' or '.join(_WIKIPEDIA)}")


def _check_kind(kind: str) -> None:
    if kind not in ("characters", "bytes"):
        raise InputError(f"a text cannot be read as {kind!r}: choose characters or bytes")


@contextmanager
def _failed_download(folder: Path) -> Iterator[None]:
    """Turn the refusal of a downloaded file into a failed download, and remove the temporary folder from its text."""
    try:
        yield
    except InputError as error:
        raise RuntimeError(str(error).replace(f"{folder}{os.sep}", "")) from error


def _content(path: Path) -> bytearray:
    """Return the content of a file, unpacked; it is never empty."""
    content = read_file(path, _LARGEST)
    if not content:
        raise InputError(f"{path} is empty: {AGAIN}")
    return content


def _characters(content: bytearray, path: Path) -> str:
    """Decode UTF-8, and end every line in a newline."""
    try:
        characters = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start:,} is 0x{content[error.start]:02x}): convert it, or read bytes"
        ) from error
    return characters.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _code_points(characters: str) -> np.ndarray:
    return np.frombuffer(characters.encode("utf-32-le"), "<u4")


def _split(symbols: np.ndarray) -> TextSplits:
    """Split into 90, 5 and 5 %, in order and without copies."""
    N = len(symbols)
    return TextSplits(*np.split(symbols, [N * 90 // 100, N * 95 // 100]))


def _with_at_most(most: int, text: TextSplits, name: str, path: Path) -> TextSplits:
    found = len(vocabulary(text))
    if found > most:
        raise InputError(f"{path} has {found} different symbols, but {name} has {most}: {AGAIN}")
    return text


def _counts(*parts: np.ndarray) -> list[np.ndarray]:
    """Count each symbol in each part, in chunks, because bincount copies its input to int64."""
    size, chunk = 1 + max(int(part.max()) for part in parts), 2**22
    return [sum(np.bincount(part[i : i + chunk], minlength=size) for i in range(0, len(part), chunk)) for part in parts]
