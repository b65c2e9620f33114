"""Moving MNIST (De Brabandere et al. 2016, section 4.1), and clips of the user's own.

Shapes: B sequences, T frames, H rows, W columns; one grey channel; values in [0, 1].
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.seeding import generator, shuffled
from lightning_meta.sources import digits, video_files

SIZE, DIGIT = 64, 28  # pixels of the canvas and of a digit
STEP = 0.1  # of the free way of 64 - 28 pixels: a digit moves 3.6 pixels a frame


def trajectory(frames: int, random: np.random.Generator) -> np.ndarray:
    """Where a digit's upper left corner is in each frame, as the authors' generator moves it: int (T, 2), x and y.

    It starts anywhere in the unit square with unit speed in any direction. In each frame it first moves, then meets
    the walls (where it is clamped, which shortens that step, and its velocity flips), then is drawn, at its position
    cut to whole pixels.
    """
    position = random.random(2)  # x, y
    angle = 2 * np.pi * random.random()
    velocity = STEP * np.array([np.cos(angle), np.sin(angle)])
    places = np.empty((frames, 2), int)
    for t in range(frames):
        position += velocity
        velocity[(position <= 0) | (position >= 1)] *= -1
        position.clip(0, 1, out=position)
        places[t] = (SIZE - DIGIT) * position
    return places


def moving_digits(pictures: list[np.ndarray], places: list[np.ndarray]) -> np.ndarray:
    """Digits at their places in every frame. Where they overlap the brighter pixel is seen.

    Args:
        pictures: uint8 (28, 28) each.
        places: (T, 2) each, x and y.

    Returns:
        uint8 (T, 64, 64).
    """
    canvas = np.zeros((len(places[0]), SIZE, SIZE), np.uint8)
    for picture, way in zip(pictures, places, strict=True):
        for frame, (x, y) in zip(canvas, way, strict=True):
            place = frame[y : y + DIGIT, x : x + DIGIT]
            np.maximum(place, picture, out=place)
    return canvas


def true_flow(pictures: list[np.ndarray], places: list[np.ndarray]) -> np.ndarray:
    """Where each inked pixel of a frame was in the frame before, seen from where it is now.

    Args:
        pictures: As for ``moving_digits``.
        places: As for ``moving_digits``.

    Returns:
        float32 (T, 2, 64, 64), dx and dy in pixels; NaN where no digit is, and in the first frame.
    """
    flow = np.full((len(places[0]), 2, SIZE, SIZE), np.nan, np.float32)
    brightest = np.zeros((len(places[0]), SIZE, SIZE), np.uint8)
    for picture, way in zip(pictures, places, strict=True):
        for t in range(1, len(way)):
            x, y = way[t]
            part = np.s_[t, ..., y : y + DIGIT, x : x + DIGIT]
            seen = picture > brightest[part]
            flow[part] = np.where(seen, (way[t - 1] - way[t])[:, None, None], flow[part])
            brightest[part] = np.maximum(brightest[part], picture)
    return flow


Sample = tuple[np.ndarray, Segment, np.ndarray | None]  # frames uint8 (T, H, W), and flow float32 (T, 2, H, W)


class Clips(NamedTuple):
    """A batch of sequences.

    ``frames`` (B, T, 1, H, W): frame ``segment.start`` and those after it, up to and with ``segment.stop``. ``flow``
    (B, T, 2, H, W): where each pixel was in the frame before, dx and dy in pixels, NaN where that is not known.
    """

    frames: Tensor
    segment: Segment
    flow: Tensor | None = None

    @classmethod
    def collate(cls, samples: list[Sample]) -> "Clips":
        """Joins samples of one segment."""
        frames, segments, flows = zip(*samples, strict=True)
        flow = None if flows[0] is None else torch.from_numpy(np.stack(flows))
        return cls(torch.from_numpy(np.stack(frames)).unsqueeze(2) / 255, segments[0], flow)


class DrawnClips(Dataset[Sample], ABC):
    """Sequences drawn on the fly: sample `i` is a function of `i` and what the data set was made of."""

    with_flow = False

    @abstractmethod
    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The first frames of sequence ``index``, uint8 (T, H, W), and where asked for and known their flow."""

    def __getitem__(self, key: Key) -> Sample:
        index, segment = key
        frames, flow = self.sequence(index, segment.stop + 1)
        return frames[segment.start :], segment, None if flow is None else flow[segment.start :]


