"""Every reader over malformed files: it gives something valid or one line, runs nothing, and harms nothing on disk.

Each case writes a small valid file, breaks it and reads it in a child process of limited memory and time. Around the
file lies an outer folder: what a case writes, above the file or beside it, is seen.
"""

import bz2
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import stat
import struct
import sys
import tarfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors

from lightning_meta import catalogue
from lightning_meta.cli import main
from lightning_meta.drawing import files
from lightning_meta.dynamic_filters.moving_mnist_data import fixed_test_sequences
from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.features import Features, load_features
from lightning_meta.learned_optimizers.layers import LearnedRule
from lightning_meta.learned_optimizers.optimizer import _fingerprint, _options, read_rule
from lightning_meta.learned_optimizers.problem_sets import OneQuadratic
from lightning_meta.sources import (
    characters,
    cifar,
    digits,
    driving,
    image_files,
    parallel_text,
    stereo,
    strokes,
    subwords,
    text,
    tracks,
    video_files,
)
from lightning_meta.storage import weights
from lightning_meta.storage.checkpoints import read_checkpoint
from tests.conftest import arguments
from tests.sources.test_cifar import python2
from tests.sources.test_subwords import TEXTS
from tools import results

MEMORY, SECONDS = 3 * 2**29, 20  # what a case may take
FLIPS = 25  # files with flipped bytes for each reader
RANDOM = np.random.default_rng(0)


# --- cases in a child process --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    kind: str  # "read", "refused", "exit", or what must not be
    message: str


