import contextlib
import io
import os
import pickle
import socket
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.sources.archives import archive_members
from lightning_meta.sources.cifar import cifar10, class_folders, coloured_digits, download_cifar10, has_cifar10
from tests.conftest import refused

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)


def text(content):
    """A string as Python 2 pickles it."""
    return b"T" + struct.pack("<i", len(content)) + content


def python2(pixels, labels, by_column=False, kind=b"u1"):
    """A batch as Python 2 and the NumPy of 2009 wrote it."""
    content = (pixels.T if by_column else pixels).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    shape = b"(" + b"".join(b"M" + struct.pack("<H", length) for length in pixels.shape) + b"t"
    dtype = (
        b"cnumpy\ndtype\n("
        + text(kind)
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array += b"(K\x01" + shape + dtype + (b"\x88" if by_column else b"\x89") + text(content) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    data = text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + data + b"u."


def rows(i):
    """The images of batch ``i``."""
    return np.roll(PIXELS, i)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(python2(rows(i), [i, 0, 9]))
    return tmp_path


def pack(root):
    """Put everything into the archive instead."""
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    for name in NAMES:
        (root / "cifar-10-batches-py" / name).unlink()
    (root / "cifar-10-batches-py").rmdir()


@pytest.mark.parametrize("packed", [False, True])
def test_reads_the_folder_or_the_archive_and_writes_nothing(root, packed):
    if packed:
        pack(root)
    assert has_cifar10(root)
    before = sorted(root.rglob("*"))
    images, labels = cifar10(root, train=True)
    assert images.dtype == labels.dtype == torch.uint8
    expected = torch.from_numpy(np.concatenate([rows(i) for i in range(5)]))
    assert torch.equal(images, expected.view(15, 3, 32, 32))
    assert labels.tolist() == [0, 0, 9, 1, 0, 9, 2, 0, 9, 3, 0, 9, 4, 0, 9]
    images, labels = cifar10(str(root), train=False)
    assert torch.equal(images, torch.from_numpy(rows(5)).view(3, 3, 32, 32))
    assert labels.tolist() == [5, 0, 9]
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        python2(rows(5), [5, 0, 9], by_column=True),
        pickle.dumps({"data": rows(5), "labels": [5, 0, 9]}, protocol=2),
        pickle.dumps({b"data": rows(5), b"labels": [5, 0, 9]}, protocol=4),
    ],
    ids=["by column", "Python 3, protocol 2", "Python 3, protocol 4"],
)
def test_reads_other_pickles_of_the_same(root, content):
    assert pickle.loads(content, encoding="bytes")  # NumPy reads the hand-made pickle, too
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    images, labels = cifar10(root, train=False)
    assert torch.equal(images, torch.from_numpy(rows(5)).view(3, 3, 32, 32))
    assert labels.tolist() == [5, 0, 9]


class Malicious:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(root, packed, protocol):
    trap = root / "trap"
    content = pickle.dumps({b"data": Malicious(os.mkdir, str(trap)), b"labels": [1]}, protocol)
    pickle.loads(content)
    trap.rmdir()  # an unrestricted unpickler executes it
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    if packed:
        pack(root)
    refused(lambda: cifar10(root, train=True), "data_batch_2", "asks for", "mkdir")
    assert not trap.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "os system",
        "numpy frombuffer",
        "numpy.core.multiarray scalar",
        "_codecs decode",
    ],
)
def test_an_unpickler_that_knows_only_arrays(root, name):
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    refused(lambda: cifar10(root, train=False), "test_batch", name.replace(" ", "."))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("damaged",)),
        (b"no pickle", ("damaged",)),
        (python2(PIXELS, [1, 2, 3])[:5000], ("damaged", "truncated")),
        (b"\x80\x02]\x94.", ("no data",)),
        (b"\x80\x02}.", ("3,072",)),
        (pickle.dumps({"data": [1, 2], "labels": [1, 2]}, 2), ("3,072",)),
        (pickle.dumps({"data": np.ndarray, "labels": [1]}, 2), ("3,072",)),
        (b"\x80\x02cnumpy\nndarray\n}b.", ("damaged",)),
        (python2(PIXELS[:, :-1], [1, 2, 3]), ("3,072",)),
        (python2(PIXELS.reshape(-1), [1, 2, 3]), ("3,072",)),
        (python2(PIXELS, [1, 2, 3], kind=b"i1"), ("unsigned",)),
        (pickle.dumps({"data": PIXELS.astype(object), "labels": [1, 2, 3]}, 2), ("unsigned",)),
        (python2(PIXELS[:0], []), ("0 bytes for 0 images",)),
        (python2(PIXELS, [1, 2, 3]).replace(b"M\x03\x00", b"M\x04\x00"), ("9,216 bytes for 4 images",)),
        (pickle.dumps({"data": PIXELS}, 2), ("labels are not",)),
        (python2(PIXELS, [1, 2, 10]), ("0 to 9",)),
        (pickle.dumps({"data": PIXELS, "labels": [1, 2, "3"]}, 2), ("0 to 9",)),
        (python2(PIXELS, [1, 2]), ("2 labels for 3 images",)),
    ],
)
def test_refuses_a_broken_batch_by_name(root, content, words):
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(content)
    assert has_cifar10(root)  # a broken file exists
    refused(lambda: cifar10(root, train=False), path, *words)
    assert len(cifar10(root, train=True)[0]) == 15
    pack(root)
    refused(lambda: cifar10(root, train=False), "cifar-10-python.tar.gz: cifar-10-batches-py/test_batch", *words)


