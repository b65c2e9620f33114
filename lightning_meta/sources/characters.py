"""Handwritten characters by alphabet: Omniglot, a user's own images, and distorted fonts as a stand-in.

K is the number of characters of an alphabet, N the number of drawings of each, S an image's height and width in pixels.
Images are uint8, from 0 (paper) to 255 (ink).
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
from lightning_meta.sources.archives import archive_members
from lightning_meta.sources.download import download
from lightning_meta.sources.image_files import decode, image_paths, is_image
from lightning_meta.sources.seeding import generator

if TYPE_CHECKING:
    import numpy as np

_SETS, _RUNS = ("images_background", "images_evaluation"), "all_runs"
_DRAWING = re.compile(r"([^/]+)/character(\d+)/(\d{4})_(\d{2})\.png")
_HOME = "github.com/brendenlake/omniglot"
_AGAIN = "copy or download it again"


class Alphabet(NamedTuple):
    """The characters of one alphabet, each drawn by several people (or, for fonts, with several styles)."""

    images: Tensor  # (K, N, S, S); drawing n of every character is by the same person
    numbers: list[int]  # K: Omniglot's character numbers (1 to 1623 over both of its sets) or Unicode code points


class OneShotRun(NamedTuple):
    """One 20-way one-shot task: find the training image of the same character as each test image."""

    training: Tensor  # (20, S, S)
    test: Tensor  # (20, S, S)
    answers: Tensor  # (20,), int64: index of the training image for each test image


class OwnAlphabet(NamedTuple):
    """A user's one-shot task."""

    name: str
    classes: list[str]  # K
    examples: Tensor  # (K, S, S), one for each class
    query_names: list[str]  # Q
    queries: Tensor  # (Q, S, S)


