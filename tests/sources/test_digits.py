import contextlib
import gzip
import os
import socket
import struct
import sys
from pathlib import Path

import pytest
import torch

from lightning_meta.errors import InputError
from lightning_meta.sources.digits import download_mnist, has_mnist, mnist, small_digits

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(shape, content, magic=None):
    magic = 0x0800 + len(shape) if magic is None else magic
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(content)


PIXELS = [(7 * i) % 256 for i in range(3 * 784)]


@pytest.fixture
def root(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx((3, 28, 28), PIXELS))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx((3,), [5, 0, 9]))
    return tmp_path


def pack(root):
    """Replace every plain file by its .gz."""
    for path in list((root / "MNIST" / "raw").iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def refused(root, *words):
    with pytest.raises(InputError) as caught:
        mnist(root, train=True)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_reads_plain_and_packed_files_and_writes_nothing(root, packed, train):
    if packed:
        pack(root)
    before = sorted(root.rglob("*"))
    images, labels = mnist(root, train)
    assert images.dtype == labels.dtype == torch.uint8
    assert torch.equal(images, torch.tensor(PIXELS, dtype=torch.uint8).view(3, 28, 28))
    assert labels.tolist() == [5, 0, 9]
    assert sorted(root.rglob("*")) == before


def test_prefers_the_plain_file_and_keeps_the_splits_apart(root):
    raw = root / "MNIST" / "raw"
    (raw / f"{LABELS}.gz").write_bytes(gzip.compress(idx((3,), [1, 1, 1])))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx((3,), [2, 3, 4]))
    assert mnist(root, train=True)[1].tolist() == [5, 0, 9]
    assert mnist(root, train=False)[1].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (IMAGES, idx((3, 28, 28), PIXELS[:-1]), ("truncated", "2,351", "2,352")),
        (IMAGES, idx((3, 28, 28), [*PIXELS, 0]), ("too long", "2,353", "2,352")),
        (IMAGES, b"\0\0\x08\x03\0\0", ("shorter than its header",)),
        (IMAGES, idx((3, 28, 28), PIXELS, magic=2049), ("2049", "2051")),
        (LABELS, idx((3,), [1, 2, 3], magic=2051), ("2051", "2049")),
        (IMAGES, idx((3, 14, 56), PIXELS), ("14x56", "not 28x28")),
        (IMAGES, idx((0, 28, 28), []), ("0x28x28", "is empty")),
        (IMAGES, idx((2**31, 2**31, 2**31), []), ("truncated",)),
        (LABELS, idx((2,), [5, 0]), ("2 labels", "3 images")),
        (LABELS, idx((3,), [5, 0, 10]), ("label 10",)),
        (f"{IMAGES}.gz", gzip.compress(idx((3, 28, 28), PIXELS))[:-20], ("damaged",)),
        (f"{IMAGES}.gz", b"not a gzip file", ("damaged",)),
        (f"{IMAGES}.gz", gzip.compress(b"")[:10] + b"\xff" * 30, ("damaged",)),
        (f"{IMAGES}.gz", gzip.compress(idx((3, 28, 28), PIXELS))[:-8] + bytes(8), ("damaged", "CRC")),
    ],
    ids=[
        "truncated",
        "too long",
        "header truncated",
        "images with the magic of labels",
        "labels with the magic of images",
        "not 28x28",
        "no images",
        "a huge size",
        "one label too few",
        "label 10",
        "gz truncated",
        "not gz",
        "gz corrupt",
        "gz with a wrong checksum",
    ],
)
def test_refuses_a_broken_file_by_name(root, name, content, words):
    raw = root / "MNIST" / "raw"
    (raw / name.removesuffix(".gz")).unlink()
    (raw / name).write_bytes(content)
    assert has_mnist(root)  # a broken file exists
    refused(root, str(raw / name), *words)


def test_refuses_a_folder_in_a_files_place_and_a_dangling_link(root):
    path = root / "MNIST" / "raw" / IMAGES
    path.unlink()
    path.mkdir()
    assert has_mnist(root)
    refused(root, str(path), "directory")
    path.rmdir()
    path.symlink_to(root / "nowhere")
    assert has_mnist(root)
    refused(root, str(path), "cannot be read")


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_names_the_missing_file_where_to_get_it_and_where_to_put_it(root, name):
    assert has_mnist(root)
    (root / "MNIST" / "raw" / name).unlink()
    assert not has_mnist(root)
    refused(root, name, "yann.lecun.com", "download=True", str(root / "MNIST" / "raw"))