def fingerprints(folder: Path) -> dict[str, str]:
    """What lies below a folder: links by their target, files by their content, or by their size if it is huge."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, size = str(path.relative_to(folder)), path.lstat().st_size
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file() and os.access(path, os.R_OK):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if size < 2**24 else f"{size} bytes"
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def attempts(cases: dict[str, Callable[[], Outcome]]) -> dict[str, Outcome]:
    """What comes of each case, one after another in a child; if that dies in one, another child goes on after it."""
    names, outcomes = list(cases), {}
    while len(outcomes) < len(names):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if not child:
            try:
                go_through({name: cases[name] for name in names[len(outcomes) :]}, sender)
            finally:
                os._exit(0)
        sender.close()
        try:
            while True:
                outcomes[names[len(outcomes)]] = Outcome(*receiver.recv())
        except (EOFError, IndexError):
            _, status = os.waitpid(child, 0)
        if len(outcomes) < len(names):
            outcomes[names[len(outcomes)]] = Outcome(f"the process ended with status {status}", "")
    return outcomes


def go_through(cases: dict[str, Callable[[], Outcome]], sender: multiprocessing.connection.Connection) -> None:
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 3 * MEMORY  # not all that is reserved is used
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case in cases.values():
        sys.stdout = sys.stderr = io.StringIO()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: this ends the process
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kind, message = case()
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MEMORY:
            kind = f"it took {grown:,} bytes of memory"
        sender.send((kind, message))


def outcome(outer: Path, call: Callable[[], object]) -> Outcome:
    """What comes of a call; nothing below the folder may change."""
    before = fingerprints(outer)
    try:
        call()
        kind, message = "read", ""
    except InputError as error:
        kind, message = "refused", str(error)
        if len(message.splitlines()) != 1 or any(word in message for word in ("MemoryError", "Cannot allocate")):
            kind = f"no such message: {message!r}"
    except SystemExit as error:
        kind, message = "exit", error.code if isinstance(error.code, str) else sys.stderr.getvalue()
    except BaseException:
        kind, message = traceback.format_exc(), ""
    after = fingerprints(outer)
    return Outcome(kind if after == before else f"{before} has become {after}", message)


# --- readers: how to write a valid file, and how to read it ---------------------------------------------------------


class Reader(NamedTuple):
    write: Callable[[Path], Path]  # into a folder; the file that is to be broken
    read: Callable[[Path], object]  # from that folder; asserts that what comes is valid


def pictures(*arrays: torch.Tensor) -> None:
    for array in arrays:
        assert array.dtype == torch.uint8
        assert array.numel()


def png(grey: int = 90, size: tuple[int, int] = (8, 6), kind: str = "PNG", mode: str = "L") -> bytes:
    file = io.BytesIO()
    picture = Image.new(mode, size)
    picture.paste(grey, (0, 0, 3, 3))
    picture.save(file, kind)
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE, target: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, target
            archive.addfile(member, io.BytesIO(content))
    return path


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape) + content


def write_mnist(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pack = gzip.compress if suffix else bytes
        put(folder / "MNIST/raw" / f"train-labels-idx1-ubyte{suffix}", pack(idx((3,), bytes([0, 9, 3]))))
        images = RANDOM.integers(0, 256, 3 * 784, np.uint8).tobytes()
        return put(folder / "MNIST/raw" / f"train-images-idx3-ubyte{suffix}", pack(idx((3, 28, 28), images)))

    return write


def write_mnist_labels(folder: Path) -> Path:
    write_mnist("")(folder)
    return folder / "MNIST/raw/train-labels-idx1-ubyte"


def read_mnist(folder: Path) -> None:
    images, labels = digits.mnist(folder, train=True)
    pictures(images, labels)
    assert images.shape == (len(labels), 28, 28)
    assert labels.max() < 10


BATCH = python2(RANDOM.integers(0, 256, (3, 3072), np.uint8), [1, 2, 3])


def write_cifar(folder: Path) -> Path:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        put(folder / "cifar-10-batches-py" / name, BATCH)
    return folder / "cifar-10-batches-py/test_batch"


def write_cifar_archive(folder: Path) -> Path:
    return tarred(folder / "cifar-10-python.tar.gz", {"cifar-10-batches-py/test_batch": BATCH})


def read_cifar(folder: Path) -> None:
    images, labels = cifar.cifar10(folder, train=False)
    pictures(images, labels)
    assert images.shape == (len(labels), 3, 32, 32)
    assert labels.max() < 10


CLASSES = {"cat/1.png": png(90), "dog/1.png": png(10)}


def read_classes(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        images, labels, names = cifar.class_folders(folder / name, 8)
        pictures(images)
        assert len(images) == len(labels)
        assert len(names) > 1

    return read


def write_classes(folder: Path) -> Path:
    for name, content in CLASSES.items():
        put(folder / "classes" / name, content)
    return folder / "classes/cat/1.png"


DRAWINGS = {f"A/character0{c}/000{c}_0{n}.png": png(9 * n, mode="1") for c in (1, 2) for n in (1, 2)}


def write_omniglot(folder: Path) -> Path:
    for name, content in DRAWINGS.items():
        put(folder / "omniglot-py/images_background" / name, content)
    return folder / "omniglot-py/images_background/A/character01/0001_01.png"


def write_omniglot_zip(folder: Path) -> Path:
    members = {f"images_background/{name}": content for name, content in DRAWINGS.items()}
    return zipped(folder / "omniglot-py/images_background.zip", members)


def read_omniglot(folder: Path) -> None:
    alphabets = characters.omniglot(folder, evaluation=False, size=8)
    pictures(*(alphabet.images for alphabet in alphabets.values()))
    assert alphabets


def write_runs(folder: Path) -> Path:
    members = {}
    for run in (f"run{i:02}" for i in range(1, 21)):
        names = [(f"{run}/test/item{i:02}.png", f"{run}/training/class{i:02}.png") for i in range(1, 21)]
        members |= {name: png() for pair in names for name in pair}
        members[f"{run}/class_labels.txt"] = "".join(f"{one} {other}\n" for one, other in names).encode()
    return zipped(folder / "omniglot-py/all_runs.zip", members)


def read_runs(folder: Path) -> None:
    runs = characters.one_shot_runs(folder, 8)
    assert len(runs) == 20
    for run in runs:
        pictures(run.training, run.test)
        assert run.answers.max() < 20


def write_own_alphabets(folder: Path) -> Path:
    put(folder / "Greek/queries/1.png", png(255))
    put(folder / "Greek/examples/beta.png", png(200))
    return put(folder / "Greek/examples/alpha.png", png(100))


def read_own_alphabets(folder: Path) -> None:
    for alphabet in characters.own_alphabets(folder, 8):
        pictures(alphabet.examples, alphabet.queries)
        assert len(alphabet.classes) == len(alphabet.examples) > 1


def read_photograph(name: str) -> Callable[[Path], None]:
    return lambda folder: pictures(image_files.read_image(folder / name))


FRAMES = torch.from_numpy(RANDOM.integers(0, 256, (5, 16, 16), np.uint8))


def write_gif(folder: Path) -> Path:
    files.write_gif(folder / "clip.gif", FRAMES)
    return folder / "clip.gif"


def write_mp4(folder: Path) -> Path:
    files.write_mp4(folder / "clip.mp4", (frame.expand(3, -1, -1) for frame in FRAMES), 10)
    return folder / "clip.mp4"


def write_frames(folder: Path) -> Path:
    return [put(folder / "clip" / f"{t}.png", png(9 * t)) for t in range(3)][1]


def read_frames(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        pictures(video_files.read_clip(folder / name, 50))
        pictures(*list(video_files.read_frames(folder / name)))

    return read


def read_sequences(found: strokes.Strokes) -> None:
    for part in found:
        assert part
        for sequence in part:
            assert sequence.dtype == np.float32
            assert sequence.shape[1] == 3
            assert np.isfinite(sequence).all()


def three_parts(kind: type) -> dict[str, np.ndarray]:
    parts = {}
    for n, key in enumerate(("train", "valid", "test"), 1):
        parts[key] = np.empty(n, kind) if kind is object else np.ones((n, 4, 3), kind)
        for i in range(n):
            parts[key][i] = RANDOM.integers(0, 2, (4 + i, 3) if kind is object else (4, 3)).astype(np.int16)
    return parts


def write_npz(kind: type) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez_compressed(folder / "strokes.npz", **three_parts(kind))
        return folder / "strokes.npz"

    return write


LINE = (
    '<?xml version="1.0"?>\n<WhiteboardCaptureSession><StrokeSet>'
    + '<Stroke><Point x="1" y="2" time="3"/><Point x="4" y="9" time="3"/></Stroke>' * 3
    + "</StrokeSet></WhiteboardCaptureSession>"
)


def read_pen(folder: Path) -> None:
    line = strokes.read_line(folder / "line.xml")
    assert np.isfinite(line).all()
    assert len(line)


def write_iam(folder: Path) -> Path:
    for name, form in zip(("trainset", "testset_f", "testset_v", "testset_t"), "abcd", strict=True):
        put(folder / "iam-ondb" / f"{name}.txt", f"a01-00{form}\n" * (1 + (form == "d")))
    members = {f"lineStrokes/a01/a01-00{form}/a01-00{form}-01.xml": LINE.encode() for form in "abcd"}
    return tarred(folder / "iam-ondb/lineStrokes-all.tar.gz", members)


def write_iam_list(folder: Path) -> Path:
    write_iam(folder)
    return folder / "iam-ondb/trainset.txt"


def read_iam(folder: Path) -> None:
    read_sequences(strokes.iam_online(folder, shortest=1))


def read_symbols(found: text.TextSplits) -> None:
    assert sum(map(len, found)) > 19
    assert all(part.dtype in (np.uint8, np.uint32) for part in found)


PROSE = "Ein Text, in dem nichts Besonderes steht: äöü.\r\n" * 4


def write_ptb(folder: Path) -> Path:
    for name in ("test", "valid", "train"):
        path = put(folder / "ptb" / f"ptb.{name}.txt", " no it was n't \n" * 20)
    return path


SENTENCES = "a cat\na dog\nthe cow\na bird\n"


def write_pairs(folder: Path) -> Path:
    for name in ("train", "val", "test"):
        for language in ("fr", "en"):
            path = put(folder / f"{name}.{language}", SENTENCES)
    return path.with_name("train.en")


def write_packed_pairs(folder: Path) -> Path:
    path = write_pairs(folder)
    path.unlink()
    return put(folder / "train.en.gz", gzip.compress(SENTENCES.encode()))


def read_pairs(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for part in parallel_text.folder(folder / name)[:3]:
            assert len(part.source) == len(part.target) > 0
            assert all(part.source + part.target)

    return read


def read_lines(folder: Path) -> None:
    assert all(parallel_text.sentences(folder / "sentences.txt"))


def write_vot(folder: Path) -> Path:
    for t in range(3):
        put(folder / "bag" / f"{t}.jpg", png(9 * t, kind="JPEG"))
    return put(folder / "bag/groundtruth.txt", "1,1,4,4\n2,1,4,4\nnan,nan,nan,nan\n")


def write_otb(folder: Path) -> Path:
    for t in range(3):
        put(folder / "box/img" / f"{t}.jpg", png(9 * t, kind="JPEG"))
    return put(folder / "box/groundtruth_rect.txt", "1\t1\t4\t4\n2\t1\t4\t4\n3 3 2 2\n")


def read_tracks(read: Callable[[Path], list[tracks.Track]]) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        for track in read(folder):
            assert track.boxes.shape == (len(track), 4)
            assert not track.boxes.isinf().any()
            pictures(track.frame(0))

    return check


def write_got10k(folder: Path) -> Path:
    video = folder / "GOT-10k/train/one"
    for t in range(2):
        put(video / f"{t}.jpg", png(9 * t, kind="JPEG"))
    put(video / "groundtruth.txt", "1,1,4,4\n2,1,4,4\n")
    return put(video / "absence.label", "0\n1\n")


ANNOTATION = (
    "<annotation><object><trackid>0</trackid><bndbox><xmin>1</xmin><xmax>5</xmax><ymin>1</ymin><ymax>4</ymax></bndbox>"
    "</object></annotation>"
)


def write_vid(folder: Path) -> Path:
    put(folder / "ILSVRC2015/Data/VID/train/a/b/0.JPEG", png(kind="JPEG"))
    return put(folder / "ILSVRC2015/Annotations/VID/train/a/b/0.xml", ANNOTATION)


def write_pieces(folder: Path) -> Path:
    return put(folder / "pieces", VOCABULARY)


def read_pieces(folder: Path) -> None:
    try:
        content = (folder / "pieces").read_bytes()
    except OSError as error:  # the reader is of bytes, not of a file
        raise InputError("no bytes to read") from error
    learned = subwords.Subwords(content)
    assert learned.decode(learned.encode(["the cat"]))


VOCABULARY = subwords.train_subwords(TEXTS, 330)
WEIGHTS = {"layer.weight": torch.ones(4, 3), "layer.bias": torch.zeros(4)}


def checkpoint(**changes: object) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": WEIGHTS, "global_step": 3, "hyper_parameters": {}} | changes, file)
    return file.getvalue()


def write_checkpoint(folder: Path) -> Path:
    return put(folder / "last.ckpt", checkpoint())


def read_saved(folder: Path) -> None:
    saved = read_checkpoint(folder / "last.ckpt")
    assert all(isinstance(value, torch.Tensor) for value in saved["state_dict"].values())
    assert saved["global_step"] >= 0


with torch.random.fork_rng():
    RULE = LearnedRule(hidden_size=3)


def rule_checkpoint(**changes: object) -> bytes:
    state = {f"rule.{name}": value for name, value in RULE.state_dict().items()}
    options = _options(RULE)
    return checkpoint(**({"state_dict": state, "hyper_parameters": options} | changes))


def write_learned(folder: Path) -> Path:
    notes = {"options": json.dumps(_options(RULE)), "fingerprint": _fingerprint(RULE)}
    return put(folder / "rule.safetensors", safetensors(RULE.state_dict(), notes))


def read_learned(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        rule = read_rule(folder / name)
        assert all(weight.isfinite().all() for weight in rule.state_dict().values())

    return read


def features(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return FEATURES.state_dict() | {name.replace("_", "."): value for name, value in changes.items()}


FEATURES = Features("squeezenet1_1")


def saved(contents: object) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def read_features(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        network, _ = load_features("squeezenet1_1", folder, str(folder / name), download=False)
        assert all(weight.isfinite().all() for weight in network.state_dict().values())

    return read


def write_quadratic(folder: Path) -> Path:
    np.savez(folder / "quadratic.npz", W=np.eye(3), y=np.ones(3))
    return folder / "quadratic.npz"


def read_quadratic(folder: Path) -> None:
    problem = OneQuadratic("test", str(folder / "quadratic.npz"), 1.0)
    assert problem.W.shape == (*problem.y.shape, *problem.y.shape)
    assert np.isfinite(problem.W).all()


def write_moving(folder: Path) -> Path:
    (folder / "MovingMNIST").mkdir()
    np.save(folder / "MovingMNIST/mnist_test_seq.npy", np.ones((20, 2, 64, 64), np.uint8))
    return folder / "MovingMNIST/mnist_test_seq.npy"


def read_moving(folder: Path) -> None:
    found = fixed_test_sequences(folder)
    assert found.dtype == np.uint8
    assert found.shape[1:] == (20, 64, 64)
    assert not found.size or found[-1].max() < 256  # of none the caller says so


def write_stereo(suffix: str) -> Callable[[Path], Path]:
    """A pair in KITTI's layout (.png) or one of Middlebury's, with a disparity of 2 pixels."""

    def write(folder: Path) -> Path:
        if suffix == ".png":
            for view in ("image_2", "image_3"):
                put(folder / view / "0.png", png(size=(20, 12)))
            file = io.BytesIO()
            Image.fromarray(np.full((12, 20), 512, np.uint16)).save(file, "PNG")
            return put(folder / "disp_occ_0/0.png", file.getvalue())
        left, right, truth = ("im0", "im1", "disp0") if suffix == ".pfm" else ("left", "right", "disp")
        for view in (left, right):
            put(folder / "scene" / f"{view}.png", png(size=(20, 12)))
        disparity = np.full((12, 20), 2, np.float32)
        if suffix == ".npz":
            np.savez(folder / "scene" / f"{truth}.npz", disparity)
            return folder / "scene" / f"{truth}.npz"
        return put(folder / "scene" / f"{truth}.pfm", b"Pf\n20 12\n-1.0\n" + disparity.tobytes())

    return write


def read_stereo(folder: Path) -> None:
    for pair in stereo.find_pairs(folder):
        views = pair.read()
        assert views.left.shape == views.right.shape
        for disparity in (views.left_disparity, views.right_disparity):
            assert disparity is None or (disparity.shape == views.left.shape and not np.isinf(disparity).any())


def write_highway(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "highwayDriving_train.h5", "w") as file:
        file["highway_L"] = RANDOM.integers(0, 256, (3, 1, 64, 64), np.uint8)
    return folder / "highwayDriving_train.h5"


def read_highway(folder: Path) -> None:
    (frames,) = driving.read_highway(folder / "highwayDriving_train.h5", ["highway_L"])
    assert frames.dtype == np.uint8
    assert frames.shape[1:] == (64, 64)


def write_shipped(folder: Path) -> Path:
    return put(folder / "model.safetensors", weights.find("dfn_steerable").read_bytes())


def read_shipped(folder: Path) -> None:
    model = catalogue.load(folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


ROWS = "one:\n  run: the only one\n  measure: error, %\n  published: 3\n"
RECORD = {
    "measure": "test/error",
    "unit": "%",
    "value": 3.5,
    "baselines": {"chance": 90.0},
    "data": "digits",
    "samples": 100,
    "steps": 10,
    "seed": 0,
    "device": "CPU",
    "precision": "32-true",
    "seconds": 60.0,
}


def write_rows(folder: Path) -> Path:
    put(folder / "one.json", json.dumps(RECORD))
    return put(folder / "rows.yaml", ROWS)


def write_record(folder: Path) -> Path:
    write_rows(folder)
    return folder / "one.json"


def read_results(folder: Path) -> None:
    assert "experiment" in results.experiments(folder)
    assert "record" in results.details(folder, "")


READERS = {
    "idx": Reader(write_mnist(""), read_mnist),
    "idx.gz": Reader(write_mnist(".gz"), read_mnist),
    "idx labels": Reader(write_mnist_labels, read_mnist),
    "cifar": Reader(write_cifar, read_cifar),
    "cifar.tar.gz": Reader(write_cifar_archive, read_cifar),
    "classes": Reader(write_classes, read_classes("classes")),
    "classes.zip": Reader(lambda f: zipped(f / "classes.zip", CLASSES), read_classes("classes.zip")),
    "classes.tar.gz": Reader(lambda f: tarred(f / "classes.tar.gz", CLASSES), read_classes("classes.tar.gz")),
    "omniglot": Reader(write_omniglot, read_omniglot),
    "omniglot.zip": Reader(write_omniglot_zip, read_omniglot),
    "omniglot runs": Reader(write_runs, read_runs),
    "own alphabets": Reader(write_own_alphabets, read_own_alphabets),
    "png": Reader(lambda f: put(f / "picture.png", png()), read_photograph("picture.png")),
    "jpg": Reader(lambda f: put(f / "picture.jpg", png(kind="JPEG")), read_photograph("picture.jpg")),
    "tiff": Reader(lambda f: put(f / "picture.tif", png(kind="TIFF")), read_photograph("picture.tif")),
    "gif clip": Reader(write_gif, read_frames("clip.gif")),
    "mp4 clip": Reader(write_mp4, read_frames("clip.mp4")),
    "folder clip": Reader(write_frames, read_frames("clip")),
    "strokes.npz": Reader(write_npz(object), lambda f: read_sequences(strokes.own_strokes(f / "strokes.npz"))),
    "plain npz": Reader(write_npz(np.int16), lambda f: read_sequences(strokes.own_strokes(f / "strokes.npz"))),
    "strokes.xml": Reader(lambda f: put(f / "line.xml", LINE), read_pen),
    "iam.tar.gz": Reader(write_iam, read_iam),
    "iam list": Reader(write_iam_list, read_iam),
    "text": Reader(
        lambda f: put(f / "own.txt", PROSE), lambda f: read_symbols(text.own_text(f / "own.txt", "characters"))
    ),
    "text.gz": Reader(
        lambda f: put(f / "own.gz", gzip.compress(PROSE.encode())),
        lambda f: read_symbols(text.own_text(f / "own.gz", "bytes")),
    ),
    "text.zip": Reader(
        lambda f: zipped(f / "own.zip", {"own.txt": PROSE.encode()}),
        lambda f: read_symbols(text.own_text(f / "own.zip", "characters")),
    ),
    "ptb": Reader(write_ptb, lambda f: read_symbols(text.penn_treebank(f))),
    "pairs": Reader(write_pairs, read_pairs("")),
    "pairs.gz": Reader(write_packed_pairs, read_pairs("")),
    "pairs.zip": Reader(
        lambda f: zipped(
            f / "fra.zip", {"fra.txt": b"Go.\tVa !\tCC\nHi.\tSalut !\nRun!\tCours !\n", "_about.txt": b""}
        ),
        read_pairs("fra.zip"),
    ),
    "sentences": Reader(lambda f: put(f / "sentences.txt", SENTENCES), read_lines),
    "vot": Reader(write_vot, read_tracks(tracks.sequences)),
    "otb": Reader(write_otb, read_tracks(tracks.sequences)),
    "got10k": Reader(write_got10k, read_tracks(tracks.got10k)),
    "vid.xml": Reader(write_vid, read_tracks(tracks.imagenet_vid)),
    "pieces": Reader(write_pieces, read_pieces),
    "checkpoint": Reader(write_checkpoint, read_saved),
    "rule.safetensors": Reader(write_learned, read_learned("rule.safetensors")),
    "rule.ckpt": Reader(lambda f: put(f / "rule.ckpt", rule_checkpoint()), read_learned("rule.ckpt")),
    "features.pth": Reader(lambda f: put(f / "f.pth", saved(features())), read_features("f.pth")),
    "features.safetensors": Reader(
        lambda f: put(f / "f.safetensors", safetensors(features())), read_features("f.safetensors")
    ),
    "quadratic.npz": Reader(write_quadratic, read_quadratic),
    "moving mnist.npy": Reader(write_moving, read_moving),
    "kitti.png": Reader(write_stereo(".png"), read_stereo),
    "middlebury.pfm": Reader(write_stereo(".pfm"), read_stereo),
    "disparity.npz": Reader(write_stereo(".npz"), read_stereo),
    "highway.h5": Reader(write_highway, read_highway),
    "shipped.safetensors": Reader(write_shipped, read_shipped),
    "rows.yaml": Reader(write_rows, read_results),
    "record.json": Reader(write_record, read_results),
}

# --- damages ---------------------------------------------------------------------------------------------------------


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def unreadable(path: Path) -> None:
    if os.geteuid() == 0:  # who reads everything
        path.unlink()
        path.mkdir()
    else:
        path.chmod(0)


NOISE = RANDOM.integers(0, 256, 3000, np.uint8).tobytes()
COMMON = {
    "empty": content(lambda b: b""),
    "first byte": content(lambda b: b[:1]),
    "a tenth": content(lambda b: b[: len(b) // 10]),
    "first half": content(lambda b: b[: len(b) // 2]),
    "last byte missing": content(lambda b: b[:-1]),
    "noise": content(lambda b: NOISE),
    "noise after the head": content(lambda b: b[:16] + NOISE),
    "noise in the middle": content(lambda b: b[: len(b) // 2] + NOISE[:100] + b[len(b) // 2 + 100 :]),
    "zeros": content(lambda b: bytes(len(b))),
    "first byte wrong": content(lambda b: bytes([b[0] ^ 0xFF]) + b[1:]),
    "twice": content(lambda b: b + b),
    "packed once more": content(gzip.compress),
    "UTF-16": content(lambda b: b.decode("latin1").encode("utf-16")),
    "a page of HTML": content(lambda b: b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"),
    "missing": instead(lambda path: None),
    "a folder": instead(Path.mkdir),
    "a dangling link": instead(lambda path: path.symlink_to("nowhere")),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "unreadable": unreadable,
}

MIB = zlib.compressobj(9, zlib.DEFLATED, -15)
MIB = MIB.compress(bytes(2**20)) + MIB.flush(zlib.Z_FULL_FLUSH)  # a mebibyte in a kilobyte


def deflated(head: bytes, mebibytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + MIB * mebibytes + b"\3\0"


def gzip_bomb(head: bytes = b"", mebibytes: int = 4000) -> bytes:
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflated(head, mebibytes) + bytes(8)


def forged_zip(name: str, packed: bytes, size: int, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A .zip of one member that says it has ``size`` bytes."""
    fields = struct.pack("<5H3L2H", 20, 0, method, 0, 0, 0, len(packed), size, len(name), 0)
    local = b"PK\3\4" + fields + name.encode() + packed
    central = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<3H2L", 0, 0, 0, 0, 0) + name.encode()
    return local + central + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(central), len(local), 0)