def omniglot(root: str | Path, evaluation: bool, size: int = 28) -> dict[str, Alphabet]:
    """Read one set of Omniglot (Lake et al. 2015), which has 50 alphabets, each drawn by 20 people.

    Args:
        root: Folder that contains ``omniglot-py/images_background`` and ``omniglot-py/images_evaluation``, unpacked as
            by torchvision, or as ``.zip`` files, which are read in memory. Unpacked folders take precedence.
        evaluation: Read the 20 alphabets (659 characters) for test instead of the 30 (964 characters) for training.
        size: Height and width of the images, resized from 105 pixels (bilinear with antialiasing).

    Returns:
        The alphabets by name, sorted, with their characters in the order of the folders and the drawings by number.

    Raises:
        InputError: If the set is missing, the archive or an image is damaged, an image is in an unexpected folder, or
            the characters of an alphabet differ in their number of drawings.
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
    """Return whether both sets exist, unpacked or as ``.zip``.

    A broken set counts as existing: ``omniglot`` then reports it, so that nobody uses other data by mistake.
    """
    place = Path(root) / "omniglot-py"
    return all(any(os.path.lexists(place / file) for file in (name, f"{name}.zip")) for name in _SETS)


def download_omniglot(root: str | Path) -> None:
    """Download both sets and the 20 runs with torchvision to ``<root>/omniglot-py/*.zip``: all three or none.

    Args:
        root: Folder to download into. It is created if it does not exist.

    Raises:
        InputError: If the download fails or times out (10 seconds), or ``root`` is not writable.
    """
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import download_url

    home = Omniglot.download_url_prefix
    files = {f"{name}.zip": (f"{home}/{name}.zip", Omniglot.zips_md5[name]) for name in _SETS}
    files[f"{_RUNS}.zip"] = f"{home}/one-shot-classification/{_RUNS}.zip", "e8996daecdf12afeeb4a53a179f06b19"

    def fetch(folder: Path) -> None:
        for file, (url, md5) in files.items():
            download_url(url, folder / "omniglot-py", file, md5)  # torchvision's Omniglot class would unpack it too

    by_hand = f"put {', '.join(files)} from {_HOME}, folder python, into {Path(root) / 'omniglot-py'} by hand"
    download("Omniglot", fetch, [f"omniglot-py/{file}" for file in files], root, by_hand)


def one_shot_runs(root: str | Path, size: int = 28) -> list[OneShotRun]:
    """Read the 20 fixed one-shot tasks of Lake et al. (2015), on which people and models are compared.

    Each task has 20 characters of one of ten evaluation alphabets. One person drew the training images, another the
    test images.

    Args:
        root: Folder that contains ``omniglot-py/all_runs`` or, if that does not exist, ``omniglot-py/all_runs.zip``.
        size: Height and width of the images, as for ``omniglot``.

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
        same = dict(zip(words[::2], words[1::2], strict=False))  # each line names a test image and its training image
        for name in test:
            if same.get(name) not in training:
                raise InputError(f"{where} names no training image for {name}: {_AGAIN}")
        runs.append(OneShotRun(*images, torch.tensor([training.index(same[name]) for name in test])))
    return runs


def own_alphabets(folder: str | Path, size: int = 28) -> list[OwnAlphabet]:
    """Read a user's images, ``<alphabet>/examples/<class>.png`` and ``<alphabet>/queries/<any name>.png``.

    An image can be a PNG, JPG or WebP of any size and colour, dark on light or light on dark: the colour of its border
    counts as paper. It is padded to a square, resized, and scaled so that its strongest ink is 255.

    Args:
        folder: Folder with one folder for each alphabet.
        size: Height and width of the images in pixels, at least 8.

    Returns:
        The alphabets by name; classes and queries in natural order (``k2`` before ``k10``).

    Raises:
        InputError: If there is no alphabet, an alphabet has no examples, no queries, fewer than two classes or two
            examples of a class, or an image is damaged or blank.
    """
    _check(size)
    layout = "<alphabet>/examples/<class>.png and <alphabet>/queries/<any name>.png"
    try:
        places = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): give a folder with {layout}") from error
    if not places:
        raise InputError(f"{folder} holds no alphabets: put images into {layout}")
    alphabets = []
    for place in places:
        for part in ("examples", "queries"):
            if not (place / part).is_dir():
                raise InputError(f"{place} has no folder {part}: put images into {layout}")
        examples, queries = image_paths(place / "examples"), image_paths(place / "queries")
        classes = [path.stem for path in examples]
        for path in examples:
            if classes.count(path.stem) > 1:
                raise InputError(f"{path}: there is another image of the class {path.stem}: keep one of them")
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


_FONTS = [  # Matplotlib's text fonts
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
]
# Training and test alphabets share no script. Those that resemble Latin, such as Lisu, are for training.
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
_ALIKE = 0.97  # cosine similarity of blurred characters from which on they count as the same


@lru_cache(maxsize=1)  # drawing them takes a second or two
def font_alphabets(size: int = 28, drawings: int = 20) -> tuple[dict[str, Alphabet], dict[str, Alphabet]]:
    """Draw alphabets with the fonts that come with Matplotlib. Needs no download and always returns the same.

    Drawings of a character differ in font (if several have it), pen width and a small random affine and smooth
    distortion. All characters are scaled to the same size. Of characters that look alike in any font after that, only
    the first is kept.

    Args:
        size: Height and width of the images in pixels, at least 8.
        drawings: Number of drawings of each character.

    Returns:
        Training and test alphabets by name, of at least 20 characters each. They have no script in common. Numbers are
        Unicode code points.

    Raises:
        InputError: If ``size`` is less than 8 or ``drawings`` less than 1.
    """
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    _check(size)
    if drawings < 1:
        raise InputError(f"drawings is {drawings}: use at least 1")
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
            images = _distorted(shapes[:, kept], drawings, random)
            result[name in _TEST][name] = Alphabet(images, [numbers[j] for j in kept])
    return result


def _shapes(font: str, letters: list[int], side: int) -> Tensor:
    """Draw letters (K, side, side), 0 to 1, centred, with a longer side of at most two thirds of the image's."""
    import numpy as np
    from PIL import Image, ImageFont

    # the basic engine is always available; the other one draws slightly differently
    loaded = ImageFont.truetype(font, side, layout_engine=ImageFont.Layout.BASIC)
    images = np.zeros((len(letters), side, side), np.float32)
    for image, letter in zip(images, letters, strict=True):
        mask = loaded.getmask(chr(letter), mode="L")
        ink = Image.frombytes("L", mask.size, bytes(mask))
        ink = ink.crop(ink.getbbox())
        scale = min(side * 2 / 3 / max(ink.size), 1.5)
        width, height = (max(1, round(length * scale)) for length in ink.size)
        left, top = (side - width) // 2, (side - height) // 2
        image[top : top + height, left : left + width] = ink.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(images / 255)


def _different(shapes: Tensor) -> list[int]:
    """Return which of K shapes (fonts, K, side, side) look, in every font, unlike all shapes kept before them."""
    small = F.adaptive_avg_pool2d(shapes, 28)
    blurred = F.normalize(F.avg_pool2d(small, 3, stride=1, padding=1).flatten(2), dim=2)
    alike = (blurred @ blurred.mT).amax(0) > _ALIKE
    kept = []
    for i in range(len(alike)):
        if not alike[i, kept].any():
            kept.append(i)
    return kept


def _distorted(shapes: Tensor, drawings: int, random: "np.random.Generator") -> Tensor:
    """Distort shapes (fonts, K, side, side) in random ways: (K, drawings, side / 2, side / 2), uint8."""
    fonts, K, side, _ = shapes.shape
    font = torch.cat([torch.from_numpy(random.permutation(fonts)) for _ in range(math.ceil(drawings / fonts))])
    pen = torch.from_numpy(random.random(drawings, "float32"))[:, None, None]
    radius = round(side / 56)
    thick, thin = (sign * F.max_pool2d(sign * shapes, 2 * radius + 1, stride=1, padding=radius) for sign in (1, -1))
    ink, thick, thin = (these[font[:drawings]].movedim(0, 1) for these in (shapes, thick, thin))
    ink = ink + 0.8 * (1 - pen) * (thin - ink) + 0.3 * pen * (thick - ink)  # less than 1, or hairlines would vanish

    # in units of half an image: a random affine map close to the identity, and a smooth field from 4 x 4 random shifts
    noise = torch.from_numpy(random.standard_normal((K * drawings, 6 + 32), "float32"))
    affine = torch.eye(2, 3) + torch.tensor([0.1, 0.1, 0.08]) * noise[:, :6].view(-1, 2, 3)
    size = side // 2
    grid = F.affine_grid(affine, [K * drawings, 1, size, size], align_corners=False)
    bend = F.interpolate(0.06 * noise[:, 6:].view(-1, 2, 4, 4), (size, size), mode="bicubic", align_corners=False)
    ink = F.avg_pool2d(ink.reshape(-1, 1, side, side), 3, stride=1, padding=1)  # or sampling would skip strokes
    images = F.grid_sample(ink, grid + bend.movedim(1, -1), align_corners=False).view(K, drawings, size, size)
    return (images * 255).round().to(torch.uint8)


def _check(size: int) -> None:
    if size < 8:
        raise InputError(f"size is {size}: use at least 8 pixels, or characters do not fit")


def _contents(root: str | Path, name: str) -> Iterator[tuple[PurePosixPath, str, bytes]]:
    """Yield the path inside the set, a name for errors, and the content of each image and list of labels."""
    place = Path(root) / "omniglot-py"
    folder, archive = place / name, place / f"{name}.zip"

    def wanted(path: PurePosixPath) -> bool:
        return is_image(path) or path.name == "class_labels.txt"

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
        raise InputError(f"Omniglot: {folder if os.path.lexists(folder) else archive} holds no images: {_AGAIN}")


def _drawing(where: str, content: bytes, size: int) -> Tensor:
    """Decode and resize a drawing of Omniglot. It has 1 bit, which Pillow would resize without antialiasing."""
    import numpy as np
    from PIL import Image

    image = decode(io.BytesIO(content), where).convert("L").resize((size, size), Image.Resampling.BILINEAR)
    return 255 - torch.from_numpy(np.array(image))


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
    if small.max() < 8:  # of 255; a scanner's noise is about as large
        raise InputError(f"{path} is blank: draw a character that differs from the border, or remove the file")
    return (small * (255 / small.max())).round().to(torch.uint8)
