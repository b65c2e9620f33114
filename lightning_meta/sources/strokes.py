"""Online handwriting: IAM-OnDB, stroke files, the user's own lines, and words in stroke fonts as a stand-in.

T is the number of points of a sequence. A sequence is (T, 3), float32. Each row is dx, dy, e: the offset from the
previous point, with y downwards, and 1 if the pen is lifted after this point, else 0. The first offset is zero.
"""

import io
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.parsers import expat

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources import restricted_pickle
from lightning_meta.sources.archives import AGAIN, archive_members, first_present, reason
from lightning_meta.sources.seeding import generator

_TRAIN, _VALIDATION = ("trainset.txt", "testset_f.txt"), ("testset_v.txt", "testset_t.txt")
_LINES, _TASK = "lineStrokes", "task1"
_ARCHIVES = "lineStrokes-all.tar.gz", "lineStrokes-all.tar.xz"
_HOW_TO_GET = "get it from the IAM On-Line Handwriting Database (fki.tic.heia-fr.ch, free after registration)"
_LARGEST = 2**28  # bytes of one unpacked part of a stroke file
_LARGEST_TEXT = 2**24  # bytes of an XML file; a long line of IAM-OnDB has 100,000


class Strokes(NamedTuple):
    """Sequences (T, 3) of different lengths T."""

    train: list[np.ndarray]
    val: list[np.ndarray]
    test: list[np.ndarray]


def from_lines(lines: Sequence[np.ndarray]) -> np.ndarray:
    """Convert strokes to a sequence (T, 3). A stroke is the points (n, 2), x and y, that the pen touches in turn.

    Example:
        >>> import numpy as np
        >>> from_lines([np.array([[1, 2], [3, 5]]), np.array([[4, 4]])]).tolist()
        [[0.0, 0.0, 0.0], [2.0, 3.0, 1.0], [1.0, -1.0, 1.0]]
    """
    points = np.concatenate(lines).astype(np.float64)
    sequence = np.zeros((len(points), 3), np.float32)
    sequence[1:, :2] = np.diff(points, axis=0)
    sequence[np.cumsum([len(line) for line in lines]) - 1, 2] = 1
    return sequence


def to_lines(sequence: np.ndarray, scale: Sequence[float] = (1.0, 1.0)) -> list[np.ndarray]:
    """Convert a sequence to strokes: the inverse of ``from_lines``, up to the position of the first point.

    Args:
        sequence: Offsets and pen states (T, 3).
        scale: Factors to multiply dx and dy by.

    Returns:
        The points (n, 2), float64, of each stroke.

    Example:
        >>> import numpy as np
        >>> [stroke.tolist() for stroke in to_lines(np.array([[0, 0, 0], [2, 3, 1], [1, -1, 1]]))]
        [[[0.0, 0.0], [2.0, 3.0]], [[3.0, 2.0]]]
    """
    points = np.cumsum(sequence[:, :2] * np.asarray(scale, np.float64), axis=0)
    return np.split(points, np.flatnonzero(sequence[:-1, 2] > 0.5) + 1)