def test_refuses_a_broken_archive(root):
    pack(root)
    path = root / "cifar-10-python.tar.gz"
    content = path.read_bytes()
    for broken in (b"", b"no archive", content[:-2000], content[:-8] + bytes(8), content[:3000]):
        path.write_bytes(broken)
        assert has_cifar10(root)
        refused(lambda: cifar10(root, train=True), path, "damaged")
    path.unlink()
    path.symlink_to(root / "nowhere")
    assert has_cifar10(root)
    refused(lambda: cifar10(root, train=True), path)


def test_names_what_is_missing(root):
    refused(lambda: cifar10(root / "none", train=True), root / "none", "does not exist")
    (root / "file").touch()
    refused(lambda: cifar10(root / "file", train=True), root / "file", "not a folder")
    path = root / "cifar-10-batches-py" / "test_batch"
    path.unlink()
    path.mkdir()
    refused(lambda: cifar10(root, train=False), path, "directory")
    path.rmdir()
    assert not has_cifar10(root)
    refused(lambda: cifar10(root, train=True), "incomplete", "www.cs.toronto.edu", root)
    path.touch()
    pack(root)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz"):
        pass
    refused(lambda: cifar10(root, train=True), "cifar-10-batches-py/data_batch_1 is missing")
    for place in (root / "none", root / "file"):
        assert not has_cifar10(place)


class Server:
    """Mock of torchvision's download: write an archive, or write a part of it and fail."""

    def __init__(self, error=None):
        self.error, self.timeout = error, None

    def __call__(self, url, root, filename, md5):
        assert url.endswith(filename)
        assert len(md5) == 32
        self.timeout = socket.getdefaulttimeout()
        print("100%|####|")
        print("100%|####|", file=sys.stderr)
        (Path(root) / filename).write_bytes(b"archive")
        if self.error:
            raise self.error


@pytest.fixture
def serve(monkeypatch):
    def install(server):
        monkeypatch.setattr("torchvision.datasets.utils.download_url", server)
        return server

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    yield install
    socket.setdefaulttimeout(before)


def test_downloads_quietly_under_a_timeout(tmp_path, serve, capfd):
    server = serve(Server())
    root = tmp_path / "new" / "data"
    download_cifar10(root)
    assert has_cifar10(root)
    assert [(path.name, path.read_bytes()) for path in root.iterdir()] == [("cifar-10-python.tar.gz", b"archive")]
    assert server.timeout == 10
    assert socket.getdefaulttimeout() == 77
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [RuntimeError("File not found\nor corrupted."), TimeoutError("timed out")])
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, serve, error):
    serve(Server(error))
    refused(lambda: download_cifar10(tmp_path), "could not be downloaded", tmp_path, "www.cs.toronto.edu")
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == 77


def test_a_download_that_is_interrupted_leaves_nothing(tmp_path, serve):
    serve(Server(KeyboardInterrupt()))
    with contextlib.suppress(KeyboardInterrupt):
        download_cifar10(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == 77


def test_download_refuses_a_root_that_cannot_be_written(tmp_path, serve):
    serve(Server())
    (tmp_path / "file").touch()
    refused(lambda: download_cifar10(tmp_path / "file"), "cannot write CIFAR-10", tmp_path / "file")


COLOURS = {
    "train/cat/2.png": 20,
    "train/cat/10.JPG": 40,
    "train/cat/11.webp": 50,
    "train/dog/1.png": 60,
    "test/dog/1.jpeg": 80,
    "test/cat/1.png": 90,
}


@pytest.fixture
def pictures(tmp_path):
    """A folder of grey images, one of them large, and of files that are to be skipped."""
    folder = tmp_path / "pictures"
    for name, grey in COLOURS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32) if grey != 60 else (100, 50), (grey,) * 3).save(folder / name, lossless=True)
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / "cat" / "deeper").mkdir()
    for name in (
        "train/cat/.1.png",
        "train/cat/notes.txt",
        "train/.hidden/1.png",
        "train/cat/deeper/1.png",
        "1.png",
    ):
        (folder / name).write_bytes(b"no picture")
    return folder