def overlapping_zip(names: list[str], packed: bytes, size: int) -> bytes:
    """A .zip whose members are all the same few bytes: a small file that unpacks to ``size`` bytes for each name."""
    one = forged_zip(names[0], packed, size)
    local, fields = one[: one.index(b"PK\1\2")], one[4:30]
    central = b""
    for name in names:
        central += b"PK\1\2" + struct.pack("<H", 20) + fields[:-4] + struct.pack("<2H", len(name), 0)
        central += struct.pack("<3H2L", 0, 0, 0, 0, 0) + name.encode()
    return (
        local + central + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, len(names), len(names), len(central), len(local), 0)
    )


def picture(kind: bytes, width: int, height: int) -> bytes:
    """A picture whose head promises so many pixels."""
    if kind == b"PNG":
        chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000)))]
        chunks.append((b"IEND", b""))
        packed = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
        return b"\x89PNG\r\n\x1a\n" + packed
    if kind == b"GIF":
        head = b"GIF89a" + struct.pack("<2H3B", width, height, 0x80, 0, 0) + bytes(6)
        return head + b"," + struct.pack("<4HB", 0, 0, width, height, 0) + b"\2\2\x4c\x01\0;"
    if kind == b"BMP":
        return b"BM" + struct.pack("<3L", 60, 0, 54) + struct.pack("<L2l2H6L", 40, width, height, 1, 24, *[0] * 6)
    return b"P6 %d %d 255\n" % (width, height)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(pwned) (w) file closefile\nshowpage\n%%EOF\n"


