"""Small colour pictures with labels: CIFAR-10, class folders of a user's own, and coloured digits as a stand-in.

N is the number of pictures, s their height and width in pixels. Pictures are (N, 3, s, s), uint8, red, green and blue.
"""

import io
import os
import stat
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.sources import restricted_pickle
from lightning_meta.sources.digits import small_digits
from lightning_meta.sources.download import download
from lightning_meta.sources.image_files import bundled_photographs, decode, is_picture

_FOLDER, _ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
_BATCHES = {True: [f"data_batch_{i}" for i in range(1, 6)], False: ["test_batch"]}
_HOW_TO_GET = f"get {_ARCHIVE} from www.cs.toronto.edu/~kriz/cifar.html"
_AGAIN = "copy or download it again"
# bytes of one unpacked file (a batch of CIFAR-10 has 31 million), and of all: what says more is out to fill the memory
_LARGEST, _LARGEST_SUM = 2**26, 2**29
_PACKED = 20  # times its own size an archive may hold, too


def cifar10(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 (Krizhevsky 2009), in its own order and without trusting its pickles. Writes nothing.

    Args:
        root: Folder that holds ``cifar-10-batches-py/`` with its six batches (preferred) or ``cifar-10-python.tar.gz``.
        train: The training pictures (50,000 in the original) or the test pictures (10,000).

    Returns:
        Images (N, 3, 32, 32), uint8, and their labels (N,), uint8, 0 to 9.

    Raises:
        InputError: If a file is missing, unreadable, cut short, not what its name says, or a pickle that asks for
            anything but arrays.
    """
    batches = [_batch(content, name) for name, content in _contents(Path(root), _BATCHES[train])]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def has_cifar10(root: str | Path) -> bool:
    """Whether all six batches or the archive are there.

    What is there but broken counts: ``cifar10`` then names it, and nobody falls back to other data unawares.
    """
    return _unpacked(Path(root)) or os.path.lexists(Path(root) / _ARCHIVE)


def download_cifar10(root: str | Path) -> None:
    """Download CIFAR-10 with torchvision to ``<root>/cifar-10-python.tar.gz``: the whole archive or nothing.

    Args:
        root: Folder to download into; made where it does not exist.

    Raises:
        InputError: If the download fails (a server silent for 10 seconds counts) or ``root`` cannot be written.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    def fetch(folder: Path) -> None:
        download_url(CIFAR10.url, folder, _ARCHIVE, CIFAR10.tgz_md5)  # the class itself would unpack it, too

    download("CIFAR-10", fetch, [_ARCHIVE], root, f"{_HOW_TO_GET} by hand and put it there")


def class_folders(path: str | Path, size: int = 32, split: str | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Read pictures (PNG, JPG or WebP), one folder a class: ``<class>/<picture>`` or ``<split>/<class>/<picture>``.

    Args:
        path: The folder around them, or a .tar, .tar.gz, .tar.xz or .zip archive of what it holds. An archive is read
            in memory and never unpacked. Hidden files, other kinds of file, deeper folders and an archive's links are
            passed over.
        size: Height and width of the result; pictures of another size are resized (bilinear, smoothed when shrunk),
            and squeezed where they are not square.
        split: ``train`` or ``test``: read below this folder where there is one.

    Returns:
        Images (N, 3, size, size), uint8, by class and then by name, their labels (N,), uint8 (int64 for more than 256
        classes), and the names of the classes, sorted.

    Raises:
        InputError: If the path is missing, the archive unreadable or suspicious, a picture broken, a class without
            pictures, or fewer than two classes are there.
    """
    import numpy as np
    from PIL import Image

    path = Path(path)
    if size < 1:
        raise InputError(f"size is {size}: ask for at least 1 pixel")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a folder or an archive of class folders")
    classes = _from_folder(path, split) if path.is_dir() else _from_archive(path, split)
    names = sorted(classes)
    if not any(classes.values()):
        where = f"<class>/<picture> or {split}/<class>/<picture>" if split else "<class>/<picture>"
        raise InputError(f"{path} holds no class folders: sort PNG, JPG or WebP pictures into {where}")
    for name in names:
        if not classes[name]:
            raise InputError(f"{path}: the class {name} has no PNG, JPG or WebP pictures: add some or remove it")
    if len(names) < 2:
        raise InputError(f"{path} holds only the class {names[0]}: give at least 2 classes")
    images = np.empty((sum(map(len, classes.values())), 3, size, size), np.uint8)
    pictures = (picture for name in names for picture in sorted(classes[name].items()))
    for image, (where, content) in zip(images, pictures, strict=True):
        picture = decode(content if isinstance(content, Path) else io.BytesIO(content), where)
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        image[:] = np.asarray(picture).transpose(2, 0, 1)
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(classes[name]) for name in names]))
    return torch.from_numpy(images), labels.to(torch.uint8) if len(names) <= 256 else labels, names


def coloured_digits(train: bool, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits in colour over photographs: ten classes of 32x32 pictures without a download.

    Each picture is a digit of ``small_digits`` in one random colour, enlarged and shifted a little, over a random patch
    of scikit-learn's two photographs. Colour and patch say nothing about the class; digit and patch differ in
    brightness, now one way and now the other. The result is the same every time.

    Args:
        train: Pictures of the first 1,400 digits, or of the other 397.
        count: Number of pictures; each digit is drawn again and again, in turn. None: 8,000 and 2,000. Fewer are the
            first of more.

    Returns:
        Images (count, 3, 32, 32), uint8, and their labels (count,), uint8, 0 to 9.

    Raises:
        InputError: If ``count`` is less than 1.
    """
    import numpy as np

    count = (8000 if train else 2000) if count is None else count
    if count < 1:
        raise InputError(f"count is {count}: ask for at least 1 picture")
    digits, labels = (part[:1400] if train else part[1400:] for part in small_digits())
    turn = torch.arange(count) % len(digits)
    random = torch.from_numpy(np.random.default_rng(int(train)).random((count, 30), np.float32))
    photographs = bundled_photographs()
    photographs = photographs["china"], photographs["flower"]
    places = random[:, :3].tolist()
    patches = torch.stack([_patch(photographs[int(2 * which)], top, left) for which, top, left in places]).float()

    # of eight colours the first that is 90 grey levels away from the patch's average, or else the farthest
    grey = torch.tensor([0.299, 0.587, 0.114])
    colours = 255 * random[:, 6:].view(count, 8, 3)
    far = (colours @ grey - (patches.mean((2, 3)) @ grey)[:, None]).abs()
    chosen = torch.where((far >= 90).any(1), (far >= 90).int().argmax(1), far.argmax(1))
    colours = colours[torch.arange(count), chosen][:, :, None, None]

    # the ink's 20 of 28 pixels become 23 to 30 of 32, anywhere within the picture
    zoom = 1 + 0.3 * random[:, 3]
    shift = (random[:, 4:6] * 2 - 1) * (1 / zoom - 20 / 28)[:, None]
    where = torch.zeros(count, 2, 3)
    where[:, 0, 0] = where[:, 1, 1] = 1 / zoom
    where[:, :, 2] = shift
    grid = torch.nn.functional.affine_grid(where, [count, 1, 32, 32], align_corners=False)
    ink = torch.nn.functional.grid_sample(digits[turn][:, None] / 255, grid, align_corners=False)
    return (patches + ink * (colours - patches)).round().to(torch.uint8), labels[turn]


def _patch(photograph: Tensor, top: float, left: float) -> Tensor:
    y, x = int(top * (photograph.shape[1] - 31)), int(left * (photograph.shape[2] - 31))
    return photograph[:, y : y + 32, x : x + 32]


def _unpacked(root: Path) -> bool:
    # lexists: a dangling link is a broken file, not an absent one
    return all(os.path.lexists(root / _FOLDER / name) for names in _BATCHES.values() for name in names)


def _contents(root: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields the name, for errors, and the content of each of these batches."""
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"CIFAR-10: {root} {what}: give the folder that holds {_FOLDER}/ or {_ARCHIVE}")
    archive = root / _ARCHIVE
    if _unpacked(root):
        for path in [root / _FOLDER / name for name in names]:
            try:
                _check_size(path.parent, PurePosixPath(path.name), path.stat().st_size)
                yield str(path), path.read_bytes()
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}): put CIFAR-10's file there") from error
    elif os.path.lexists(archive):
        members = [PurePosixPath(_FOLDER, name) for name in names]
        found = dict(archive_members(archive, members.__contains__))
        for member in members:
            if found.get(member) is None:
                raise InputError(f"{archive}: {member} is missing: {_AGAIN}")
            yield f"{archive}: {member}", found[member]
    else:
        raise InputError(f"CIFAR-10: {_FOLDER}/ is missing or incomplete: {_HOW_TO_GET} and put it into {root}")


def _batch(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) of one pickled batch; ``name`` is for errors."""
    try:
        batch = restricted_pickle.load(content)
    except Exception as error:  # a damaged pickle raises all sorts
        raise InputError(f"{name}: damaged or not a batch of CIFAR-10 ({_reason(error)}): {_AGAIN}") from error
    if not isinstance(batch, dict):
        raise InputError(f"{name}: holds no data and labels: {_AGAIN}")
    array, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))  # Python 2's text is bytes
    if not isinstance(array, restricted_pickle.Array) or array.kind.kind != "u1" or array.shape[1:] != (32 * 32 * 3,):
        raise InputError(f"{name}: its data are not rows of 3,072 unsigned bytes: {_AGAIN}")
    if array.shape[0] < 1 or len(array.content) != array.shape[0] * array.shape[1]:
        raise InputError(f"{name}: {len(array.content):,} bytes for {array.shape[0]:,} pictures: {_AGAIN}")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise InputError(f"{name}: its labels are not numbers from 0 to 9: {_AGAIN}")
    if len(labels) != array.shape[0]:
        raise InputError(f"{name}: {len(labels):,} labels for {array.shape[0]:,} pictures: {_AGAIN}")
    pixels = torch.from_numpy(array.numbers().copy())
    return pixels.reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.uint8)


