"""Parallel text: WMT'14, Multi30k, the user's own pairs, and numbers in words as a stand-in.

Files are UTF-8, plain or ``.gz``, with one sentence per line. Only a newline, with or without a preceding carriage
return, ends a line: WMT's sentences contain lone carriage returns and other characters that ``splitlines`` splits at.
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from lightning_meta.errors import InputError
from lightning_meta.sources.archives import AGAIN, archive_members, first_present
from lightning_meta.sources.download import download
from lightning_meta.sources.seeding import generator

_LONGEST = 2**22  # bytes of a line
_WMT14 = ("train", "newstest2012", "newstest2013", "newstest2014")
_MULTI30K = (
    "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/"
)
_MULTI30K_FILES = {  # sha256
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.fr.gz": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
}
_HOW_TO_GET = (
    "get training corpora and test sets from statmt.org/wmt14/translation-task.html, write each as one file per "
    "language with one sentence per line,"
)


class ParallelText(NamedTuple):
    """Aligned sentences, none of them empty: ``target[i]`` is the translation of ``source[i]``."""

    source: list[str]
    target: list[str]


class Corpus(NamedTuple):
    """A parallel corpus in three splits."""

    train: ParallelText
    val: ParallelText
    test: ParallelText
    dropped: int = 0  # training pairs left out because one of their sides is empty


def wmt14(root: str | Path, limit: int | None = None) -> Corpus:
    """Read WMT'14 English to French, split as in GNMT (Wu et al. 2016, section 8.1).

    Training pairs with an empty side are dropped. The validation set is newstest2012 and newstest2013, the test set is
    newstest2014. All 36 million training pairs need about 15 GB of memory.

    Args:
        root: Folder that holds ``wmt14/{train,newstest2012,newstest2013,newstest2014}.{en,fr}``, plain (preferred) or
            ``.gz``; ``train`` is the concatenation of all training corpora.
        limit: Number of training lines to read, from the first; by default all.

    Raises:
        InputError: If a file is missing, damaged or not UTF-8, two files have different numbers of lines, or a line is
            empty in validation or test.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: ask for at least 1 line")
    folder = Path(root) / "wmt14"
    by_hand = f"{_HOW_TO_GET} and put them into {folder}"
    train, *rest = (_files(folder, name, "en", "fr", by_hand) for name in _WMT14)
    pairs, dropped = _read(*train, drop_empty=True, limit=limit)
    val, more, test = (aligned(*files) for files in rest)
    return Corpus(pairs, ParallelText(val.source + more.source, val.target + more.target), test, dropped)


def has_wmt14(root: str | Path) -> bool:
    """Return whether all eight files exist, plain or ``.gz``.

    Broken files count as existing: ``wmt14`` then reports them, instead of a silent fallback to other data.
    """
    return all(_present(Path(root) / "wmt14", f"{name}.{language}") for name in _WMT14 for language in ("en", "fr"))


def multi30k(root: str | Path) -> Corpus:
    """Read Multi30k's captions, English to French (Elliott et al. 2016, 2017): 29,000, 1,014 and 1,000 pairs.

    Args:
        root: Folder that holds ``multi30k/raw/{train,val,test_2016_flickr}.{en,fr}``, plain or ``.gz``.

    Raises:
        InputError: If a file is missing, or as for ``folder``.
    """
    if not has_multi30k(root):
        raise InputError(f"Multi30k is missing: {_multi30k_by_hand(root)}, or allow the download")
    return folder(Path(root) / "multi30k" / "raw", test="test_2016_flickr")


def has_multi30k(root: str | Path) -> bool:
    """Return whether all six files exist, plain or ``.gz``."""
    return all(_present(Path(root) / "multi30k" / "raw", name.removesuffix(".gz")) for name in _MULTI30K_FILES)


def download_multi30k(root: str | Path) -> None:
    """Download Multi30k's six files into ``<root>/multi30k/raw``. A failed download leaves nothing behind.

    Args:
        root: Folder to download into; created if it does not exist.

    Raises:
        InputError: If the download fails, the server does not answer for 10 seconds, a checksum is wrong, or ``root``
            cannot be written.
    """
    from torchvision.datasets.utils import download_url

    def fetch(into: Path) -> None:
        for name, digest in _MULTI30K_FILES.items():
            download_url(_MULTI30K + name, into / "multi30k" / "raw")
            if hashlib.sha256((into / "multi30k" / "raw" / name).read_bytes()).hexdigest() != digest:
                raise RuntimeError(f"{name} has a wrong checksum")

    files = [f"multi30k/raw/{name}" for name in _MULTI30K_FILES]
    download("Multi30k", fetch, files, root, _multi30k_by_hand(root))