class MovingDigits(DrawnClips):
    """Moving digits, by (seed, split, i).

    Digits are taken in a shuffled order without replacement, shuffled again when all are used.
    """

    def __init__(self, pictures: Tensor, split: str, seed: int, digits_a_sequence: int = 2, with_flow: bool = False):
        self.pictures, self.key, self.count = pictures.numpy(), (seed, SPLITS[split]), digits_a_sequence
        self.with_flow = with_flow

    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, np.ndarray | None]:
        positions = range(index * self.count, (index + 1) * self.count)
        pictures = [self.pictures[shuffled(position, len(self.pictures), *self.key)] for position in positions]
        random = generator(*self.key, index)
        places = [trajectory(frames, random) for _ in pictures]
        return moving_digits(pictures, places), true_flow(pictures, places) if self.with_flow else None


class FixedClips(Dataset[Sample]):
    """Sequences that lie in an array, uint8 (N, T, H, W)."""

    def __init__(self, sequences: np.ndarray):
        self.sequences = sequences

    def __getitem__(self, key: Key) -> Sample:
        index, segment = key
        return self.sequences[index, segment.start : segment.stop + 1], segment, None


class ClipDataModule(MetaDataModule):
    """The base class of the data modules of clips; ``frames``, a hyper-parameter, is the length of a sequence."""

    collate = staticmethod(Clips.collate)

    @property
    def horizon(self) -> int:
        """Number of the last frame of a sequence."""
        return self.hparams.frames - 1

    def mean_frame(self) -> Tensor:
        """The average frame of training sequences, (1, H, W): what one knows without looking."""
        frames = [self.sets["train"].sequence(i, self.hparams.frames)[0].mean(0) for i in range(500)]
        return torch.from_numpy(np.mean(frames, axis=0) / 255).float()[None]

    def flow_batches(self, batches: int, frames: int) -> Iterator[Clips]:
        """The heads of training sequences, up to and with frame number ``frames``, with their flow if it is known."""
        labelled, size = copy.copy(self.sets["train"]), self.batch_size
        labelled.with_flow = True
        for i in range(batches):
            segment = Segment(i, 0, frames, last=True)
            yield Clips.collate([labelled[i * size + j, segment] for j in range(size)])