def call(function: str, argument: str) -> dict[str, bytes]:
    """Pickles that call a function, in each way in which a pickle can."""
    module, name = function.rsplit(".", 1)
    text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    name_of = f"c{module}\n{name}\n".encode()
    stack = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93"
    return {
        "reduce": b"\x80\2" + name_of + text + b"\x85R.",
        "reduce, protocol 0": name_of + b"(S'" + argument.encode() + b"'\ntR.",
        "reduce by stack": b"\x80\4" + stack + text + b"\x85R.",
        "inst": b"(" + text + f"i{module}\n{name}\n.".encode(),
        "obj": b"(" + name_of + text + b"o.",
        "newobj": b"\x80\2" + name_of + text + b"\x85\x81.",
        "newobj ex": b"\x80\4" + name_of + text + b"\x85}\x92.",
    }


MARK_THE_PLACE = "touch pwned"
PICKLES = {
    **{f"os.system, {way}": code for way, code in call("os.system", MARK_THE_PLACE).items()},
    **{f"eval, {way}": code for way, code in call("builtins.eval", "open('pwned', 'w')").items() if "reduce" in way},
    "posix.mkdir": call("posix.mkdir", "pwned")["reduce"],
    "runpy": call("runpy.run_path", "pwned.py")["reduce"],
    "a function's defaults": b"\x80\4c_codecs\nencode\nN}\x8c\x0c__defaults__)s\x86b.",
    "a class's attributes": b"\x80\4cnumpy\ndtype\nN}\x8c\x04kind\x8c\x04evils\x86b.",
    "persistent": b"Pos.system\n.",
    "persistent, binary": b"\x80\2N\x51.",
    "extension": b"\x80\2\x82\1.",
    "memo of 2^30": b"\x80\2Nr\xff\xff\xff\x3f.",
    "memo of 2^31": b"\x80\2Nr\xff\xff\xff\x7f.",
    "memo, text": b"Np99999999999999\n.",
    "memo that is missing": b"\x80\2j\xff\xff\xff\x3f.",
    "bytearray of 2^40": b"\x80\5\x96" + struct.pack("<Q", 2**40) + b".",
    "bytes of 2^62": b"\x80\4\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "text of 2^62": b"\x80\4\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "text of 2^32": b"\x80\2X\xff\xff\xff\xffabc.",
    "negative text": b"\x80\2T\xff\xff\xff\xffabc.",
    "number of 2^31 bytes": b"\x80\2\x8b\xff\xff\xff\x7f1.",
    "number of a million digits": b"I" + b"9" * 10**5 + b"\n.",
    "frame of 2^60": b"\x80\4\x95" + struct.pack("<Q", 2**60) + b"N.",
    "buffer from outside": b"\x80\5\x97.",
    "empty stack": b"\x80\2\x85.",
    "marks": b"(" * 10**5 + b".",
    "deep lists": b"\x80\2" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "deep tuples": b"\x80\2)" + b"\x85" * 10**5 + b".",
    "deep tuples as a key": b"\x80\2})" + b"\x85" * 10**5 + b"Ns.",
    "deep tuples in a set": b"\x80\4\x8f()" + b"\x85" * 10**5 + b"\x90.",
    "doubled tuples as a key": b"\x80\2})" + b"2\x86" * 60 + b"Ns.",
    "doubled tuples as keys": b"\x80\2})(q\1" + b"h\1h\1\x86q\1" * 60 + b"Nu.",
    "doubled lists as a type": b"\x80\2cnumpy\ndtype\n]" + b"q\1]h\1ah\1a" * 60 + b"\x85R.",
    "one text many times": b"\x80\2X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\0c_codecs\nencode\nq\1"
    b"(" + b"h\1h\0\x85R" * 4000 + b"t.",
    "one type many times": b"\x80\2C\xff" + b"a" * 255 + b"q\0cnumpy\ndtype\nq\1(" + b"h\1h\0\x85R" * 4000 + b"t.",
    "an array that is a class": b"\x80\2cnumpy\nndarray\n.",
    "an array of itself": b"\x80\2cnumpy.core.multiarray\n_reconstruct\n(tRq\1(K\1K\1\x85"
    b"cnumpy\ndtype\nU\2O8\x85R\x89]h\1atb.",
    "an array of a huge shape": b"\x80\2cnumpy.core.multiarray\n_reconstruct\n(tR(K\1\x8a\x09" + b"\xff" * 8 + b"\1\x85"
    b"cnumpy\ndtype\nU\2u1\x85R\x89U\0tb.",
    "an array of a huge number": b"\x80\2cnumpy.core.multiarray\n_reconstruct\n(tR(K\1\x8b"
    + struct.pack("<i", 5000)
    + b"\x7f" * 5000
    + b"M\0\x0c\x86cnumpy\ndtype\nU\2u1\x85R\x89U\0tb.",
    "text that is an emoji": b"\x80\2c_codecs\nencode\nX\4\0\0\0\xf0\x9f\x98\x80\x85R.",
}


# what torch's own unpickler, not ours, is helpless against
TORCH_TAKES = [name for name in PICKLES if "key" in name or "set" in name or name == "one text many times"]


def npy(content: bytes, shape: str = "(1,)", kind: str = "|O") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def part(content: bytes) -> Callable[[Path], None]:
    """Puts this ``.npy`` in the place of an ``.npz``'s training part."""

    def damage(path: Path) -> None:
        with np.load(path, allow_pickle=True) as arrays:
            others = {key: arrays[key] for key in ("valid", "test")}
        np.savez(path, **others)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("train.npy", content)

    return damage


