"""Small labelled colour images: CIFAR-10, class folders of the user, and coloured digits as a stand-in.

N is the number of images, S their height and width in pixels. Images are RGB (N, 3, S, S), uint8.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.sources import restricted_pickle
from lightning_meta.sources.archives import AGAIN, archive_members, reason
from lightning_meta.sources.digits import small_digits
from lightning_meta.sources.download import download
from lightning_meta.sources.image_files import bundled_photographs, decode, is_image

_FOLDER, _ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
_BATCHES = {True: [f"data_batch_{i}" for i in range(1, 6)], False: ["test_batch"]}
_HOW_TO_GET = f"get {_ARCHIVE} from www.cs.toronto.edu/~kriz/cifar.html"
_LARGEST = 2**26  # bytes of a batch; CIFAR-10's have 31 million


def cifar10(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 (Krizhevsky 2009) in its original order, without executing its pickles or writing to disk.

    Args:
        root: Folder that holds ``cifar-10-batches-py/`` with its six batches (preferred) or ``cifar-10-python.tar.gz``.
        train: Read the training images (50,000 in the original) instead of the test images (10,000).

    Returns:
        Images (N, 3, 32, 32), uint8, and their labels (N,), uint8, 0 to 9.

    Raises:
        InputError: If a file is missing, unreadable, truncated or no batch of CIFAR-10, or a pickle requests anything
            but arrays.
    """
    batches = [_batch(content, name) for name, content in _contents(Path(root), _BATCHES[train])]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def has_cifar10(root: str | Path) -> bool:
    """Return whether all six batches or the archive exist.

    Broken files count as existing: ``cifar10`` then reports them, instead of a silent fallback to other data.
    """
    return _unpacked(Path(root)) or os.path.lexists(Path(root) / _ARCHIVE)


def download_cifar10(root: str | Path) -> None:
    """Download CIFAR-10 to ``<root>/cifar-10-python.tar.gz``. A failed download leaves nothing behind.

    Args:
        root: Folder to download into; created if it does not exist.

    Raises:
        InputError: If the download fails, the server does not answer for 10 seconds, or ``root`` cannot be written.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    def fetch(folder: Path) -> None:
        download_url(CIFAR10.url, folder, _ARCHIVE, CIFAR10.tgz_md5)  # CIFAR10(download=True) would also unpack it

    download("CIFAR-10", fetch, [_ARCHIVE], root, f"{_HOW_TO_GET} by hand and put it there")


def class_folders(path: str | Path, size: int = 32, split: str | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Read images (PNG, JPG or WebP) from one folder per class: ``<class>/<image>`` or ``<split>/<class>/<image>``.

    Args:
        path: Folder of class folders, or a .tar, .tar.gz, .tar.xz or .zip archive of them. An archive is read in
            memory and not unpacked. Hidden files, other kinds of file, deeper folders and an archive's links are
            skipped.
        size: Height and width of the result. Images of another size are resized (bilinear, antialiased) without
            keeping their aspect ratio.
        split: ``train`` or ``test``: read the class folders in this folder if it exists.

    Returns:
        Images (N, 3, size, size), uint8, sorted by class and name, their labels (N,), uint8 (int64 for more than 256
        classes), and the sorted names of the classes.

    Raises:
        InputError: If the path is missing, the archive is unreadable or unsafe, an image is damaged, a class has no
            images, or there are fewer than two classes.
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
        layout = f"<class>/<image> or {split}/<class>/<image>" if split else "<class>/<image>"
        raise InputError(f"{path} holds no class folders: arrange PNG, JPG or WebP images as {layout}")
    for name in names:
        if not classes[name]:
            raise InputError(f"{path}: the class {name} has no PNG, JPG or WebP images: add some or remove the folder")
    if len(names) < 2:
        raise InputError(f"{path} holds only the class {names[0]}: give at least 2 classes")
    images = np.empty((sum(map(len, classes.values())), 3, size, size), np.uint8)
    files = (file for name in names for file in sorted(classes[name].items()))
    for pixels, (where, content) in zip(images, files, strict=True):
        image = decode(content if isinstance(content, Path) else io.BytesIO(content), where)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels[:] = np.asarray(image).transpose(2, 0, 1)
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(classes[name]) for name in names]))
    return torch.from_numpy(images), labels.to(torch.uint8) if len(names) <= 256 else labels, names


def coloured_digits(train: bool, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw scikit-learn's digits in colour over photographs: ten classes of 32x32 images without a download.

    Each image is a digit of ``small_digits`` in one random colour, enlarged and shifted a little, over a random patch
    of scikit-learn's two photographs. Colour and patch are independent of the class. The digit differs from the patch
    in brightness: some digits are lighter, others darker. The result is the same every time.

    Args:
        train: Draw the first 1,400 digits instead of the other 397.
        count: Number of images, by default 8,000 (train) or 2,000. The digits are used in turn, several times if
            necessary. A smaller count gives the first images of a larger one.

    Returns:
        Images (count, 3, 32, 32), uint8, and their labels (count,), uint8, 0 to 9.

    Raises:
        InputError: If ``count`` is less than 1.

    Example:
        >>> images, labels = coloured_digits(train=False, count=5)
        >>> images.shape, labels.shape
        (torch.Size([5, 3, 32, 32]), torch.Size([5]))
    """
    import numpy as np

    count = (8000 if train else 2000) if count is None else count
    if count < 1:
        raise InputError(f"count is {count}: ask for at least 1 image")
    digits, labels = (part[:1400] if train else part[1400:] for part in small_digits())
    turn = torch.arange(count) % len(digits)
    random = torch.from_numpy(np.random.default_rng(int(train)).random((count, 30), np.float32))
    photographs = bundled_photographs()
    photographs = photographs["china"], photographs["flower"]
    places = random[:, :3].tolist()
    patches = torch.stack([_patch(photographs[int(2 * which)], top, left) for which, top, left in places]).float()

    # take the first of eight colours that is 90 grey levels from the patch's mean, or else the most distant one
    grey = torch.tensor([0.299, 0.587, 0.114])
    colours = 255 * random[:, 6:].view(count, 8, 3)
    far = (colours @ grey - (patches.mean((2, 3)) @ grey)[:, None]).abs()
    chosen = torch.where((far >= 90).any(1), (far >= 90).int().argmax(1), far.argmax(1))
    colours = colours[torch.arange(count), chosen][:, :, None, None]

    # scale the digit from 20 of 28 pixels to 23 to 30 of 32, and place it anywhere inside the image
    zoom = 1 + 0.3 * random[:, 3]
    shift = (random[:, 4:6] * 2 - 1) * (1 / zoom - 20 / 28)[:, None]
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 / zoom
    affine[:, :, 2] = shift
    grid = torch.nn.functional.affine_grid(affine, [count, 1, 32, 32], align_corners=False)
    ink = torch.nn.functional.grid_sample(digits[turn][:, None] / 255, grid, align_corners=False)
    return (patches + ink * (colours - patches)).round().to(torch.uint8), labels[turn]