def folder(path: str | Path, source: str = "en", target: str = "fr", test: str | None = None) -> Corpus:
    """Read the user's parallel text: a folder in Multi30k's layout, or a .zip of tab-separated pairs like Tatoeba's.

    Training pairs with an empty side are dropped.

    Args:
        path: A folder of ``{train,val,test}.{en,fr}``, plain or ``.gz``, in these or other languages. Or a .zip with
            one ``.txt`` file (files that begin with ``_`` are skipped), whose lines are English, tab, another language
            and optionally more columns. Its pairs are shuffled in a fixed order and split by the English sentence, so
            that no sentence is in two splits: 2 % of the sentences, at most 1,000, each for validation and test.
        source: Language to translate from, as in the file names.
        target: Language to translate to. For a .zip, one of the two must be ``en``.
        test: Name of a folder's test split; by default ``test``, or else ``test_2016_flickr``.

    Raises:
        InputError: If files are missing, damaged or not UTF-8, two files have different numbers of lines, a line has no
            tab or is empty in validation or test, or there are too few pairs to split.
    """
    path = Path(path)
    if path.suffix.lower() == ".zip":
        return _tab_separated(path, source, target)
    if not path.is_dir():
        problem = "is neither a folder nor a .zip" if path.exists() else "does not exist"
        raise InputError(f"{path} {problem}: give a folder of train, val and test.{{{source},{target}}}")
    if test is None:
        test = next((name for name in ("test", "test_2016_flickr") if _present(path, f"{name}.{source}")), "test")
    train, val, test = (
        _files(path, name, source, target, f"put it into {path}, one sentence per line")
        for name in ("train", "val", test)
    )
    pairs, dropped = _read(*train, drop_empty=True)
    return Corpus(pairs, aligned(*val), aligned(*test), dropped)


def aligned(source: str | Path, target: str | Path) -> ParallelText:
    """Read two files, plain or ``.gz``, whose lines are translations of each other. Whitespace at the ends is removed.

    Raises:
        InputError: If a file is missing, damaged or not UTF-8, a line is empty, or the numbers of lines differ.
    """
    return _read(Path(source), Path(target), drop_empty=False)[0]


def sentences(path: str | Path) -> list[str]:
    """Read the lines of one file, plain or ``.gz``. Whitespace at the ends is removed.

    Raises:
        InputError: If the file is missing, damaged, not UTF-8 or empty, or a line is empty.
    """
    read = [line.strip() for line in _lines(Path(path))]
    if not read:
        raise InputError(f"{path} holds no sentences: give one per line")
    if "" in read:
        raise InputError(f"{path}: line {read.index('') + 1:,} is empty: give its sentence or remove the line")
    return read