def offset_scale(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Return the standard deviations (2,), float32, of dx and dy, by which offsets are divided for a network.

    The paper does not say: we use one number for dx and one for dy, as in Graves 2013 (from memory). Graves also
    subtracts the mean, which changes only a bias of the network; here a zero offset stays zero.

    Raises:
        InputError: If all dx or all dy are equal.
    """
    scale = np.concatenate([sequence[:, :2] for sequence in sequences]).std(0, dtype=np.float64)
    if not scale.all():
        raise InputError("the pen of the training strokes moves along one axis only: give strokes of two dimensions")
    return scale.astype(np.float32)


def iam_online(root: str | Path, shortest: int = 300) -> Strokes:
    """Read IAM-OnDB (Liwicki and Bunke 2005): lines of English that 221 people wrote on a whiteboard.

    The split is that of Graves 2013. The training set, the final test set and the larger validation set are used for
    training. The smaller validation set (1,438 of 12,179 lines) serves for both validation and test, because no set is
    left for testing. The lines are counted to find the larger validation set. We recalled from memory that
    ``testset_v.txt`` and ``testset_t.txt`` are the validation sets and ``testset_f.txt`` is the final test set.

    Args:
        root: Folder that holds ``iam-ondb/``. In it are the lines, as a folder ``lineStrokes/`` (preferred),
            ``lineStrokes-all.tar.gz`` or ``.tar.xz``, and the four lists of form names, as files or in ``task1/``,
            ``task1.tar.gz`` or ``task1.zip``. Archives are read in memory.
        shortest: Skip lines with fewer points; 300 in the paper.

    Returns:
        The lines in pen units, in the order of the lists.

    Raises:
        InputError: If a file is missing, damaged or empty, a list names a form that has no lines, or no line is long
            enough.
    """
    folder = Path(root) / "iam-ondb"
    forms = {name: text.decode(errors="replace").split() for name, text in _lists(folder)}
    lines = _iam_lines(folder, {form for names in forms.values() for form in names})
    parts = {}
    for name, listed in forms.items():
        for form in listed:
            if form not in lines:
                raise InputError(
                    f"IAM-OnDB: {name} names {form[:40]!r}, which has no lines in {folder}: copy the lines again or "
                    "take the name off the list"
                )
        parts[name] = [line for form in listed for _, line in sorted(lines[form].items())]
    smaller, larger = sorted(_VALIDATION, key=lambda name: len(parts[name]))
    train, val = [], [line for line in parts[smaller] if len(line) >= shortest]
    for name in (*_TRAIN, larger):
        train += [line for line in parts[name] if len(line) >= shortest]
    if not train or not val:
        purpose = "test on" if train else "train on"
        raise InputError(f"{folder} holds no lines of at least {shortest} points to {purpose}: lower the limit")
    return Strokes(train, val, val)


def has_iam_online(root: str | Path) -> bool:
    """Return whether the lines exist, as a folder or an archive. ``iam_online`` checks the rest."""
    return any(os.path.lexists(Path(root) / "iam-ondb" / name) for name in (_LINES, *_ARCHIVES))


def stroke_file(path: str | Path) -> Strokes:
    """Read a ``.npz`` in sketch-rnn's format (Ha and Eck 2017) without executing its pickles.

    Args:
        path: The file. Its keys are ``train``, ``valid`` and ``test``, each an object array of N sequences (T, 3) of
            integers or floats, or one array (N, T, 3).

    Raises:
        InputError: If the file is missing, damaged or truncated, a pickle requests anything but arrays, a key is
            missing, or a sequence is empty, has another shape, is not finite, or has a pen state other than 0 and 1.
    """
    path = Path(path)
    files = {key: PurePosixPath(f"{key}.npy") for key in ("train", "valid", "test")}
    contents = dict(archive_members(path, lambda name: name in files.values(), _LARGEST))
    for key, file in files.items():
        if file not in contents:
            raise InputError(f"{path} has no key {key}: save arrays train, valid and test with numpy.savez")
    return Strokes(*(_part(contents[file], f"{path}: {key}") for key, file in files.items()))


def read_line(path: str | Path) -> np.ndarray:
    """Read one sequence (T, 3) from an XML file in IAM-OnDB's format.

    Raises:
        InputError: If the file is missing, damaged or holds no strokes.
    """
    return _pen(_read(Path(path)), str(path))


def own_strokes(path: str | Path) -> Strokes:
    """Read the user's own strokes.

    Args:
        path: A ``.npz`` as for ``stroke_file``, or a folder of XML files in IAM-OnDB's format with one sequence each.
            Sorted by path, the last 5 % of the files are for testing and the 5 % before them for validation, at least
            one file each.

    Raises:
        InputError: As for ``stroke_file``, or if the folder is missing, has fewer than 3 files or a damaged one.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return stroke_file(path)
    if not path.is_dir():
        raise InputError(f"{path} is neither a folder nor a .npz file: give a folder of XML files of strokes or a .npz")
    lines = [_pen(content, where) for _, where, content in _files(path)]
    if len(lines) < 3:
        raise InputError(f"{path} holds {len(lines)} XML files: give at least 3, to train, validate and test on")
    n = max(1, len(lines) // 20)
    return Strokes(lines[: -2 * n], lines[-2 * n : -n], lines[-n:])


# For each font, the distance between two strokes below which the pen stays down, in the font's units (a small letter is
# 14 high). The package's other Latin fonts are copies of these two or outlines of bold letters.
_FONTS = {"scripts": 6.5, "futural": 0.0}
_BASE = 9  # y of the baseline


def hershey_words(train: int = 2000, val: int = 200, test: int = 200, seed: int = 0) -> Strokes:
    """Write ``train``, ``val`` and ``test`` lines with ``hershey_line``: handwriting without a download."""
    return Strokes(
        *([hershey_line(seed, split, i)[1] for i in range(count)] for split, count in enumerate((train, val, test)))
    )


def hershey_line(seed: int, split: int, index: int) -> tuple[str, np.ndarray]:
    """Write one to three English words in one of Hershey's stroke fonts (Hershey 1967), in a random hand.

    A hand has a joined or a printed style, a size, slant, width and slope, and letters that move and tremble a little.
    Points are evenly spaced along each stroke. The words come from Python's own help text; no two splits share a word.

    Args:
        seed: Number of the collection of lines.
        split: 0 for training, 1 for validation, 2 for test.
        index: Number of the line. The result depends only on these three numbers, and on Python's version, whose help
            text has a few more or fewer words.

    Returns:
        The text and its sequence (T, 3), with 60 to 250 points.

    Raises:
        InputError: If the package with the fonts is not installed.
    """
    random = generator(seed, split, index)
    words = _words()[split]
    text, *more = (words[i] for i in random.integers(len(words), size=random.integers(1, 4)))
    for word in more:
        text += f" {word}" if len(text) + len(word) < 12 else ""
    text = text.capitalize() if random.random() < 0.2 else text
    lines = _written(text, list(_FONTS)[random.integers(len(_FONTS))], random)

    slope, slant, height, width, tremble = random.normal([0, 0.1, 0, 0, 0], [0.03, 0.2, 0.12, 0.12, 0.3])
    phase, period = random.uniform([0, 60], [2 * np.pi, 150])
    x, y = np.concatenate(lines).T
    y = y + slope * x + 1.2 * np.sin(2 * np.pi * x / period + phase)
    points = np.stack([x * np.exp(width) + slant * (_BASE - y), y], 1)
    points, counts = _resampled(points, np.array([len(line) for line in lines]), random.uniform(1.7, 2.7))
    noise = 0.2 * np.exp(tremble) * random.standard_normal((len(points) + 4, 2))
    noise = sum(noise[i : len(points) + i] for i in range(5)) / 5**0.5  # correlated between neighbouring points
    return text, from_lines(np.split((points + noise) * np.exp(height), np.cumsum(counts)[:-1]))


@lru_cache(maxsize=1)
def _words() -> tuple[list[str], list[str], list[str]]:
    """Return the sorted words of each split. A word's split depends on the word alone, not on the other words."""
    from pydoc_data.topics import topics

    found = Counter(re.findall(r"(?<![^\s(])[a-z]{3,9}(?=[\s.,;:)])", "\n".join(topics.values())))
    parts: tuple[list[str], ...] = ([], [], [])
    for word in sorted(word for word, times in found.items() if times > 2):  # rarer ones may not be words
        parts[max(0, zlib.crc32(word.encode()) % 10 - 7)].append(word)
    return parts


@lru_cache(maxsize=len(_FONTS))
def _letters(font: str) -> dict[str, tuple[list[np.ndarray], int]]:
    """Return for each character its strokes, with the left side at x = 0, and its width."""
    try:
        from HersheyFonts import HersheyFonts
    except ImportError as error:
        raise InputError("the package Hershey-Fonts is missing: install requirements.txt again") from error
    fonts = HersheyFonts()
    fonts.load_default_font(font)
    return {
        character: ([_rounded(stroke) - [glyph.left_offset, 0] for stroke in glyph.strokes], glyph.char_width)
        for character, glyph in fonts.all_glyphs.items()
    }


def _rounded(stroke: list[tuple[int, int]]) -> np.ndarray:
    """Round the corners by cutting them twice (Chaikin 1974): the fonts were made for plotters."""
    line = np.array(stroke, float)
    for _ in range(2):
        before, after = line[:-1], line[1:]
        cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], 1).reshape(-1, 2)
        line = np.concatenate([line[:1], cut, line[-1:]])
    return line


