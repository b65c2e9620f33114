"""Moving MNIST (De Brabandere et al. 2016, section 4.1), and clips of the user's own.

Shapes: B sequences, T frames, H rows, W columns; one grey channel; values in [0, 1].
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.sampling import (
    Key,
    Segment,
    evaluation_keys,
    generator,
    shuffled,
)
from lightning_meta.scheduled_data import ScheduledData
from lightning_meta.sources import clips, digits

SIZE, DIGIT = 64, 28  # pixels of the canvas and of a digit
STEP = 0.1  # of the free way of 64 - 28 pixels: a digit moves 3.6 pixels a frame
SPLITS = {"train": 0, "val": 1, "test": 2}


def moving_digits(pictures: list[np.ndarray], frames: int, random: np.random.Generator) -> np.ndarray:
    """Digits that fly straight and bounce off the walls, as the authors' generator moves them.

    Every digit starts anywhere in the unit square with unit speed in any direction. In each frame it first moves, then
    meets the walls (where it is clamped, which shortens that step, and its velocity flips), then is drawn, at its
    position cut to whole pixels. Where digits overlap the brighter pixel is seen.

    Args:
        pictures: uint8 (28, 28) each.
        frames: How many to draw.
        random: Where positions and directions come from.

    Returns:
        uint8 (T, 64, 64).
    """
    canvas = np.zeros((frames, SIZE, SIZE), np.uint8)
    for picture in pictures:
        position = random.random(2)  # x, y
        angle = 2 * np.pi * random.random()
        velocity = STEP * np.array([np.cos(angle), np.sin(angle)])
        for frame in canvas:
            position += velocity
            velocity[(position <= 0) | (position >= 1)] *= -1
            position.clip(0, 1, out=position)
            x, y = ((SIZE - DIGIT) * position).astype(int)
            place = frame[y : y + DIGIT, x : x + DIGIT]
            np.maximum(place, picture, out=place)
    return canvas


class Clips(NamedTuple):
    """A batch of sequences.

    ``frames`` (B, T, 1, H, W): frame ``segment.start`` and those after it, up to and with ``segment.stop``.
    """

    frames: Tensor
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[np.ndarray, Segment]]) -> "Clips":
        """Joins ``(frames uint8 (T, H, W), segment)`` pairs of one segment."""
        frames, segments = zip(*samples, strict=True)
        return cls(torch.from_numpy(np.stack(frames)).unsqueeze(2) / 255, segments[0])


class MovingDigits(Dataset[tuple[np.ndarray, Segment]]):
    """Sequences drawn on the fly: sample `i` is a function of (seed, split, i).

    Digits are taken in a shuffled order without replacement, shuffled again when all are used.
    """

    def __init__(self, pictures: Tensor, split: str, seed: int, digits_a_sequence: int = 2):
        self.pictures, self.key, self.count = pictures.numpy(), (seed, SPLITS[split]), digits_a_sequence

    def sequence(self, index: int, frames: int) -> np.ndarray:
        """The first frames of sequence ``index``, uint8 (T, 64, 64)."""
        positions = range(index * self.count, (index + 1) * self.count)
        pictures = [self.pictures[shuffled(position, len(self.pictures), *self.key)] for position in positions]
        return moving_digits(pictures, frames, generator(*self.key, index))

    def __getitem__(self, key: Key) -> tuple[np.ndarray, Segment]:
        index, segment = key
        return self.sequence(index, segment.stop + 1)[segment.start :], segment


class FixedClips(Dataset[tuple[np.ndarray, Segment]]):
    """Sequences that lie in an array, uint8 (N, T, H, W)."""

    def __init__(self, sequences: np.ndarray):
        self.sequences = sequences

    def __getitem__(self, key: Key) -> tuple[np.ndarray, Segment]:
        index, segment = key
        return self.sequences[index, segment.start : segment.stop + 1], segment


class MovingMNIST(ScheduledData):
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
        source: Literal["auto", "paper", "stand-in"] = "auto",
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

    def prepare_data(self) -> None:
        if self.hparams.source == "stand-in" or not self.hparams.download or digits.has_mnist(self.hparams.root):
            return
        with suppress(InputError):  # setup says what is missing, or falls back
            digits.download_mnist(self.hparams.root)

    def setup(self, stage: str) -> None:
        root, source = self.hparams.root, self.hparams.source
        if Path(root).exists() and not Path(root).is_dir():
            raise InputError(f"{root} is a file: --data.root names a folder, the one with MNIST/raw in it")
        if source == "paper" or (source == "auto" and digits.has_mnist(root)):
            pictures, test = digits.mnist(root, train=True)[0], digits.mnist(root, train=False)[0]
            train, val = pictures[:50_000], pictures[50_000:]
            self.data_name = "MNIST"
        else:
            pictures = digits.small_digits()[0]
            train, val, test = pictures[:1200], pictures[1200:1400], pictures[1400:]
            self.data_name = "scikit-learn's 8x8 digits, a stand-in for MNIST"
            if source == "auto":
                rank_zero_warn(
                    f"no MNIST in {Path(root) / 'MNIST' / 'raw'}: this run uses {self.data_name}; "
                    "--data.root names another place"
                )
        self.train_set = MovingDigits(train, "train", self.hparams.seed)
        self.val_set = MovingDigits(val, "val", seed=0)
        self.test_set = MovingDigits(test, "test", seed=0)
        self.test_name = "sequences drawn from the test images"
        if self.hparams.test_set == "fixed" and stage in ("test", "predict"):
            sequences = fixed_test_sequences(Path(root))
            if len(sequences) < self.test_samples:
                raise InputError(
                    f"the fixed test set has {len(sequences)} sequences: --data.test_sequences {self.test_samples} "
                    "must be at most that"
                )
            self.test_set = FixedClips(sequences)
            self.test_name = "the fixed test sequences of Srivastava et al. (2015)"
        if stage == "predict" and self.hparams.clip:
            self.test_set = FixedClips(own_clip(self.hparams.clip, self.hparams.frames)[None])
        self.save_hyperparameters({"data_name": self.data_name})

    @property
    def test_samples(self) -> int:
        """How many sequences a test result is a mean of."""
        return self.hparams.test_sequences

    def mean_frame(self) -> Tensor:
        """The average frame of training sequences, (1, H, W): what one knows without looking."""
        frames = [self.train_set.sequence(i, self.hparams.frames).mean(0) for i in range(500)]
        return torch.from_numpy(np.mean(frames, axis=0) / 255).float()[None]

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, batch_sampler=self.scheduled())

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.val_set, self.hparams.val_sequences)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.test_set, self.hparams.test_sequences)

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.test_set, 1 if self.hparams.clip else self.hparams.predict_sequences)

    def _evaluation_loader(self, dataset: Dataset, sequences: int) -> DataLoader:
        horizon, rank, world_size = self.hparams.frames - 1, self.trainer.global_rank, self.trainer.world_size
        keys = evaluation_keys(sequences, horizon, rank, world_size)
        return self._loader(dataset, sampler=keys, batch_size=self.batch_size)

    def _loader(self, dataset: Dataset, **order: Any) -> DataLoader:
        return self.loader(dataset, Clips.collate, **order)


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
            sequences = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
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
    frames = clips.read_clip(path, max_frames).numpy()
    height, width = frames.shape[1:]
    if (height, width) != (SIZE, SIZE):
        raise InputError(f"{path} is {width}x{height} pixels, the model is for {SIZE}x{SIZE}: scale or crop the clip")
    return frames
