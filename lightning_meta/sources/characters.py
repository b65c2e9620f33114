"""Handwritten characters, sorted by alphabet: Omniglot, a user's own, and fonts in many hands as a stand-in.

K is the number of characters of an alphabet, N the number of drawings of each, S a picture's height and width in
pixels. Pictures are uint8, 0 paper to 255 ink.
"""

import io
import math
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_meta.errors import InputError
from lightning_meta.seeding import generator
from lightning_meta.sources.archives import archive_members
from lightning_meta.sources.download import download
from lightning_meta.sources.image_files import decode, is_picture, picture_paths

if TYPE_CHECKING:
    import numpy as np

_SETS, _RUNS = ("images_background", "images_evaluation"), "all_runs"
_DRAWING = re.compile(r"([^/]+)/character(\d+)/(\d{4})_(\d{2})\.png")
_HOME = "github.com/brendenlake/omniglot"
_AGAIN = "copy or download it again"


class Alphabet(NamedTuple):
    """The characters of one alphabet, each drawn by several hands."""

    images: Tensor  # (K, N, S, S); drawing n of every character is by one hand
    numbers: list[int]  # K: Omniglot's character numbers (1 to 1623 over both its sets), or Unicode code points


class Run(NamedTuple):
    """One 20-way one-shot task: find the training picture of the character that each test picture shows."""

    training: Tensor  # (20, S, S)
    test: Tensor  # (20, S, S)
    answers: Tensor  # (20,), int64: for each test picture the index of its training picture


class OwnAlphabet(NamedTuple):
    """A user's one-shot task."""

    name: str
    classes: list[str]  # K
    examples: Tensor  # (K, S, S), one of each class
    query_names: list[str]  # Q
    queries: Tensor  # (Q, S, S)


def omniglot(root: str | Path, evaluation: bool, size: int = 28) -> dict[str, Alphabet]:
    """Read Omniglot (Lake et al. 2015): drawings of 50 alphabets by 20 people each. Writes nothing.

    Args:
        root: Folder that holds ``omniglot-py/images_background`` and ``omniglot-py/images_evaluation``, unpacked as
            torchvision leaves them (preferred) or as ``.zip``, which are read in memory.
        evaluation: The 20 alphabets (659 characters) to test on, or the 30 (964) to learn from.
        size: Height and width of the result; the originals have 105 pixels (bilinear, smoothed).

    Returns:
        The alphabets by name, sorted, their characters in the order of their folders, the drawings by number.

    Raises:
        InputError: If the set is missing, the archive or a picture damaged, a picture in an unexpected place, or
            characters of one alphabet have different numbers of drawings.
    """
    _check(size)
    name = _SETS[evaluation]
    alphabets: dict[str, dict] = {}
    for path, where, content in _contents(root, name):
        match = _DRAWING.fullmatch(str(path))
        if match is None:
            raise InputError(f"{where} does not lie at <alphabet>/character01/0709_01.png: move it or {_AGAIN}")
        alphabet, *numbers = match.groups()
        character, number, drawing = map(int, numbers)
        drawings = alphabets.setdefault(alphabet, {}).setdefault((character, number), {})
        drawings[drawing] = _drawing(where, content, size)
    result = {}
    for alphabet, characters in sorted(alphabets.items()):
        counts = {len(drawings): character for (character, _), drawings in characters.items()}
        if len(counts) > 1:
            (fewest, one), (most, other) = min(counts.items()), max(counts.items())
            raise InputError(
                f"Omniglot: {name}/{alphabet}: {fewest} drawings of character {one}, {most} of {other}: {_AGAIN}"
            )
        order = sorted(characters)
        images = [torch.stack([drawing for _, drawing in sorted(characters[key].items())]) for key in order]
        result[alphabet] = Alphabet(torch.stack(images), [number for _, number in order])
    return result


def has_omniglot(root: str | Path) -> bool:
    """Whether both sets are there, unpacked or as ``.zip``.

    What is there but broken counts: ``omniglot`` then names it, and nobody falls back to other data unawares.
    """
    place = Path(root) / "omniglot-py"
    return all(any(os.path.lexists(place / file) for file in (name, f"{name}.zip")) for name in _SETS)