@lru_cache(maxsize=1)  # takes a second or two
def number_words(train: int = 10_000, held_out: int = 1_000) -> Corpus:
    """Write numbers in words, in English and French. Nothing is downloaded, and the result is the same every time.

    Half of the numbers are below 10,000, the others from there to 999,999. No number is in two splits, and all numbers
    below 100 are in training. The translation is not word by word: French counts from 60 on in twenties
    (``seventy-one``, ``soixante et onze``), gives ``cent`` and ``vingt`` a plural only at the end, and says ``mille``
    for ``one thousand``. English reads half of the four-digit numbers as years (``nineteen oh-five``, ``mille neuf cent
    cinq``). A word-by-word dictionary reaches a BLEU of 83.

    Args:
        train: Number of training pairs, 100 to 15,000.
        held_out: Number of validation pairs and of test pairs, 1 to 2,000 each.

    Raises:
        InputError: If one of the numbers is out of its range.

    Example:
        >>> corpus = number_words(train=100, held_out=1)
        >>> corpus.train.source[71], corpus.train.target[71]
        ('seventy-one', 'soixante et onze')
    """
    from num2words import num2words

    if not (100 <= train <= 15_000 and 1 <= held_out <= 2_000):
        raise InputError(f"{train} training and {held_out} held-out numbers: choose 100 to 15,000 and 1 to 2,000")
    random = generator(10_000)
    drawn = train - 100 + 2 * held_out
    short = 100 + random.permutation(10_000 - 100)[: drawn // 2]
    long = 10_000 + random.permutation(1_000_000 - 10_000)[: drawn - len(short)]
    numbers = random.permutation(np.concatenate([short, long]))
    as_year = (numbers >= 1000) & (numbers < 10_000) & (random.random(drawn) < 0.5)
    readings = [*zip(numbers.tolist(), as_year.tolist(), strict=True), *((number, False) for number in range(100))]
    pairs = [
        (num2words(number, to="year" if year else "cardinal", lang="en"), num2words(number, lang="fr"))
        for number, year in readings
    ]
    return Corpus(_pairs(pairs[2 * held_out :]), _pairs(pairs[held_out : 2 * held_out]), _pairs(pairs[:held_out]))


def _multi30k_by_hand(root: str | Path) -> str:
    return (
        f"get {', '.join(_MULTI30K_FILES)} from data/task1/raw of github.com/multi30k/dataset and put them into "
        f"{Path(root) / 'multi30k' / 'raw'}"
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> ParallelText:
    return ParallelText(*map(list, zip(*pairs, strict=True)))


def _present(folder: Path, name: str) -> Path | None:
    return first_present(folder, name, f"{name}.gz")


def _files(folder: Path, name: str, source: str, target: str, how: str) -> tuple[Path, Path]:
    """Return the two files of one split; ``how`` tells in an error how to get a missing one."""
    names = f"{name}.{source}", f"{name}.{target}"
    paths = [_present(folder, name) for name in names]
    for path, file in zip(paths, names, strict=True):
        if path is None:
            raise InputError(f"{folder / file}[.gz] is missing: {how}")
    return tuple(paths)


def _read(source: Path, target: Path, drop_empty: bool, limit: int | None = None) -> tuple[ParallelText, int]:
    """Return the pairs of the first ``limit`` lines, and the number of dropped pairs."""
    pairs, dropped = ParallelText([], []), 0
    sources, targets = _lines(source), _lines(target)
    for number, pair in enumerate(zip_longest(islice(sources, limit), islice(targets, limit)), 1):
        if None in pair:
            short, long, rest = (source, target, targets) if pair[0] is None else (target, source, sources)
            raise InputError(
                f"{short} has {number - 1:,} lines and {long} has {number + sum(1 for _ in rest):,}, but each line "
                "must have its translation: take both files from the same place"
            )
        pair = [line.strip() for line in pair]
        if all(pair):
            pairs.source.append(pair[0])
            pairs.target.append(pair[1])
        elif drop_empty:
            dropped += 1
        else:
            raise InputError(
                f"{target if pair[0] else source}: line {number:,} is empty: give its sentence or remove the line from "
                "both files"
            )
    if not pairs.source:
        raise InputError(f"{source} and {target} hold no sentences: {AGAIN}")
    return pairs, dropped


def _lines(path: Path) -> Iterator[str]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield from _decoded(_whole_lines(file, path), str(path))
    except EOFError as error:
        raise InputError(f"{path}: the gzip file is truncated: {AGAIN}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is corrupt ({error}): {AGAIN}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): put a file of sentences there") from error


def _whole_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    left = max(2**28, 100 * path.stat().st_size)  # no real text compresses better
    while line := file.readline(_LONGEST):
        left -= len(line)
        if len(line) == _LONGEST:
            raise InputError(f"{path} has a line of {_LONGEST:,} bytes or more: give a text with one sentence per line")
        if left < 0:
            raise InputError(f"{path} unpacks to more than 100 times its own size: do not trust this file")
        yield line


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode lines one by one, without a byte order mark; ``name`` is for error messages."""
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: line {number:,} is not UTF-8 (byte {error.start + 1:,} is 0x{line[error.start]:02x}): "
                "convert the file"
            ) from error


def _tab_separated(path: Path, source: str, target: str) -> Corpus:
    if "en" not in (source, target):
        raise InputError(f"{path} pairs English with another language, not {source} with {target}: set one to en")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .zip of tab-separated pairs, or a folder")
    texts = [
        (name, content)
        for name, content in archive_members(path, lambda name: name.suffix == ".txt" and name.name[0] not in "_.")
        if content is not None
    ]
    if len(texts) != 1:
        names = ", ".join(str(name) for name, _ in texts[:5]) or "none"
        raise InputError(f"{path} holds {len(texts)} .txt files ({names}): give a .zip that holds exactly one")
    name, content = texts[0]
    pairs, dropped = [], 0
    for number, line in enumerate(_decoded(io.BytesIO(content), f"{path}: {name}"), 1):
        cells = [cell.strip() for cell in line.split("\t")[:2]]
        if len(cells) == 1 and cells[0]:
            raise InputError(f"{path}: {name}: line {number:,} has no tab: write English, tab, translation")
        if all(cells):
            pairs.append(cells)
        else:
            dropped += 1

    def scatter(sentence: str) -> bytes:
        return hashlib.md5(sentence.encode(), usedforsecurity=False).digest()

    rank = {sentence: i for i, sentence in enumerate(sorted({english for english, _ in pairs}, key=scatter))}
    if len(rank) < 3:
        raise InputError(f"{path}: {name} has {len(rank)} different English sentences: give at least 3 to split")
    part = min(max(len(rank) // 50, 1), 1000)
    pairs.sort(key=lambda pair: rank[pair[0]])
    test, val = (sum(rank[english] < end for english, _ in pairs) for end in (part, 2 * part))
    pairs = pairs if source == "en" else [pair[::-1] for pair in pairs]
    return Corpus(_pairs(pairs[val:]), _pairs(pairs[test:val]), _pairs(pairs[:test]), dropped)