def archived(folder, suffix):
    path = folder.with_name(f"pictures{suffix}")
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*"):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, f"w:{suffix[5:]}") as archive:
            archive.add(folder, ".")
    return path


@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_class_folders_from_a_folder_or_an_archive(pictures, suffix):
    path = archived(pictures, suffix) if suffix else pictures
    before = sorted(pictures.parent.rglob("*"))
    images, labels, names = class_folders(path, split="train")
    assert names == ["cat", "dog"]
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == labels.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1]
    assert images[:, 0, 9, 9].tolist() == [40, 50, 20, 60]
    images, labels, _ = class_folders(str(path), split="test")
    assert (images[:, 2, 0, 0].tolist(), labels.tolist()) == ([90, 80], [0, 1])
    assert sorted(pictures.parent.rglob("*")) == before
    refused(lambda: class_folders(path), path, "no class folders")


@pytest.mark.parametrize("suffix", ["", ".tar", ".zip"])
def test_class_folders_without_splits(pictures, suffix):
    path = archived(pictures / "test", suffix) if suffix else pictures / "test"
    for split in (None, "train"):
        images, labels, names = class_folders(path, 8, split)
        assert images.shape == (2, 3, 8, 8)
        assert (labels.tolist(), names) == ([0, 1], ["cat", "dog"])


def test_shrinking_smooths(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(board.astype(np.uint8)).save(tmp_path / name / "1.png")
    assert (class_folders(tmp_path)[0][:, :, 2:-2, 2:-2].float() - 127.5).abs().max() < 9


def test_more_classes_than_a_byte_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        picture = io.BytesIO()
        Image.new("L", (1, 1)).save(picture, "PNG")
        for i in range(257):
            archive.writestr(f"{i:03}/1.png", picture.getvalue())
    images, labels, names = class_folders(tmp_path / "many.zip", size=1)
    assert images.shape == (257, 3, 1, 1)
    assert labels.dtype == torch.int64
    assert labels.tolist() == list(range(257)) == [int(name) for name in names]


@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
def test_class_folders_refuses_what_is_no_data_set(pictures, suffix):
    def read():
        path = archived(pictures, suffix) if suffix else pictures
        return class_folders(path, split="train")

    broken = pictures / "train" / "dog" / "2.png"
    broken.write_bytes(b"no picture")
    refused(read, "train/dog/2.png", "not an image")
    broken.write_bytes((pictures / "train" / "dog" / "1.png").read_bytes()[:60])
    refused(read, "train/dog/2.png", "cannot be decoded")
    broken.unlink()
    (pictures / "train" / "dog" / "1.png").unlink()
    refused(read, "the class dog", "add some")
    (pictures / "train" / "dog").rmdir()
    refused(read, "only the class cat")
    for name in ("2.png", "10.JPG", "11.webp"):
        (pictures / "train" / "cat" / name).unlink()
    refused(read, "no class folders", "train/<class>/<image>")


def test_class_folders_refuses_what_is_no_folder_and_no_archive(tmp_path):
    refused(lambda: class_folders(tmp_path / "none"), tmp_path / "none", "does not exist")
    refused(lambda: class_folders(tmp_path, size=0), "size is 0")
    for name in ("file.zip", "file.tar.gz", "file.png"):
        for content in (b"", b"no archive"):
            (tmp_path / name).write_bytes(content)
            refused(lambda path=tmp_path / name: class_folders(path), tmp_path / name, "damaged")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_class_folders_refuses_a_damaged_archive(pictures, suffix):
    path = archived(pictures, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(lambda: class_folders(path, split="train"), path, "damaged")
    middle = content.index(b"10.JPG") if suffix in (".tar", ".zip") else len(content) // 2
    path.write_bytes(content[:middle] + b"????" + content[middle + 4 :])  # inside a name; tarfile takes it for the end
    refused(lambda: class_folders(path, split="train"), path, "damaged")


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize("name", ["../cat/1.png", "cat/../../1.png", "/cat/1.png"])
def test_class_folders_refuses_an_archive_that_reaches_outside(pictures, suffix, name):
    path = archived(pictures / "test", suffix)
    with zipfile.ZipFile(path, "a") if suffix == ".zip" else tarfile.open(path, "a") as archive:
        if suffix == ".zip":
            archive.writestr(name, b"")
        else:
            archive.addfile(tarfile.TarInfo(name))
    refused(lambda: class_folders(path), path, name, "do not trust")


def test_links_in_an_archive_are_passed_over(pictures):
    path = archived(pictures / "test", ".tar")
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"cat/link{kind.decode()}.png")
            member.type, member.linkname = kind, str(pictures / "train" / "cat" / "2.png")
            archive.addfile(member)
    assert len(class_folders(path)[0]) == 2
    path = archived(pictures / "test", ".zip")
    with zipfile.ZipFile(path, "a") as archive:
        member = zipfile.ZipInfo("cat/link.png")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, str(pictures / "train" / "cat" / "2.png"))
    assert len(class_folders(path)[0]) == 2