def _written(text: str, font: str, random: np.random.Generator) -> list[np.ndarray]:
    lines: list[np.ndarray] = []
    left, letters = 0.0, _letters(font)
    for character, dance in zip(text, random.normal(0, [0.05, 0.5, 0.7], (len(text), 3)), strict=True):
        strokes, width = letters[character]
        size = np.exp(dance[0])
        for stroke in strokes:
            line = stroke * size + (left + dance[1], _BASE * (1 - size) + dance[2])
            if lines and math.dist(line[0], lines[-1][-1]) < _FONTS[font]:
                lines[-1] = np.concatenate([lines[-1], line])
            else:
                lines.append(line)
        left += width * size
    return lines


def _resampled(points: np.ndarray, counts: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Place 60 to 250 points at even distances along S strokes.

    Args:
        points: Points (n, 2) of all strokes, one stroke after the other.
        counts: Number of points of each stroke, (S,).
        step: Distance between two points; it is changed if it gives too few points or too many.

    Returns:
        The new points, and the number of points of each stroke.
    """
    last = np.cumsum(counts) - 1
    first = last - counts + 1
    ways = np.hypot(*np.diff(points, axis=0, prepend=points[:1]).T)
    ways[first] = 1  # any positive distance keeps two strokes apart
    along = np.cumsum(ways)
    lengths = along[last] - along[first]
    # with a total length L, rounding gives at least L / step and at most L / step + 2 S points
    step = np.clip(step, lengths.sum() / (250 - 2 * len(counts)), lengths.sum() / 60)
    pieces = np.maximum(np.rint(lengths / step), 1).astype(int)
    piece = np.arange((pieces + 1).sum()) - np.repeat(np.cumsum(pieces + 1) - pieces - 1, pieces + 1)
    at = np.repeat(along[first], pieces + 1) + piece * np.repeat(lengths / pieces, pieces + 1)
    return np.stack([np.interp(at, along, values) for values in points.T], 1), pieces + 1


def _lists(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of IAM-OnDB's four lists of forms."""
    names = (*_TRAIN, *_VALIDATION)
    members = {}
    if packed := first_present(folder, f"{_TASK}.tar.gz", f"{_TASK}.zip"):
        found = archive_members(packed, lambda path: path.name in names)
        members = {name.name: content for name, content in found if content is not None}
    for name in names:
        path = first_present(folder, name, f"{_TASK}/{name}")
        if path is None and name not in members:
            raise InputError(f"IAM-OnDB: {folder / name} is missing: {_HOW_TO_GET} and put it there")
        content = members[name] if path is None else _read(path)
        if not content.strip():
            raise InputError(f"IAM-OnDB: {folder / name} names no forms: {AGAIN}")
        yield name, content


def _iam_lines(folder: Path, forms: set[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return the lines, by name, of each of these forms that has any."""

    def form(path: PurePosixPath | Path) -> str:
        return path.stem.rpartition("-")[0]

    lines = folder / _LINES
    if os.path.lexists(lines):
        files = _files(lines, lambda path: form(path) in forms)
    elif archive := first_present(folder, *_ARCHIVES):
        members = archive_members(archive, lambda path: path.suffix == ".xml" and form(path) in forms)
        files = ((path, f"{archive}: {path}", content) for path, content in members if content is not None)
    else:
        raise InputError(
            f"IAM-OnDB: {folder / _ARCHIVES[0]} is missing: {_HOW_TO_GET} and put it there, or unpack it to {lines}"
        )
    result: dict[str, dict[str, np.ndarray]] = {}
    for path, where, content in files:
        result.setdefault(form(path), {})[path.name] = _pen(content, where)
    return result


def _files(folder: Path, wanted: Callable[[Path], bool] = lambda path: True) -> Iterator[tuple[Path, str, bytes]]:
    """Yield path, name for error messages, and content of the XML files below a folder, sorted by path."""
    for path in sorted(folder.rglob("*.xml")):
        if wanted(path) and not path.name.startswith("."):
            yield path, str(path), _read(path)


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _LARGEST_TEXT:
            raise InputError(f"{path} has {size:,} bytes, more than {_LARGEST_TEXT:,}: make it smaller or remove it")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from error


def _pen(content: bytes, where: str) -> np.ndarray:
    """Return the sequence of one XML file, from the ``x`` and ``y`` of each ``Point`` in a ``Stroke``."""
    lines: list[list[tuple[float, float]]] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if name == "Stroke":
            lines.append([])
        elif name == "Point":
            if not lines or not attributes.keys() >= {"x", "y"}:
                raise ValueError("a point without a stroke, x or y")
            lines[-1].append((float(attributes["x"]), float(attributes["y"])))

    def doctype(*_: Any) -> None:  # it can define entities, with which a few bytes fill the memory
        raise ValueError("it declares a document type")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.StartDoctypeDeclHandler = start, doctype
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # an unknown encoding is a LookupError
        raise InputError(f"{where} is damaged or holds no strokes ({reason(error)}): {AGAIN}") from error
    if not any(lines):
        raise InputError(f"{where} holds no strokes: remove it or {AGAIN}")
    with np.errstate(over="ignore", invalid="ignore"):
        sequence = from_lines([np.array(line) for line in lines if line])
    return _checked(sequence, where)


def _checked(sequence: np.ndarray, where: str) -> np.ndarray:
    if sequence.ndim != 2 or sequence.shape[1] != 3 or not len(sequence):
        raise InputError(f"{where} has the shape {sequence.shape}: give (T, 3), at least one point of dx, dy, pen")
    with np.errstate(over="ignore"):
        sequence = sequence.astype(np.float32)
    if not np.isfinite(sequence).all():
        raise InputError(f"{where} has a point that is not finite: correct or remove it")
    if not np.isin(sequence[:, 2], (0, 1)).all():
        raise InputError(f"{where} has a pen state that is not 0 or 1: give 1 if the pen is lifted, else 0")
    return sequence


def _part(content: bytes, name: str) -> list[np.ndarray]:
    """Return the sequences of one ``.npy`` file; ``name`` is for error messages."""
    try:
        array = _array(content)
    except Exception as error:  # a damaged array or pickle raises all sorts of exceptions
        raise InputError(f"{name}: damaged or no array of sequences ({reason(error)}): {AGAIN}") from error
    if not len(array):
        raise InputError(f"{name} holds no sequences: give at least one")
    return [_checked(sequence, f"{name}, sequence {i}") for i, sequence in enumerate(array)]


def _array(content: bytes) -> list[np.ndarray]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, kind = header(file)
    if not kind.hasobject:
        if kind.kind not in "iuf":
            raise ValueError(f"it is of type {kind}, not of numbers")
        array = np.frombuffer(content, kind, offset=file.tell()).reshape(shape, order="F" if by_column else "C")
        return list(array)
    outer = restricted_pickle.load(file.read())
    if not isinstance(outer, restricted_pickle.Array) or not isinstance(outer.content, list):
        raise ValueError("it holds no arrays")
    if len(outer.shape) == 3 and all(type(number) in (int, float) for number in outer.content):
        return list(np.array(outer.content, np.float64).reshape(outer.shape))  # objects are always stored row by row
    if len(outer.shape) != 1 or not all(isinstance(item, restricted_pickle.Array) for item in outer.content):
        raise ValueError("it is not a list of arrays")
    if sum(len(item.content) for item in outer.content) > len(content):
        raise ValueError("one array stands in many places")  # with which a few bytes can fill the memory
    return [item.numbers() for item in outer.content]