def download_omniglot(root: str | Path) -> None:
    """Download both sets and the 20 runs with torchvision to ``<root>/omniglot-py/*.zip``: all three or nothing.

    Args:
        root: Folder to download into; made where it does not exist.

    Raises:
        InputError: If the download fails (a server silent for 10 seconds counts) or ``root`` cannot be written.
    """
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import download_url

    home = Omniglot.download_url_prefix
    files = {f"{name}.zip": (f"{home}/{name}.zip", Omniglot.zips_md5[name]) for name in _SETS}
    files[f"{_RUNS}.zip"] = f"{home}/one-shot-classification/{_RUNS}.zip", "e8996daecdf12afeeb4a53a179f06b19"

    def fetch(folder: Path) -> None:
        for file, (url, md5) in files.items():
            download_url(url, folder / "omniglot-py", file, md5)  # torchvision's class itself would unpack it, too

    by_hand = f"put {', '.join(files)} from {_HOME}, folder python, into {Path(root) / 'omniglot-py'} by hand"
    download("Omniglot", fetch, [f"omniglot-py/{file}" for file in files], root, by_hand)


def one_shot_runs(root: str | Path, size: int = 28) -> list[Run]:
    """Read the 20 fixed one-shot tasks that people and models are compared on (Lake et al. 2015). Writes nothing.

    Each is 20-way within one of ten alphabets of Omniglot's evaluation set: training pictures by one person, test
    pictures by another.

    Args:
        root: Folder that holds ``omniglot-py/all_runs``, unpacked (preferred), or ``omniglot-py/all_runs.zip``.
        size: Height and width of the result, as for ``omniglot``.

    Raises:
        InputError: If the runs are missing, incomplete or damaged.
    """
    _check(size)
    files = {str(path): (where, content) for path, where, content in _contents(root, _RUNS)}

    def find(name: str) -> tuple[str, bytes]:
        if name not in files:
            raise InputError(f"Omniglot: {_RUNS} holds no {name}: {_AGAIN}")
        return files[name]

    runs = []
    for run in [f"run{i:02}" for i in range(1, 21)]:
        training = [f"{run}/training/class{i:02}.png" for i in range(1, 21)]
        test = [f"{run}/test/item{i:02}.png" for i in range(1, 21)]
        images = [torch.stack([_drawing(*find(name), size) for name in names]) for names in (training, test)]
        where, content = find(f"{run}/class_labels.txt")
        words = content.decode(errors="replace").split()
        same = dict(zip(words[::2], words[1::2], strict=False))  # a line names a test and a training picture
        for name in test:
            if same.get(name) not in training:
                raise InputError(f"{where} names no training picture for {name}: {_AGAIN}")
        runs.append(Run(*images, torch.tensor([training.index(same[name]) for name in test])))
    return runs


def own_alphabets(folder: str | Path, size: int = 28) -> list[OwnAlphabet]:
    """Read a user's pictures, ``<alphabet>/examples/<class>.png`` and ``<alphabet>/queries/<any name>.png``.

    A picture, PNG, JPG or WebP of any size and colour, may be dark on light or light on dark: its border is taken for
    paper. It is filled up with paper to a square, shrunk, and stretched so that its darkest ink is 255.

    Args:
        folder: Folder of the alphabets' folders.
        size: Height and width of the result.

    Returns:
        The alphabets by name; classes and queries in natural order (``k2`` before ``k10``).

    Raises:
        InputError: If there is no alphabet, one without examples or queries, with fewer than two classes or two
            pictures of a class, or a picture that is broken or blank.
    """
    _check(size)
    layout = "<alphabet>/examples/<class>.png and <alphabet>/queries/<any name>.png"
    try:
        places = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): give a folder with {layout}") from error
    if not places:
        raise InputError(f"{folder} holds no alphabets: put pictures into {layout}")
    alphabets = []
    for place in places:
        for part in ("examples", "queries"):
            if not (place / part).is_dir():
                raise InputError(f"{place} has no folder {part}: put pictures into {layout}")
        examples, queries = picture_paths(place / "examples"), picture_paths(place / "queries")
        classes = [path.stem for path in examples]
        for path in examples:
            if classes.count(path.stem) > 1:
                raise InputError(f"{path}: there is another picture of the class {path.stem}: keep one of them")
        if len(classes) < 2:
            raise InputError(f"{place / 'examples'} holds only the class {classes[0]}: give at least 2 classes")
        alphabets.append(
            OwnAlphabet(
                place.name,
                classes,
                torch.stack([_own_drawing(path, size) for path in examples]),
                [path.name for path in queries],
                torch.stack([_own_drawing(path, size) for path in queries]),
            )
        )
    return alphabets