def test_refuses_a_root_that_is_no_folder(tmp_path):
    refused(tmp_path / "none", str(tmp_path / "none"), "does not exist")
    file = tmp_path / "file"
    file.touch()
    refused(file, str(file), "not a folder")
    assert not has_mnist(file)
    assert not has_mnist(tmp_path)


class Server:
    """Mock of torchvision's class: write its files, or write some of them and fail."""

    def __init__(self, error=None, missing=()):
        self.error, self.missing, self.timeout = error, missing, None

    def __call__(self, root, download):
        assert download
        self.timeout = socket.getdefaulttimeout()
        print("100%|####|")
        print("100%|####|", file=sys.stderr)
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            for name, content in (
                (f"{split}-images-idx3-ubyte", idx((3, 28, 28), PIXELS)),
                (f"{split}-labels-idx1-ubyte", idx((3,), [5, 0, 9])),
            ):
                if name not in self.missing:
                    (raw / name).write_bytes(content)
        if self.error:
            raise self.error


@pytest.fixture
def serve(monkeypatch):
    def install(server):
        monkeypatch.setattr("torchvision.datasets.MNIST", server)
        return server

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    yield install
    socket.setdefaulttimeout(before)


def test_downloads_quietly_under_a_timeout(tmp_path, serve, capfd):
    server = serve(Server())
    root = tmp_path / "new" / "data"
    download_mnist(root)
    assert mnist(root, train=True)[1].tolist() == [5, 0, 9]
    assert has_mnist(root)
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert server.timeout == 10
    assert socket.getdefaulttimeout() == 77
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "server",
    [
        Server(error=RuntimeError("Error downloading x:\nTried y, got:\n<urlopen error>")),
        Server(error=TimeoutError("timed out")),
        Server(missing=["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_no_data_set(tmp_path, serve, server):
    serve(server)
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        download_mnist(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)
    assert not has_mnist(tmp_path)
    assert not list(tmp_path.glob(".download-*"))
    assert socket.getdefaulttimeout() == 77


def test_a_download_that_is_interrupted_leaves_nothing(tmp_path, serve):
    serve(Server(error=KeyboardInterrupt()))
    with contextlib.suppress(KeyboardInterrupt):
        download_mnist(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == 77


def test_download_refuses_a_root_that_cannot_be_written(tmp_path, serve):
    serve(Server())
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match=r"cannot write MNIST to .*file"):
        download_mnist(file)


def test_small_digits_are_framed_and_as_bright_as_mnist():
    images, labels = small_digits()
    assert images.shape == (1797, 28, 28)
    assert images.dtype == labels.dtype == torch.uint8
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    framed = torch.nn.functional.pad(images[:, 4:24, 4:24], (4, 4, 4, 4))
    assert torch.equal(images, framed)
    assert (images.flatten(1).max(1).values > 250).all()
    assert images.float().mean() == pytest.approx(33.3, abs=1.5)  # MNIST's mean
    assert torch.equal(images, small_digits()[0])
    # reduced to 8x8 they match the originals: not flipped, rotated or shifted
    from sklearn.datasets import load_digits

    small = torch.nn.functional.interpolate(images[:, None, 4:24, 4:24].float(), size=(8, 8), mode="area")
    both = torch.stack([small.flatten(), torch.from_numpy(load_digits().images).float().flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95


@pytest.mark.skipif("LIGHTNING_META_DATA" not in os.environ, reason="LIGHTNING_META_DATA names no folder of real data")
def test_the_real_mnist():
    root = os.environ["LIGHTNING_META_DATA"]
    assert has_mnist(root)
    images, labels = mnist(root, train=True)
    assert images.shape == (60_000, 28, 28)
    assert images.float().mean().item() == pytest.approx(33.318, abs=1e-3)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist(root, train=False)[0].shape == (10_000, 28, 28)