def _patch(photograph: Tensor, top: float, left: float) -> Tensor:
    y, x = int(top * (photograph.shape[1] - 31)), int(left * (photograph.shape[2] - 31))
    return photograph[:, y : y + 32, x : x + 32]


def _unpacked(root: Path) -> bool:
    return all(os.path.lexists(root / _FOLDER / name) for names in _BATCHES.values() for name in names)


def _contents(root: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the name (for error messages) and the content of each of these batches."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"CIFAR-10: {root} {problem}: give the folder that holds {_FOLDER}/ or {_ARCHIVE}")
    archive = root / _ARCHIVE
    if _unpacked(root):
        for path in [root / _FOLDER / name for name in names]:
            try:
                if (size := path.stat().st_size) > _LARGEST:
                    raise InputError(f"{path} has {size:,} bytes, too many for a batch of CIFAR-10: {AGAIN}")
                yield str(path), path.read_bytes()
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}): put CIFAR-10's file there") from error
    elif os.path.lexists(archive):
        members = [PurePosixPath(_FOLDER, name) for name in names]
        found = dict(archive_members(archive, members.__contains__))
        for member in members:
            if found.get(member) is None:
                raise InputError(f"{archive}: {member} is missing: {AGAIN}")
            yield f"{archive}: {member}", found[member]
    else:
        raise InputError(f"CIFAR-10: {_FOLDER}/ is missing or incomplete: {_HOW_TO_GET} and put it into {root}")


def _batch(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, 3, 32, 32) and labels (N,) of one pickled batch; ``name`` is for error messages."""
    try:
        batch = restricted_pickle.load(content)
    except Exception as error:  # a damaged pickle raises all sorts of exceptions
        raise InputError(f"{name}: damaged or not a batch of CIFAR-10 ({reason(error)}): {AGAIN}") from error
    if not isinstance(batch, dict):
        raise InputError(f"{name}: holds no data and labels: {AGAIN}")
    # the keys are bytes, because Python 2 wrote the original
    array, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(array, restricted_pickle.Array) or array.kind.kind != "u1" or array.shape[1:] != (32 * 32 * 3,):
        raise InputError(f"{name}: its data are not rows of 3,072 unsigned bytes: {AGAIN}")
    if array.shape[0] < 1 or len(array.content) != array.shape[0] * array.shape[1]:
        raise InputError(f"{name}: {len(array.content):,} bytes for {array.shape[0]:,} images: {AGAIN}")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise InputError(f"{name}: its labels are not numbers from 0 to 9: {AGAIN}")
    if len(labels) != array.shape[0]:
        raise InputError(f"{name}: {len(labels):,} labels for {array.shape[0]:,} images: {AGAIN}")
    pixels = torch.from_numpy(array.numbers().copy())
    return pixels.reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.uint8)


def _from_folder(path: Path, split: str | None) -> dict[str, dict[str, Path]]:
    """Return for each class its images: names for error messages, and paths."""
    root = path / split if split and (path / split).is_dir() else path
    try:
        folders = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        return {folder.name: {str(file): file for file in folder.iterdir() if is_image(file)} for folder in folders}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): choose a folder you can read") from error


def _from_archive(path: Path, split: str | None) -> dict[str, dict[str, bytes]]:
    """Return for each class its images: names for error messages, and contents."""

    def wanted(name: PurePosixPath) -> bool:
        return is_image(name) and (len(name.parts) == 2 or (len(name.parts) == 3 and name.parts[0] == split))

    below, top = {}, {}  # classes in the split's folder, and outside it
    for name, content in archive_members(path, wanted):
        inside = split is not None and name.parts[:1] == (split,)
        classes, parts = (below, name.parts[1:]) if inside else (top, name.parts)
        if len(parts) == 2 - (content is None) and not parts[0].startswith((".", "__MACOSX")):
            images = classes.setdefault(parts[0], {})
            if content is not None:
                images[f"{path}: {name}"] = content
    return below or top