def parts(**changes: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        arrays = three_parts(np.int16) | changes
        np.savez(path, **{key: array for key, array in arrays.items() if array is not None})

    return damage


HEADERS = {
    "a shape of 10^12": npy(b"", "(1000000000000, 4, 3)", "<i2"),
    "a shape below zero": npy(bytes(24), "(-1, 4, 3)", "<i2"),
    "a shape of text": npy(bytes(24), "('a', 4, 3)", "<i2"),
    "a huge type": npy(bytes(24), "(1,)", "V2000000000"),
    "code in the head": npy(b"", "__import__('os').system('touch pwned')", "<i2"),
    "a deep head": npy(b"", "(" * 4000 + ")" * 4000, "<i2"),
    "version 9": b"\x93NUMPY\x09\x00" + npy(b"")[8:],
    "a head of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
}


def member(suffix: str, name: str, kind: str = "file", also: bytes = png()) -> Callable[[Path], None]:
    """Packs an archive of class folders with one member more, of this name and kind."""

    def damage(path: Path) -> None:
        if suffix == ".zip":
            zipped(path, CLASSES)
            entry = zipfile.ZipInfo(name)
            if kind == "link":
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(entry, b"/etc/passwd" if kind == "link" else also)
        else:
            with tarfile.open(path, "w:gz") as archive:
                for one, content in CLASSES.items():
                    entry = tarfile.TarInfo(one)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
                entry = tarfile.TarInfo(name)
                kinds = {"file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}
                kinds |= {"device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
                entry.type, entry.linkname = kinds[kind], "/etc/passwd" if "link" in kind else ""
                entry.size = len(also) if kind == "file" else 0
                archive.addfile(entry, io.BytesIO(also))

    return damage


def huge_member(path: Path) -> None:
    entry = tarfile.TarInfo("cat/2.png")
    entry.size = 2**29
    path.write_bytes(gzip_bomb(entry.tobuf(), 512))


ENTITIES = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "ha"}">' for i in range(12))
XML = {
    "a billion laughs": f"<!DOCTYPE a [{ENTITIES}]><a>&e11;</a>",
    "a billion laughs in an attribute": f'<!DOCTYPE a [{ENTITIES}]><Stroke><Point x="&e11;" y="1"/></Stroke>',
    "one long entity often": f'<!DOCTYPE a [<!ENTITY e "{"a" * 10**5}">]><a>{"&e;" * 10**5}</a>',
    "an entity from a file": '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><a>&e;</a>',
    "a document type elsewhere": '<!DOCTYPE a SYSTEM "http://localhost:9/a.dtd"><a/>',
    "parameter entities": '<!DOCTYPE a [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]><a/>',
    "an unknown entity": "<a>&nobody;</a>",
    "an unknown encoding": '<?xml version="1.0" encoding="klingon"?><a/>',
    "an encoding of many bytes": '<?xml version="1.0" encoding="utf-7"?><a/>',
    "a wrong encoding": '<?xml version="1.0" encoding="utf-16"?><a/>',
    "half a character": b"<a>\xc3</a>",
    "deep": "<a>" * 10**5 + "</a>" * 10**5,
    "unclosed": "<a><b></a>",
    "no root": "<!-- nothing -->",
    "two roots": "<a/><b/>",
    "an attribute of 10 MB": f'<a b="{"x" * 10**7}"/>',
}
POINTS = ["nan", "inf", "1e999", "", "x", "9" * 400, "1" * 10**6, "1 2", "0x10", "١", "\x01"]
NUMBERS = ["nan,nan,nan,nan", "1,2,3", "1,2,3,4,5,6,7,8,9", "1e999,1,1,1", "-1e38,1,1e38,1", "a,b,c,d", "1;1;4;4", "\0"]
NUMBERS += ["0,0,0,0", "500,500,4,4", " " * 10**6, "9" * 10**6, "1,1,4,4\n" * 10**5, "\ud800"]


def written(content: str | bytes) -> Callable[[Path], None]:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda path: put(path, data)


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (MARK_THE_PLACE,)


def forged_checkpoint(code: bytes) -> bytes:
    """A checkpoint with this pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as good, zipfile.ZipFile(file, "w") as archive:
        for entry in good.infolist():
            archive.writestr(entry, code if entry.filename.endswith("data.pkl") else good.read(entry))
    return file.getvalue()


def forged_safetensors(header: object, content: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + content


def rule_file(change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            notes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(tensors, notes)
        path.write_bytes(safetensors(tensors, notes))

    return damage


def first_nan(tensors: dict[str, torch.Tensor], notes: dict[str, str]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def record(**changes: object) -> Callable[[Path], None]:
    return written(json.dumps({key: value for key, value in (RECORD | changes).items() if value != "gone"}))


def cyclic(**links: str) -> Callable[[Path], None]:
    """Links between folders that go round in circles."""

    def damage(path: Path) -> None:
        for name, target in links.items():
            folder = path.parent / name
            folder.parent.mkdir(exist_ok=True)
            folder.symlink_to(target)

    return damage


def circles(path: Path) -> None:
    for one, other in ("ab", "bc", "ca"):
        for i in range(4):
            place = path.parent.parent / one / f"{other}{i}"
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(f"../{other}")


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))

SPECIAL: dict[str, dict[str, Callable[[Path], None]]] = {
    "kitti.png": {
        "8 bits in colour": content(lambda b: png(size=(20, 12), mode="RGB")),
        "another size": content(lambda b: png(size=(12, 20))),
        "another format": content(lambda b: png(size=(20, 12), kind="TIFF")),
        "PostScript": content(lambda b: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\n"),
        "nothing known": content(lambda b: png(0, size=(20, 12))),
    },
    "middlebury.pfm": {
        "three channels": content(lambda b: b.replace(b"Pf", b"PF")),
        "another size": content(lambda b: b.replace(b"20 12", b"12 20")),
        "a huge size": content(lambda b: b.replace(b"20 12", b"2000000000 1200000000")),
        "no order": content(lambda b: b.replace(b"-1.0", b"-e-e")),
        "below zero": content(lambda b: b[:16] + np.full(240, -2, np.float32).tobytes()),
        "infinite": content(lambda b: b[:16] + np.full(240, np.inf, np.float32).tobytes()),
        "a size of a thousand digits": content(lambda b: b.replace(b"20 12", b"2" * 5000 + b" 12")),
    },
    "idx": {
        **{
            f"shape {'x'.join(map(str, shape))}": content(lambda b, shape=shape: idx(shape, b[16:]))
            for shape in [
                (2**31, 28, 28),
                (2**32 - 1,) * 3,
                (0, 28, 28),
                (3, 0, 28),
                (3, 27, 28),
                (4, 28, 28),
                (2, 28, 28),
            ]
        },
        "of 32 bit": content(lambda b: struct.pack(">I", 0xC03) + b[4:]),
        "the other byte order": content(lambda b: struct.pack("<4I", 0x803, 3, 28, 28) + b[16:]),
    },
    "idx labels": {"label 10": content(lambda b: b[:-1] + b"\n"), "too few": content(lambda b: idx((2,), b[8:10]))},
    "idx.gz": {
        "a bomb": written(gzip_bomb(idx((3, 28, 28), b""))),
        "a bomb of zeros": written(gzip_bomb()),
        "checksum": content(lambda b: b[:-8] + bytes(8)),
    },
    "cifar": {
        **{name: written(code) for name, code in PICKLES.items()},
        "labels that are arrays": written(pickle.dumps({"data": np.ones((3, 3072), np.uint8), "labels": np.ones(3)})),
        "labels too large": content(lambda b: b.replace(b"K\1K\2K\3", b"K\1K\2K\xff")),
        "labels that are true": content(lambda b: b.replace(b"K\1K\2K\3", b"\x88\x88\x88")),
        "rows too short": written(pickle.dumps({"data": np.ones((3, 3071), np.uint8), "labels": [1, 2, 3]}, 2)),
        "objects": written(pickle.dumps({"data": np.ones((3, 3072), object), "labels": [1, 2, 3]}, 2)),
        "of the other kind": written(python2(np.ones((3, 3072), np.uint8), [1, 2, 3], kind=b"i8")),
        "a file of 4 GB": lambda path: os.truncate(path, 2**32),
    },
    "cifar.tar.gz": {
        "a bomb": huge_member,
        "a link": lambda path: tarred(path, {"cifar-10-batches-py/test_batch": b""}, tarfile.SYMTYPE, "/etc/passwd"),
        "a hard link": lambda path: tarred(
            path, {"cifar-10-batches-py/test_batch": b""}, tarfile.LNKTYPE, "/etc/passwd"
        ),
        "a folder in it": lambda path: tarred(path, {"cifar-10-batches-py/test_batch": b""}, tarfile.DIRTYPE),
        "another": lambda path: tarred(path, {"cifar-100-python/test": BATCH}),
    },
    **{
        f"classes{suffix}": {
            "member above": member(suffix, "../pwned.png"),
            "member far above": member(suffix, f"cat/{'../' * 9}tmp/pwned.png"),
            "member above from inside": member(suffix, "cat/../../pwned.png"),
            "absolute member": member(suffix, "/tmp/pwned.png"),
            "member by another slash": member(suffix, "..\\pwned.png"),
            "link": member(suffix, "cat/2.png", "link"),
            "folder that is a link": member(suffix, "cow", "link"),
            "name of two lines": member(suffix, "cat/2\nerror: no.png", also=b"no picture"),
            "name with colours": member(suffix, "cat/\x1b[31m2.png", also=b"no picture"),
            "nameless": member(suffix, ""),
            "dots": member(suffix, "./././cat/./3.png"),
            "long name": member(suffix, "cat/" + "x" * 5000 + ".png", also=b"no picture"),
            "deep name": member(suffix, "d/" * 2000 + "x.png"),
            "no class": lambda path: (tarred, zipped)[path.suffix == ".zip"](path, {"1.png": png()}),
            "one class": lambda path: (tarred, zipped)[path.suffix == ".zip"](path, {"cat/1.png": png()}),
        }
        for suffix in (".zip", ".tar.gz")
    },
    "png": {
        **{
            f"{kind.decode()} of 10^5 x 10^5 pixels": written(picture(kind, 10**5, 10**5))
            for kind in (b"PNG", b"PPM", b"BMP")
        },
        "GIF of 65535 x 65535 pixels": written(picture(b"GIF", 65535, 65535)),
        "PNG of 0 pixels": written(picture(b"PNG", 0, 0)),
        "PostScript": written(EPS),
        "checksum": content(lambda b: b.replace(b"IDAT", b"IDAX")),
        "SVG": written('<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "text bomb": content(
            lambda b: (
                b[:33]
                + (t := struct.pack(">I", 3 + len(z := zlib.compress(bytes(10**8)))) + b"zTXta\0\0" + z)
                + struct.pack(">I", zlib.crc32(t[4:]))
                + b[33:]
            )
        ),
    },
    "omniglot": {
        "a picture elsewhere": lambda path: put(path.parent.parent / "1.png", png()),
        "links in circles": lambda path: (path.parent / "again").symlink_to("../.."),
        "a drawing more": lambda path: put(path.with_name("0001_03.png"), png(mode="1")),
        "a huge number": lambda path: path.rename(path.with_name(f"0001_{'9' * 200}.png")),
    },
    "omniglot.zip": {
        "a bomb": written(forged_zip("images_background/A/character01/0001_01.png", deflated(b"", 3000), 100)),
        "a bomb in bzip2": written(forged_zip("A/character01/0001_01.png", bz2.compress(bytes(2**24)), 100, 12)),
        "overlapping members": written(
            overlapping_zip([f"A/character01/0001_{i:02}.png" for i in range(50)], deflated(b"", 60), 60 * 2**20)
        ),
        "member above": lambda path: zipped(path, {"../A/character01/0001_01.png": png()}),
    },
    "omniglot runs": {"labels": lambda path: zipped(path, {"run01/class_labels.txt": b"\xff\xfe"})},
    "own alphabets": {
        "blank": written(png(0)),
        "one class": instead(lambda path: None),
        "two of a class": lambda path: put(path.with_suffix(".jpg"), png(kind="JPEG")),
        "one pixel": written(png(90, (1, 1))),
        "a line": written(png(90, (1, 3000))),
    },
    "gif clip": {
        "a canvas of 65535 x 65535": written(picture(b"GIF", 65535, 65535)),
        "a canvas of 15000 x 15000": written(picture(b"GIF", 15000, 15000)),
        "a playlist": written(PLAYLIST),
        "a list of files": written("ffconcat version 1.0\nfile /etc/passwd\n"),
        "a single picture": written(png()),
    },
    "mp4 clip": {
        "a playlist": written(PLAYLIST),
        "a list of files": written("ffconcat version 1.0\nfile other.mp4\n"),
        "a session": written("v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"),
        "a manifest": written('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>'),
        "a box of 2^64": content(lambda b: b"\0\0\0\1ftyp" + b"\xff" * 8 + b[16:]),
        "boxes in boxes": written(b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + b"\0\1\0\0moov" * 8000),
        "a huge frame": content(lambda b: b.replace(struct.pack(">2H", 16, 16), b"\xff\xff\xff\xff")),
    },
    "folder clip": {"another size": written(png(9, (9, 9))), "a huge picture": written(picture(b"PNG", 10**5, 10**5))},
    "strokes.npz": {
        **{name: part(npy(code)) for name, code in PICKLES.items()},
        **{name: part(head) for name, head in HEADERS.items()},
        "a bomb": written(forged_zip("train.npy", deflated(b"", 3000), 100)),
        "a promise of 4 GB": written(forged_zip("train.npy", deflated(b"", 1), 2**32 - 1)),
        "an array instead": lambda path: path.write_bytes(npy(bytes(24), "(1, 4, 3)", "<i2")),
        "an executable": written(b"\x7fELF" + NOISE),
    },
    "plain npz": {
        "a key missing": parts(valid=None),
        "NaN": parts(train=np.full((2, 4, 3), np.nan)),
        "infinite": parts(train=np.full((2, 4, 3), -np.inf)),
        "text": parts(train=np.array(["a"])),
        "complex": parts(train=np.ones((1, 4, 3), complex)),
        "dates": parts(train=np.ones((1, 4, 3), "M8[s]")),
        "fields": parts(train=np.ones((1, 4, 3), [("a", "i4")])),
        "two columns": parts(train=np.ones((1, 4, 2))),
        "flat": parts(train=np.ones(12)),
        "a number": parts(train=np.ones(())),
        "none": parts(train=np.ones((0, 4, 3))),
        "no points": parts(train=np.ones((1, 0, 3))),
        "half a pen": parts(train=np.full((1, 4, 3), 0.5)),
        "beyond float32": parts(train=np.full((1, 4, 3), 1e300)),
    },
    "strokes.xml": {
        **{name: written(code) for name, code in XML.items()},
        **{f"a point at {value[:9]!r}": written(LINE.replace('x="1"', f'x="{value}"')) for value in POINTS},
        "a point outside": written('<a><Point x="1" y="1"/></a>'),
        "a point without y": written('<a><Stroke><Point x="1"/></Stroke></a>'),
        "no strokes": written("<a/>"),
        "empty strokes": written("<a><Stroke/><Stroke/></a>"),
        "4 GB": lambda path: os.truncate(path, 2**32),
    },
    "iam.tar.gz": {
        "a form missing": lambda path: tarred(path, {"lineStrokes/a01/a01-00a/a01-00a-01.xml": LINE.encode()}),
        "a broken line": lambda path: tarred(path, {"lineStrokes/a01/a01-00a/a01-00a-01.xml": b"<a>"}),
        "a line above": lambda path: tarred(path, {"../a01-00a-01.xml": LINE.encode()}),
        "laughs": lambda path: tarred(
            path, {"lineStrokes/a01-00a-01.xml": XML["a billion laughs in an attribute"].encode()}
        ),
    },
    "iam list": {"an unknown form": written("z99-999z\n"), "not text": written(b"\xff\xfe\0\xff" * 50)},
    "text": {
        "Latin-1": content(lambda b: b.decode().encode("latin1")),
        "half a character": content(lambda b: b + b"\xc3"),
        "a surrogate": content(lambda b: b + b"\xed\xa0\x80"),
        "19 characters": content(lambda b: b[:19]),
        "4 GB": lambda path: os.truncate(path, 2**32),
    },
    "text.gz": {"a bomb": written(gzip_bomb()), "checksum": content(lambda b: b[:-8] + bytes(8))},
    "text.zip": {
        "a bomb": written(forged_zip("own.txt", deflated(b"", 3000), 100)),
        "a promise of 4 GB": written(forged_zip("own.txt", deflated(b"", 1), 2**32 - 1)),
        "a bomb in bzip2": written(forged_zip("own.txt", bz2.compress(bytes(2**24)), 100, 12)),
        "a bomb in LZMA": written(
            forged_zip("own.txt", zipfile.LZMACompressor().compress(bytes(2**20)) + NOISE, 2**29, 14)
        ),
        "two members": lambda path: zipped(path, {"a": b"a" * 30, "b": b"b" * 30}),
        "member above": lambda path: zipped(path, {"../own.txt": PROSE.encode()}),
        "absolute member": lambda path: zipped(path, {"/tmp/own.txt": PROSE.encode()}),
        "encrypted": content(lambda b: b.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")),
        "an unknown method": content(lambda b: b.replace(b"\x08\0", b"\x63\0")),
    },
    "ptb": {
        "other characters": written("".join(map(chr, range(0x4E00, 0x4E60))) + "\n"),
        "no last line end": content(lambda b: b.rstrip()),
    },
    "pairs": {
        "a line more": content(lambda b: b + b"one\n"),
        "a line of a gigabyte": lambda path: os.truncate(path, 2**31),
        "Latin-1": written("caf\xe9\n".encode("latin1") * 4),
        "blank": written("\n \n\t\n\n"),
        "other line ends": written("a\rb\rc\rd\r"),
    },
    "pairs.gz": {"a bomb": written(gzip_bomb()), "a bomb of lines": written(gzip_bomb(b"a\n"))},
    "pairs.zip": {
        "no tabs": lambda path: zipped(path, {"fra.txt": b"Go.\nHi.\n"}),
        "two pairs": lambda path: zipped(path, {"fra.txt": b"Go.\tVa !\nHi.\tSalut !\n"}),
        "two texts": lambda path: zipped(path, {"a.txt": b"a\tb", "b.txt": b"a\tb"}),
        "Latin-1": lambda path: zipped(path, {"fra.txt": b"Caf\xe9\tcaf\xe9\n"}),
        "empty name": lambda path: zipped(path, {" ": b"a\tb", ".txt": b"a\tb"}),
        "a bomb": written(forged_zip("fra.txt", deflated(b"", 3000), 100)),
        "member above": lambda path: zipped(path, {"../fra.txt": b"a\tb"}),
    },
    "sentences": {
        "an empty line": content(lambda b: b + b"\n\n"),
        "a line of 2 GB": lambda path: os.truncate(path, 2**31),
    },
    "vot": {
        **{
            f"first line {line[:9]!r}": content(lambda b, line=line: line.encode("utf-8", "surrogatepass") + b[7:])
            for line in NUMBERS
        },
        "4 GB": lambda path: os.truncate(path, 2**32),
        "links in circles": circles,
        "a link upwards": lambda path: (path.parent / "up").symlink_to(".."),
        "corners without area": written("1,1,1,1,1,1,1,1\n" * 3),
        "a broken frame": lambda path: put(path.with_name("0.jpg"), NOISE),
    },
    "otb": {
        f"first line {line[:9]!r}": content(lambda b, line=line: line.encode("utf-8", "surrogatepass") + b[7:])
        for line in NUMBERS
    },
    "got10k": {
        "not numbers": written("yes\nno\n"),
        "too few": written("0\n"),
        "a video without frames": lambda path: [frame.unlink() for frame in path.parent.glob("*.jpg")],
    },
    "vid.xml": {
        **{name: written(code) for name, code in XML.items()},
        **{f"xmin {value[:9]!r}": written(ANNOTATION.replace("<xmin>1", f"<xmin>{value}")) for value in POINTS},
        **{f"track {value[:9]!r}": written(ANNOTATION.replace("<trackid>0", f"<trackid>{value}")) for value in POINTS},
        "no box": written("<a><object><trackid>0</trackid></object></a>"),
        "4 GB": lambda path: os.truncate(path, 2**32),
    },
    "pieces": {"of another kind": content(lambda b: b"\x0a\x07\x0a\x01a\x15\0\0\0\0")},
    "checkpoint": {
        **{name: written(forged_checkpoint(code)) for name, code in PICKLES.items() if name not in TORCH_TAKES},
        **{f"a bare pickle: {name}": written(PICKLES[name]) for name in ("os.system, reduce", "os.system, inst")},
        "code in it": written(checkpoint(state_dict=Runs())),
        "code beside it": written(checkpoint(callbacks={"a": Runs()})),
        "no state": written(saved({"global_step": 3})),
        "no step": written(saved({"state_dict": WEIGHTS})),
        "a list": written(saved([1, 2])),
        "a tensor": written(saved(torch.ones(3))),
        "a state that is a list": written(checkpoint(state_dict=[1, 2])),
        "a state of texts": written(checkpoint(state_dict={"a": "b"})),
        "a state of lists": written(checkpoint(state_dict={"a": [1.0]})),
        "a state without names": written(checkpoint(state_dict={1: torch.ones(1)})),
        "a step that is text": written(checkpoint(global_step="3")),
        "a step below zero": written(checkpoint(global_step=-3)),
        "a step that is not whole": written(checkpoint(global_step=0.5)),
        "one number for a trillion": written(checkpoint(state_dict={"a": torch.ones(1).expand(10**6, 10**6)})),
        "an old kind of file": instead(
            lambda p: torch.save({"state_dict": WEIGHTS, "global_step": 1}, p, _use_new_zipfile_serialization=False)
        ),
        "a member missing": instead(lambda path: zipped(path, {"a/data.pkl": forged_zip("a", b"", 0)})),
        "an executable script": instead(lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)),
    },
    "rule.safetensors": {
        "a head of 2^60": content(lambda b: struct.pack("<Q", 2**60) + b[8:]),
        "a head of 90 MB": content(lambda b: struct.pack("<Q", 9 * 10**7) + b[8:]),
        "not JSON": written(forged_safetensors(b"{'a': 1}")),
        "deep JSON": written(forged_safetensors(b"[" * 10**6)),
        "places outside": written(forged_safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}})),
        "a shape of 10^18": written(
            forged_safetensors({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}, bytes(4))
        ),
        "an unknown type": written(
            forged_safetensors({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
        ),
        "nothing": written(safetensors({})),
        "no notes": written(safetensors({"a": torch.ones(1)})),
        "NaN": rule_file(first_nan),
        "a weight less": rule_file(lambda tensors, notes: tensors.popitem()),
        "a weight more": rule_file(lambda tensors, notes: tensors.update(more=torch.ones(1))),
        "another weight": rule_file(lambda tensors, notes: next(iter(tensors.values())).add_(1)),
        "whole numbers": rule_file(lambda tensors, notes: tensors.update({k: v.long() for k, v in tensors.items()})),
        **{
            f"options {value[:9]}": rule_file(lambda tensors, notes, value=value: notes.update(options=value))
            for value in ("", "[]", "{}", "null", "[" * 10**5, '{"hidden_size": -1}')
        },
        **{
            f"{name} of {value!r}": rule_file(
                lambda tensors, notes, name=name, value=value: notes.update(
                    options=json.dumps(json.loads(notes["options"]) | {name: value})
                )
            )
            for name, values in {
                "hidden_size": (0, -1, 10**12, "3", None, 2.5),
                "num_layers": (0, -1, 100, "1"),
                "p": ("x", None, 0),
                "output_scale": ("x", None),
                "separate_convolutions": ("yes",),
            }.items()
            for value in values
        },
    },
    "rule.ckpt": {
        "no options": written(rule_checkpoint(hyper_parameters={})),
        "options that are a list": written(rule_checkpoint(hyper_parameters=[1])),
        "no rule": written(rule_checkpoint(state_dict=WEIGHTS)),
        "code in it": written(rule_checkpoint(hyper_parameters=Runs())),
    },
    "features.pth": {
        "code in it": written(saved({"features.0.weight": Runs()})),
        "a module": written(saved(torch.nn.Linear(2, 2))),
        "a list": written(saved([torch.ones(2)])),
        "nothing": written(saved({})),
        "another shape": written(
            saved(
                features(
                    **{"layers_0_weight": torch.ones(2)}
                    | {next(iter(FEATURES.state_dict())).replace(".", "_"): torch.ones(2)}
                )
            )
        ),
        "NaN": written(saved({key: value * float("nan") for key, value in features().items()})),
        "whole numbers": written(saved({key: value.long() for key, value in features().items()})),
        "numbers": written(saved(dict.fromkeys(features(), 1.0))),
        "keys that are numbers": written(saved(dict(enumerate(features().values())))),
        "one number for all": written(saved({k: torch.ones(1).expand(10**6, 10**6) for k in features()})),
    },
    "features.safetensors": {
        "a head of 2^60": content(lambda b: struct.pack("<Q", 2**60) + b[8:]),
        "NaN": written(safetensors({key: value * float("nan") for key, value in features().items()})),
        "others": written(safetensors(WEIGHTS)),
    },
    "quadratic.npz": {
        **{
            name: lambda path, head=head: zipped(path, {"W.npy": head, "y.npy": head}) and None
            for name, head in HEADERS.items()
        },
        **{
            f"a pickle: {name}": lambda path, code=PICKLES[name]: (
                zipped(path, {"W.npy": npy(code), "y.npy": npy(code)}) and None
            )
            for name in ("os.system, reduce", "eval, reduce")
        },
        "objects": lambda path: np.savez(path, W=np.eye(3).astype(object), y=np.ones(3)),
        "not square": lambda path: np.savez(path, W=np.ones((2, 3)), y=np.ones(3)),
        "NaN": lambda path: np.savez(path, W=np.full((3, 3), np.nan), y=np.ones(3)),
        "text": lambda path: np.savez(path, W=np.full((3, 3), "a"), y=np.ones(3)),
        "empty": lambda path: np.savez(path, W=np.ones((0, 0)), y=np.ones(0)),
        "an array instead": written(npy(bytes(8), "(1,)", "<f8")),
    },
    "moving mnist.npy": {
        **{name: written(head) for name, head in HEADERS.items()},
        **{f"a pickle: {name}": written(npy(PICKLES[name])) for name in ("os.system, reduce", "eval, reduce")},
        **{f"a bare pickle: {name}": written(PICKLES[name]) for name in ("os.system, reduce", "eval, reduce")},
        "an .npz instead": lambda path: path.write_bytes(zipped_arrays(frames=np.ones((20, 2, 64, 64), np.uint8))),
        "floats": lambda path: np.save(path, np.ones((20, 2, 64, 64), np.float32)),
        "other sizes": lambda path: np.save(path, np.ones((20, 2, 32, 32), np.uint8)),
        "flat": lambda path: np.save(path, np.ones(20, np.uint8)),
        "no sequences": lambda path: np.save(path, np.ones((20, 0, 64, 64), np.uint8)),
        "promises more": written(npy(bytes(10**6), "(20, 10000, 64, 64)", "|u1")),
    },
    "rows.yaml": {
        "code": written("!!python/object/apply:os.system ['touch pwned']\n"),
        "new code": written("one: !!python/object/new:os.system ['touch pwned']\n"),
        "a module": written("one: !!python/module:antigravity\n"),
        "a billion laughs": written(LAUGHS),
        "laughs as a number": written(LAUGHS + "one: {run: a, measure: b, published: *a29}\n"),
        "deep": written("[" * 10**4),
        "a list": written("- one\n- two\n"),
        "a text": written("one\n"),
        "rows that are texts": written("one: two\n"),
        "rows that are nothing": written("one:\n"),
        "no run": written("one: {measure: a}\n"),
        "a run that is a list": written("one: {run: [1], measure: a}\n"),
        "keys that are numbers": written("1: {run: a, measure: b}\n"),
        "keys that are lists": written("? [1, 2]\n: {run: a, measure: b}\n"),
        "tabs": written("one:\n\trun: a\n"),
        "two of a key": written(ROWS + "one: 1\n"),
        "half a character": written(b"one: {run: \xc3, measure: b}\n"),
        "a control character": written("one: {run: '\x01', measure: b}\n"),
        "an unknown anchor": written("one: *two\n"),
        "itself": written("one: &a {run: *a, measure: *a}\n"),
    },
    "record.json": {
        **{f"no {key}": record(**{key: "gone"}) for key in RECORD},
        **{f"{key} {value!r}": record(**{key: value}) for key in RECORD for value in (None, [1], {"a": 1})},
        "a value that is text": record(value="low"),
        "a value that is NaN": record(value=float("nan")),
        "baselines of text": record(baselines={"a": "b"}),
        "an interval of text": record(interval="wide"),
        "intervals of text": record(baseline_intervals={"chance": "wide"}),
        "further measures that are numbers": record(further=[1, 2]),
        "further measures without names": record(further=[{"value": 1}]),
        "a list": written("[1, 2]"),
        "a number": written("3"),
        "deep": written("[" * 10**6),
        "a number of 10^4 digits": written('{"a": ' + "9" * 10**4 + "}"),
        "not JSON": written("{'a': 1}"),
        "half a character": written(b'{"a": "\xc3"}'),
        "a record without a row": lambda path: put(path.with_name("two.json"), "{}"),
    },
}


def zipped_arrays(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def flipped(seed: int) -> Callable[[Path], None]:
    """Flips bits of one to four bytes."""

    def flip(data: bytes) -> bytes:
        random, flipped = np.random.default_rng(seed), bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 5)):
            flipped[place] ^= random.integers(1, 256)
        return bytes(flipped)

    return content(flip)


FLIPPED = {f"flipped bytes {seed}": flipped(seed) for seed in range(FLIPS)}
CASES = {reader: COMMON | SPECIAL.get(reader, {}) | FLIPPED for reader in READERS}
# what no reader can take for a file
NOTHING = ("empty", "a folder", "a dangling link", "a link to itself", "unreadable")


@pytest.mark.parametrize("reader", READERS)
def test_malformed_files_are_refused_or_read(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where code in a file would leave its mark
    valid = tmp_path / "valid"
    valid.mkdir()
    file = READERS[reader].write(valid).relative_to(valid)

    def case(damage: Callable[[Path], None]) -> Outcome:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(valid, tmp_path / "data")
        damage(tmp_path / "data" / file)
        return outcome(tmp_path, lambda: READERS[reader].read(tmp_path / "data"))

    cases = {"as it was": lambda path: None} | CASES[reader]
    outcomes = attempts({name: lambda damage=damage: case(damage) for name, damage in cases.items()})
    assert outcomes["as it was"].kind == "read", outcomes["as it was"].message
    wrong = {
        name: result.kind
        for name, result in outcomes.items()
        if result.kind not in ("read", "refused") or (result.kind == "read" and name in NOTHING)
    }
    assert not wrong, "\n".join(f"--- {reader}: {name}: {kind}" for name, kind in wrong.items())


COMMANDS = {
    "code": "!!python/object/apply:os.system ['touch pwned']\n",
    "code in a value": "trainer: {max_steps: !!python/object/apply:os.system ['touch pwned']}\n",
    "a name of code": "trainer: {max_steps: !!python/name:os.system }\n",
    "a list": "- trainer\n- model\n",
    "a text": "trainer\n",
    "nothing but a key": "trainer:\n",
    "a number": "3\n",
    "tabs": "trainer:\n\tmax_steps: 3\n",
    "unclosed": "trainer: {max_steps: 3\n",
    "an unknown anchor": "trainer: *other\n",
    "an unknown key": "trainer: {steps: 3}\n",
    "an unknown part": "teacher: {max_steps: 3}\n",
    "a wrong type": "trainer: {max_steps: many}\n",
    "a list for a number": "trainer: {max_steps: [1, 2]}\n",
    "a wrong option of the model": "model: {init_args: {width: wide}}\n",
    "an unknown option of the model": "model: {init_args: {breadth: 3}}\n",
    "a model that is a command": "model: {class_path: subprocess.Popen, init_args: {args: [touch, pwned]}}\n",
    "a model that is a function": "model: {class_path: os.system, init_args: {command: touch pwned}}\n",
    "a callback that is a command": "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: ls}}]}\n",
    "a model that is not there": "model: {class_path: lightning_meta.nowhere.Model}\n",
    "data that are a model": "data: {class_path: lightning_meta.dynamic_filters.video.VideoPrediction}\n",
    "half a character": b"trainer: {max_steps: \xc3}\n",
    "zeros": bytes(100),
    "noise": NOISE,
    "a picture": png(),
    "another kind of schedule": "schedule: {horizon: [[0, 10], [0, 12]]}\n",
    "a schedule below zero": "schedule: {horizon: -3}\n",
    "a timer of text": "timer: {duration: long}\n",
}
"""Configurations, each after the one of an experiment."""

DATA = {
    "idx": ("dfn_mnist", ["empty", "a folder", "noise", "shape 2147483648x28x28"]),
    "idx.gz": ("dfn_mnist", ["first half", "checksum", "a link to itself"]),
    "cifar": (
        "hyper_cifar10",
        ["os.system, reduce", "os.system, inst", "memo of 2^30", "first half", "deep tuples as a key"],
    ),
    "cifar.tar.gz": ("hyper_cifar10", ["first half", "a hard link", "another"]),
}
"""Damages of data that ``fit`` meets."""


def test_the_command_line_says_what_is_wrong(tmp_path, monkeypatch):
    given_files = tmp_path / "given"
    given_files.mkdir()
    monkeypatch.chdir(given_files)

    def command(name: str, *more: str) -> Outcome:
        result = outcome(given_files, lambda: main(["fit", *arguments(name, tmp_path / "run", *more)]))
        lines = result.message.strip().splitlines()
        wrong = result.kind != "exit" or not lines or "Traceback" in result.message
        # what is wrong with a file is one line; what is wrong with an option is argparse's usage and then a line
        wrong = wrong or not (lines[0].startswith("usage: ") or (len(lines) == 1 and lines[0].startswith("error: ")))
        return Outcome(f"not so: {result}" if wrong else "refused", result.message)

    def config(content: str | bytes) -> Outcome:
        return command("dfn_mnist", f"--config={put(given_files / 'wrong.yaml', content)}")

    def data(reader: str, name: str, damage: Callable[[Path], None]) -> Outcome:
        shutil.rmtree(given_files / "data", ignore_errors=True)
        damage(READERS[reader].write(given_files / "data"))
        return command(name, f"--data.root={given_files / 'data'}", "--data.source=paper")

    def saved_state(content: bytes) -> Outcome:
        return command("dfn_mnist", f"--ckpt_path={put(given_files / 'last.ckpt', content)}")

    cases = {f"config: {name}": lambda content=content: config(content) for name, content in COMMANDS.items()}
    for reader, (experiment, names) in DATA.items():
        for name in names:
            damage = CASES[reader][name]
            cases[f"{reader}: {name}"] = lambda r=reader, e=experiment, d=damage: data(r, e, d)
    for name, content in {
        "empty": b"",
        "cut short": checkpoint()[:500],
        "code": checkpoint(state_dict=Runs()),
        "no state": saved({"global_step": 3}),
        "of another experiment": checkpoint(),
        "a rule": rule_checkpoint(),
        "texts": checkpoint(state_dict={"a": "b"}),
    }.items():
        cases[f"checkpoint: {name}"] = lambda content=content: saved_state(content)
    wrong = {name: result for name, result in attempts(cases).items() if result.kind != "refused"}
    assert not wrong, "\n".join(f"--- {name}: {result.kind}" for name, result in wrong.items())
    assert len(cases) > 40


def test_there_are_hundreds_of_cases():
    """Every reader's test goes through all of its cases; they are counted here without the flipped bytes."""
    assert SPECIAL.keys() <= READERS.keys()
    assert sum(len(cases.keys() - FLIPPED.keys()) for cases in CASES.values()) > 1000