class MovingMNISTDataModule(ClipDataModule):
    """Moving MNIST: two digits on 64x64 pixels, 10 frames to see and 10 to predict; or a clip to predict from.

    Training sequences are drawn on the fly from the first 50,000 training images of MNIST, validation sequences from
    the other 10,000, test sequences from the test images. The validation and test sets are the same for every seed.

    Args:
        root: Folder with ``MNIST/raw/`` (and ``MovingMNIST/`` for ``test_set: fixed``).
        source: ``paper`` insists on MNIST; ``stand-in`` takes scikit-learn's 8x8 digits, enlarged; ``auto`` takes
            MNIST where it lies or can be downloaded, else the stand-in.
        download: Whether to fetch MNIST into ``root`` where it is missing.
        test_set: ``generated``, or ``fixed``: the 10,000 sequences of Srivastava et al. (2015), from
            ``MovingMNIST/bouncing_mnist_test.npy`` or ``MovingMNIST/mnist_test_seq.npy``.
        clip: What ``predict`` goes on from: a GIF, an MP4 or a folder of pictures, 64x64. None: test sequences.
        batch_size: Sequences a process and step.
        frames: Frames of a sequence in validation and test, the first of them for the model to see.
        val_sequences: Sequences to validate on.
        test_sequences: Sequences to test on.
        predict_sequences: Test sequences that ``predict`` continues where there is no clip.
        num_workers: Processes that draw sequences; 0 draws them in the training process.
        seed: Of the training sequences.

    Raises:
        InputError: Where files are missing, truncated or not what they should be.
    """

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        test_set: Literal["generated", "fixed"] = "generated",
        clip: str | None = None,
        batch_size: int = 16,
        frames: int = 20,
        val_sequences: int = 100,
        test_sequences: int = 1000,
        predict_sequences: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    @property
    def present(self) -> bool:
        return digits.has_mnist(self.hparams.root)

    def fetch(self) -> None:
        digits.download_mnist(self.hparams.root)

    def make_sets(self, stage: str) -> None:
        h, root = self.hparams, self.hparams.root
        self.counts = {"val": h.val_sequences, "test": h.test_sequences, "predict": h.predict_sequences}
        if Path(root).exists() and not Path(root).is_dir():
            raise InputError(f"{root} is a file: --data.root names a folder, the one with MNIST/raw in it")
        if self.use_papers_data("MNIST", Path(root) / "MNIST" / "raw", digits.STAND_IN):
            pictures, test = digits.mnist(root, train=True)[0], digits.mnist(root, train=False)[0]
            train, val = pictures[:50_000], pictures[50_000:]
        else:
            pictures = digits.small_digits()[0]
            train, val, test = pictures[:1200], pictures[1200:1400], pictures[1400:]
        self.sets = {
            "train": MovingDigits(train, "train", h.seed),
            "val": MovingDigits(val, "val", seed=0),
            "test": MovingDigits(test, "test", seed=0, with_flow=True),
        }
        self.test_name = "sequences drawn from the test images"
        if h.test_set == "fixed" and stage in ("test", "predict"):
            sequences = fixed_test_sequences(Path(root))
            if len(sequences) < self.counts["test"]:
                raise InputError(
                    f"the fixed test set has {len(sequences)} sequences: --data.test_sequences {self.counts['test']} "
                    "must be at most that"
                )
            self.sets["test"] = FixedClips(sequences)
            self.test_name = "the fixed test sequences of Srivastava et al. (2015)"
        self.sets["predict"] = self.sets["test"]
        if stage == "predict" and h.clip:
            self.sets["predict"] = FixedClips(own_clip(h.clip, h.frames)[None])
            self.counts["predict"] = 1


def fixed_test_sequences(root: Path) -> np.ndarray:
    """The published test set, uint8 (10000, 20, 64, 64), memory-mapped.

    Raises:
        InputError: Where neither file is there, or it is not such an array.
    """
    for name in ("bouncing_mnist_test.npy", "mnist_test_seq.npy"):
        path = root / "MovingMNIST" / name
        if not path.exists():
            continue
        try:
            sequences = np.lib.format.open_memmap(path, mode="r")  # np.load would also take an .npz
        except Exception as error:  # over a damaged head NumPy raises all sorts
            raise InputError(f"{path} is not a readable .npy file ({error}): fetch it again") from error
        if sequences.ndim == 4 and sequences.shape[0] == 20:  # the file that is common today has time first
            sequences = sequences.swapaxes(0, 1)
        if sequences.ndim != 4 or sequences.shape[1:] != (20, SIZE, SIZE) or sequences.dtype != np.uint8:
            raise InputError(
                f"{path} holds {sequences.dtype} {sequences.shape}, not uint8 (10000, 20, 64, 64): fetch it again"
            )
        return sequences
    raise InputError(
        f"no bouncing_mnist_test.npy or mnist_test_seq.npy in {root / 'MovingMNIST'}: put one there "
        "(torchvision.datasets.MovingMNIST downloads the second), or use --data.test_set generated"
    )


def own_clip(path: str, max_frames: int) -> np.ndarray:
    """A user's clip, uint8 (T, 64, 64), cut to ``max_frames``.

    Raises:
        InputError: Where it cannot be read or has another size.
    """
    frames = video_files.read_clip(path, max_frames).numpy()
    height, width = frames.shape[1:]
    if (height, width) != (SIZE, SIZE):
        raise InputError(f"{path} is {width}x{height} pixels, the model is for {SIZE}x{SIZE}: scale or crop the clip")
    return frames