_FONTS = [  # of those that come with Matplotlib, the ones for text
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
]
# Test alphabets are of scripts of their own. Those that look like Latin (Lisu is Latin capitals, turned) are to learn.
_TRAIN = {
    "Latin capitals": range(0x41, 0x5B),
    "Latin small letters": range(0x61, 0x7B),
    "Greek capitals": range(0x391, 0x3AA),
    "Greek small letters": range(0x3B1, 0x3CA),
    "Cyrillic capitals": range(0x410, 0x430),
    "Cyrillic small letters": range(0x430, 0x450),
    "Armenian capitals": range(0x531, 0x557),
    "Armenian small letters": range(0x561, 0x587),
    "Arabic": [*range(0x621, 0x63B), *range(0x641, 0x64B)],
    "Braille": range(0x2801, 0x2840),
    "Canadian syllabics": [ord(letter) for letter in "ᐁᐃᐅᐊᐯᐱᐳᐸᑌᑎᑐᑕᑫᑭᑯᑲᒉᒋᒍᒐᒣᒥᒧᒪᓀᓂᓄᓇᓓᓕᓗᓚᓭᓯᓱᓴᔐᔑᔓᔕᔦᔨᔪᔭ"],
    "Lisu": range(0xA4D0, 0xA4F8),
    "Ogham": range(0x1681, 0x169B),
    "Old Italic": range(0x10300, 0x10320),
}
_TEST = {
    "Asomtavruli": range(0x10A0, 0x10C6),
    "Hebrew": range(0x5D0, 0x5EB),
    "Lao": range(0xE81, 0xEAF),
    "Mkhedruli": range(0x10D0, 0x10F7),
    "N'Ko": range(0x7CA, 0x7EB),
    "Nuskhuri": range(0x2D00, 0x2D26),
    "Tifinagh": range(0x2D30, 0x2D68),
}
_ALIKE = 0.97  # cosine of two blurred characters from which on they count as one


@lru_cache(maxsize=1)  # a second or two
def font_alphabets(size: int = 28, drawings: int = 20) -> tuple[dict[str, Alphabet], dict[str, Alphabet]]:
    """Alphabets from the fonts that come with Matplotlib: nothing is downloaded, the result is the same every time.

    Each drawing of a character is by another hand: another font where there is one, another thickness of the pen, and
    every time a little turned, slanted, stretched, shifted and bent. Characters are enlarged to one size; of those that
    then look the same in one of the fonts only the first is kept.

    Args:
        size: Height and width of a picture.
        drawings: Drawings of each character.

    Returns:
        Alphabets to learn from and alphabets to test on, by name, of at least 20 characters each. Numbers are Unicode
        code points. The two have no script in common.

    Raises:
        InputError: If ``size`` is less than 8 or ``drawings`` less than 1.
    """
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    _check(size)
    if drawings < 1:
        raise InputError(f"drawings is {drawings}: ask for at least 1")
    paths = [os.path.join(get_data_path(), "fonts", "ttf", f"{name}.ttf") for name in _FONTS]
    fonts = {path: FT2Font(path).get_charmap() for path in paths}
    result = {}, {}
    for i, (name, letters) in enumerate([*_TRAIN.items(), *_TEST.items()]):
        random = generator(9_000, i)
        numbers = [letter for letter in letters if letter in fonts[paths[0]]]  # DejaVu Sans has the most
        shapes = torch.stack(
            [_shapes(path, numbers, 2 * size) for path, charmap in fonts.items() if charmap.keys() >= set(numbers)]
        )
        kept = _different(shapes)
        if len(kept) >= 20:
            images = _hands(shapes[:, kept], drawings, random)
            result[name in _TEST][name] = Alphabet(images, [numbers[j] for j in kept])
    return result


def _shapes(font: str, letters: list[int], side: int) -> Tensor:
    """Each letter (K, side, side), 0 to 1, centred, its longer side two thirds of the picture's or, for dots, less."""
    import numpy as np
    from PIL import Image, ImageFont

    # the plain layout engine: the other one may be missing, and would draw a little differently
    loaded = ImageFont.truetype(font, side, layout_engine=ImageFont.Layout.BASIC)
    pictures = np.zeros((len(letters), side, side), np.float32)
    for picture, letter in zip(pictures, letters, strict=True):
        mask = loaded.getmask(chr(letter), mode="L")
        ink = Image.frombytes("L", mask.size, bytes(mask))
        ink = ink.crop(ink.getbbox())
        scale = min(side * 2 / 3 / max(ink.size), 1.5)
        width, height = (max(1, round(length * scale)) for length in ink.size)
        left, top = (side - width) // 2, (side - height) // 2
        picture[top : top + height, left : left + width] = ink.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(pictures / 255)


def _different(shapes: Tensor) -> list[int]:
    """Of shapes (fonts, K, side, side) those that in every font look different from all that are kept before them."""
    small = F.adaptive_avg_pool2d(shapes, 28)
    blurred = F.normalize(F.avg_pool2d(small, 3, stride=1, padding=1).flatten(2), dim=2)
    alike = (blurred @ blurred.mT).amax(0) > _ALIKE
    kept = []
    for i in range(len(alike)):
        if not alike[i, kept].any():
            kept.append(i)
    return kept