def test_a_file_that_fills_memory_is_refused(pictures):
    for suffix in (".tar", ".zip"):
        path = archived(pictures / "test", suffix)
        refused(lambda path=path: list(archive_members(path, lambda name: True, largest=10)), path, "more than 10")


@pytest.mark.parametrize("train", [True, False])
def test_coloured_digits_are_the_same_every_time(train):
    images, labels = coloured_digits(train, 200)
    assert images.shape == (200, 3, 32, 32)
    assert images.dtype == labels.dtype == torch.uint8
    assert labels.unique().tolist() == list(range(10))
    assert torch.equal(images, coloured_digits(train, 200)[0])
    assert torch.equal(images[:20], coloured_digits(train, 20)[0])
    assert not torch.equal(images, coloured_digits(not train, 200)[0])
    assert len(images.flatten(1).unique(dim=0)) == 200


def test_coloured_digits_come_again_over_other_patches():
    images, labels = coloured_digits(False)
    assert images.shape == (2000, 3, 32, 32)
    assert labels.bincount().min() > 180
    assert torch.equal(labels[:397], labels[397:794])
    assert not (images[:397] == images[397:794]).flatten(1).all(1).any()
    refused(lambda: coloured_digits(False, 0), "count is 0")


def test_a_coloured_digit_is_the_digit_of_its_label():
    from lightning_meta.sources.digits import small_digits

    images, labels = coloured_digits(True, 300)
    # ink differs from the image's border; its position is compared with the mean image of each digit
    digits, truth = small_digits()
    means = torch.stack([digits[truth == i].float().mean(0) for i in range(10)])
    means = torch.nn.functional.interpolate(means[:, None], size=(32, 32), mode="bilinear", antialias=True)
    edge = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2).float()
    ink = (images.float() - edge.median(2).values[:, :, None, None]).norm(dim=1)
    ink = (ink - ink.mean((1, 2), keepdim=True)).flatten(1)
    means = (means - means.mean((1, 2, 3), keepdim=True)).flatten(1)
    guess = (torch.nn.functional.normalize(ink) @ torch.nn.functional.normalize(means).T).argmax(1)
    assert 0.4 < (guess == labels).float().mean() < 0.7  # far above chance, but not trivial


def test_the_first_of_the_real_pictures(real_data, tmp_path):
    found = dict.fromkeys(("airplane", "automobile"), 0)
    with (
        tarfile.open(real_data / "cifar10" / "cifar10_lossless.tar.xz") as archive,
        tarfile.open(tmp_path / "few.tar.xz", "w:xz") as copy,
    ):
        for member in archive:  # all of them would take seconds
            name = member.name.split("/")[1]
            if member.isfile() and found.get(name, 20) < 20:
                copy.addfile(member, archive.extractfile(member))
                found[name] += 1
            if set(found.values()) == {20}:
                break
    images, labels, names = class_folders(tmp_path / "few.tar.xz", split="test")
    assert images.shape == (40, 3, 32, 32)
    assert labels.tolist() == [0] * 20 + [1] * 20
    assert names == ["airplane", "automobile"]
    assert images[:20, 2].float().mean() > images[:20, 0].float().mean() + 5  # aeroplanes fly in blue skies


def test_a_pickle_of_too_many_instructions_is_refused(root, monkeypatch):
    monkeypatch.setattr("lightning_meta.sources.restricted_pickle._MOST", 30)
    refused(lambda: cifar10(root, train=False), "test_batch", "more than 30 instructions")