def _from_folder(path: Path, split: str | None) -> dict[str, dict[str, Path]]:
    """For each class the pictures: what an error calls them, and where they lie."""
    root = path / split if split and (path / split).is_dir() else path
    try:
        folders = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        return {folder.name: {str(file): file for file in folder.iterdir() if is_picture(file)} for folder in folders}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): choose a folder you can read") from error


def _from_archive(path: Path, split: str | None) -> dict[str, dict[str, bytes]]:
    """For each class the pictures: what an error calls them, and their content."""

    def wanted(name: PurePosixPath) -> bool:
        return is_picture(name) and (len(name.parts) == 2 or (len(name.parts) == 3 and name.parts[0] == split))

    below, top = {}, {}  # below the folder of the split; without it
    for name, content in archive_members(path, wanted):
        inside = split is not None and name.parts[:1] == (split,)
        classes, parts = (below, name.parts[1:]) if inside else (top, name.parts)
        if len(parts) == 2 - (content is None) and not parts[0].startswith((".", "__MACOSX")):
            pictures = classes.setdefault(parts[0], {})
            if content is not None:
                pictures[f"{path}: {name}"] = content
    return below or top


def archive_members(
    path: Path, wanted: Callable[[PurePosixPath], bool]
) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Yield an archive's folders (None) and the contents of the wanted files, but no links; writes nothing.

    Raises:
        InputError: If the archive is damaged, encrypted, no .zip or .tar, or holds paths outside of it or huge files,
            or many times its own size.
    """
    try:
        left = max(_LARGEST_SUM, _PACKED * path.stat().st_size)
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    name = _inside(path, member.filename)
                    if member.is_dir():
                        yield name, None
                    elif wanted(name) and not stat.S_ISLNK(member.external_attr >> 16):
                        _check_size(path, name, member.file_size)
                        left = _less(path, left, member.file_size)
                        yield name, read_member(archive, member)
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = _inside(path, member.name)
                    if member.isdir():
                        yield name, None
                    elif member.isreg() and wanted(name):
                        _check_size(path, name, member.size)
                        left = _less(path, left, member.size)
                        yield name, archive.extractfile(member).read()
                # tarfile takes a damaged header for the end, and leaves what follows and the checksum unread
                while rest := archive.fileobj.read(2**20):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("it goes on after its end")
    except InputError:
        raise
    except Exception as error:  # over a damaged archive both modules raise all sorts
        raise InputError(
            f"{path} is damaged, encrypted, or no .zip or .tar archive ({_reason(error)}): {_AGAIN}"
        ) from error


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Unpack a file from a .zip, but no more of it than it says it has: ``archive.read`` would take what comes.

    Raises:
        BadZipFile: If it is damaged, or packed in another way than .zip files commonly are.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
        raise zipfile.BadZipFile("it is packed with something else than deflate")
    with archive.open(member) as file:
        content = file.read(member.file_size)
        if len(content) < member.file_size or file.read(1):
            raise zipfile.BadZipFile(f"{member.filename!r} has not the size it says")
    return content


def _less(path: Path, left: int, size: int) -> int:
    if size > left:
        raise InputError(f"{path} holds many times its own size: do not trust this archive")
    return left - size


def _inside(path: Path, name: str) -> PurePosixPath:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise InputError(f"{path} holds {name!r}, which lies outside of it: do not trust this archive")
    return inside


def _check_size(path: Path, name: PurePosixPath, size: int) -> None:
    if size > _LARGEST:
        raise InputError(f"{path} holds {name} of {size:,} bytes, more than {_LARGEST:,}: make it smaller or remove it")


def _reason(error: Exception) -> str:
    return textwrap.shorten((str(error) or type(error).__name__).splitlines()[0].rstrip(":"), 120, placeholder=" ...")