def _hands(shapes: Tensor, drawings: int, random: "np.random.Generator") -> Tensor:
    """Draw shapes (fonts, K, side, side) by different hands: (K, drawings, side / 2, side / 2), uint8."""
    fonts, K, side, _ = shapes.shape
    font = torch.cat([torch.from_numpy(random.permutation(fonts)) for _ in range(math.ceil(drawings / fonts))])
    pen = torch.from_numpy(random.random(drawings, "float32"))[:, None, None]
    radius = round(side / 56)
    thick, thin = (sign * F.max_pool2d(sign * shapes, 2 * radius + 1, stride=1, padding=radius) for sign in (1, -1))
    ink, thick, thin = (these[font[:drawings]].movedim(0, 1) for these in (shapes, thick, thin))
    ink = ink + 0.8 * (1 - pen) * (thin - ink) + 0.3 * pen * (thick - ink)  # not all thin: hairlines stay visible

    # in half pictures: a random affine map close to the identity, and shifts of 4 x 4 places, smooth between them
    noise = torch.from_numpy(random.standard_normal((K * drawings, 6 + 32), "float32"))
    affine = torch.eye(2, 3) + torch.tensor([0.1, 0.1, 0.08]) * noise[:, :6].view(-1, 2, 3)
    size = side // 2
    grid = F.affine_grid(affine, [K * drawings, 1, size, size], align_corners=False)
    bend = F.interpolate(0.06 * noise[:, 6:].view(-1, 2, 4, 4), (size, size), mode="bicubic", align_corners=False)
    ink = F.avg_pool2d(
        F.pad(ink.reshape(-1, 1, side, side), (1, 1, 1, 1)), 3, stride=1
    )  # or sampling would skip strokes
    images = F.grid_sample(ink, grid + bend.movedim(1, -1), align_corners=False).view(K, drawings, size, size)
    return (images * 255).round().to(torch.uint8)


def _check(size: int) -> None:
    if size < 8:
        raise InputError(f"size is {size}: ask for at least 8 pixels, no character fits into less")


def _contents(root: str | Path, name: str) -> Iterator[tuple[PurePosixPath, str, bytes]]:
    """Yields path inside the set, name for errors, and content of each picture and list of labels."""
    place = Path(root) / "omniglot-py"
    folder, archive = place / name, place / f"{name}.zip"

    def wanted(path: PurePosixPath) -> bool:
        return is_picture(path) or path.name == "class_labels.txt"

    empty = True
    if os.path.lexists(folder):
        try:
            for path in sorted(folder.rglob("*")):
                inside = PurePosixPath(path.relative_to(folder).as_posix())
                if wanted(inside):
                    yield inside, str(path), path.read_bytes()
                    empty = False
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error}): {_AGAIN}") from error
    elif os.path.lexists(archive):
        for member, content in archive_members(archive, wanted):
            if content is not None:
                inside = PurePosixPath(*member.parts[1:]) if member.parts[0] == name else member
                yield inside, f"{archive}: {member}", content
                empty = False
    else:
        source = "python/one-shot-classification" if name == _RUNS else "python"
        raise InputError(f"Omniglot: {name}.zip is missing: get it from {_HOME}, {source}, and put it into {place}")
    if empty:
        raise InputError(f"Omniglot: {folder if os.path.lexists(folder) else archive} holds no pictures: {_AGAIN}")


def _drawing(where: str, content: bytes, size: int) -> Tensor:
    """Omniglot's drawing (size, size). Its pictures have 1 bit, which Pillow would resize without smoothing."""
    import numpy as np
    from PIL import Image

    picture = decode(io.BytesIO(content), where).convert("L").resize((size, size), Image.Resampling.BILINEAR)
    return 255 - torch.from_numpy(np.array(picture))


def _own_drawing(path: Path, size: int) -> Tensor:
    import numpy as np
    from PIL import Image

    grey = np.asarray(decode(path, path).convert("L"), np.float32)
    paper = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    ink = np.clip(paper - grey if paper > 127 else grey - paper, 0, None)
    H, W = ink.shape
    square = Image.new("F", (max(H, W), max(H, W)))
    square.paste(Image.fromarray(ink), ((max(H, W) - W) // 2, (max(H, W) - H) // 2))
    small = torch.from_numpy(np.array(square.resize((size, size), Image.Resampling.BILINEAR)))
    if small.max() < 8:  # of 255: less is the noise of a scanner
        raise InputError(f"{path} is blank: draw a character on it that differs from its border, or remove it")
    return (small * (255 / small.max())).round().to(torch.uint8)
