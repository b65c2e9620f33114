"""Moving MNIST (De Brabandere et al. 2016, section 4.1), and the user's own clips.

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
from lightning_meta.sources import digits, video_files
from lightning_meta.sources.seeding import generator, shuffled

SIZE, DIGIT = 64, 28  # pixels of the canvas and of a digit
STEP = 0.1  # speed as a fraction of the range 64 - 28 of a digit's position: 3.6 pixels a frame


def trajectory(frames: int, random: np.random.Generator) -> np.ndarray:
    """Return the position of a digit's upper left corner in each frame, as the authors' generator moves it.

    The digit starts anywhere in the unit square and moves in any direction. In each frame it first moves; if it leaves
    the square, it is clamped to the border and that component of its velocity changes sign; then it is drawn, at its
    position truncated to whole pixels.

    Returns:
        int (T, 2): x and y.
    """
    position = random.random(2)  # x, y
    angle = 2 * np.pi * random.random()
    velocity = STEP * np.array([np.cos(angle), np.sin(angle)])
    positions = np.empty((frames, 2), int)
    for t in range(frames):
        position += velocity
        velocity[(position <= 0) | (position >= 1)] *= -1
        position.clip(0, 1, out=position)
        positions[t] = (SIZE - DIGIT) * position
    return positions


def moving_digits(images: list[np.ndarray], positions: list[np.ndarray]) -> np.ndarray:
    """Draw digits at their positions in every frame. If digits overlap, the brighter pixel is visible.

    Args:
        images: One image of a digit each, uint8 (28, 28).
        positions: The digit's upper left corner in each frame, (T, 2): x and y.

    Returns:
        Frames uint8 (T, 64, 64).

    Example:
        >>> import numpy as np
        >>> from lightning_meta.dynamic_filters.moving_mnist_data import moving_digits
        >>> digit = np.full((28, 28), 255, np.uint8)
        >>> frames = moving_digits([digit], [np.array([[0, 0], [36, 36]])])
        >>> frames.shape, frames[0, 0, 0].item(), frames[1, 0, 0].item()
        ((2, 64, 64), 255, 0)
    """
    frames = np.zeros((len(positions[0]), SIZE, SIZE), np.uint8)
    for image, track in zip(images, positions, strict=True):
        for frame, (x, y) in zip(frames, track, strict=True):
            region = frame[y : y + DIGIT, x : x + DIGIT]
            np.maximum(region, image, out=region)
    return frames


def true_flow(images: list[np.ndarray], positions: list[np.ndarray]) -> np.ndarray:
    """Return the displacement from each pixel of a digit to its position in the previous frame.

    Args:
        images: See ``moving_digits``.
        positions: See ``moving_digits``.

    Returns:
        float32 (T, 2, 64, 64), dx and dy in pixels; NaN in the first frame and where there is no digit.
    """
    flow = np.full((len(positions[0]), 2, SIZE, SIZE), np.nan, np.float32)
    brightest = np.zeros((len(positions[0]), SIZE, SIZE), np.uint8)
    for image, track in zip(images, positions, strict=True):
        for t in range(1, len(track)):
            x, y = track[t]
            region = np.s_[t, ..., y : y + DIGIT, x : x + DIGIT]
            visible = image > brightest[region]
            flow[region] = np.where(visible, (track[t - 1] - track[t])[:, None, None], flow[region])
            brightest[region] = np.maximum(brightest[region], image)
    return flow


Sample = tuple[np.ndarray, Segment, np.ndarray | None]  # frames uint8 (T, H, W); flow float32 (T, 2, H, W), if known


class Clips(NamedTuple):
    """A batch of one segment of several sequences."""

    frames: Tensor  # (B, T, 1, H, W): frames segment.start to segment.stop, both included
    segment: Segment
    flow: Tensor | None = None  # (B, T, 2, H, W): dx, dy to a pixel's position in the previous frame; NaN: unknown

    @classmethod
    def collate(cls, samples: list[Sample]) -> "Clips":
        """Make a batch of samples of one segment."""
        frames, segments, flows = zip(*samples, strict=True)
        flow = None if flows[0] is None else torch.from_numpy(np.stack(flows))
        return cls(torch.from_numpy(np.stack(frames)).unsqueeze(2) / 255, segments[0], flow)


class GeneratedClips(Dataset[Sample], ABC):
    """Sequences that are generated on the fly. A sequence depends only on its index and the data set's arguments."""

    with_flow = False

    @abstractmethod
    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the first frames of a sequence, uint8 (T, H, W), and their flow if it is known and ``with_flow``."""

    def __getitem__(self, key: Key) -> Sample:
        index, segment = key
        frames, flow = self.sequence(index, segment.stop + 1)
        return frames[segment.start :], segment, None if flow is None else flow[segment.start :]


class MovingDigits(GeneratedClips):
    """Sequences of moving digits. Sequence `i` is a function of (seed, split, i).

    Digits are drawn without replacement; once all are used, they are shuffled again.

    Args:
        images: Images of digits, uint8 (N, 28, 28).
        split: Name of the split, a key of ``SPLITS``.
        seed: Seed of the sequences.
        digits_per_sequence: Number of digits in a sequence.
        with_flow: Also return the true flow.
    """

    def __init__(self, images: Tensor, split: str, seed: int, digits_per_sequence: int = 2, with_flow: bool = False):
        self.images, self.key, self.count = images.numpy(), (seed, SPLITS[split]), digits_per_sequence
        self.with_flow = with_flow

    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, np.ndarray | None]:
        numbers = range(index * self.count, (index + 1) * self.count)
        images = [self.images[shuffled(number, len(self.images), *self.key)] for number in numbers]
        random = generator(*self.key, index)
        positions = [trajectory(frames, random) for _ in images]
        return moving_digits(images, positions), true_flow(images, positions) if self.with_flow else None


class FixedClips(Dataset[Sample]):
    """The sequences of an array, uint8 (N, T, H, W)."""

    def __init__(self, sequences: np.ndarray):
        self.sequences = sequences

    def __getitem__(self, key: Key) -> Sample:
        index, segment = key
        return self.sequences[index, segment.start : segment.stop + 1], segment, None


class ClipDataModule(MetaDataModule):
    """Base class of the data modules of clips. The hyperparameter ``frames`` is the length of a sequence."""

    collate = staticmethod(Clips.collate)

    @property
    def horizon(self) -> int:
        """Index of the last frame of a sequence."""
        return self.hparams.frames - 1

    def mean_frame(self) -> Tensor:
        """Return the average frame of 500 training sequences, (1, H, W), which serves as a baseline."""
        frames = [self.sets["train"].sequence(i, self.hparams.frames)[0].mean(0) for i in range(500)]
        return torch.from_numpy(np.mean(frames, axis=0) / 255).float()[None]

    def flow_batches(self, batches: int, frames: int) -> Iterator[Clips]:
        """Yield batches of frames 0 to ``frames`` of training sequences, with their flow if it is known."""
        labelled, size = copy.copy(self.sets["train"]), self.batch_size
        labelled.with_flow = True
        for i in range(batches):
            segment = Segment(i, 0, frames, last=True)
            yield Clips.collate([labelled[i * size + j, segment] for j in range(size)])


class MovingMNISTDataModule(ClipDataModule):
    """Moving MNIST: two digits on 64x64 pixels, 10 given frames and 10 to predict; or the user's own clip.

    Training sequences are generated on the fly from the first 50,000 training images of MNIST, validation sequences
    from the other 10,000, and test sequences from the test images. Validation and test sets do not depend on the seed.

    Args:
        root: Folder with ``MNIST/raw/`` (and ``MovingMNIST/`` for ``test_set: fixed``).
        source: ``paper`` requires MNIST; ``stand-in`` uses scikit-learn's 8x8 digits, enlarged; ``auto`` uses MNIST if
            it is in ``root`` or can be downloaded, else the stand-in.
        download: Download MNIST to ``root`` if it is not there.
        test_set: ``generated``, or ``fixed``: the 10,000 sequences of Srivastava et al. (2015) in
            ``MovingMNIST/bouncing_mnist_test.npy`` or ``MovingMNIST/mnist_test_seq.npy``.
        clip: Clip whose first frames ``predict`` continues: a GIF, an MP4 or a folder of images, 64x64 pixels. None:
            test sequences.
        batch_size: Number of sequences per process and step.
        frames: Number of frames of a validation or test sequence, given frames included.
        val_sequences: Number of sequences to validate on.
        test_sequences: Number of sequences to test on.
        predict_sequences: Number of test sequences for ``predict`` if there is no clip.
        num_workers: Number of processes that generate sequences; 0 generates them in the training process.
        seed: Seed of the training sequences.

    Raises:
        InputError: If files are missing, damaged or not in the expected format.

    Example:
        >>> from lightning_meta.dynamic_filters.moving_mnist_data import MovingMNISTDataModule
        >>> data = MovingMNISTDataModule(source="stand-in")
        >>> data.setup("test")
        >>> frames, flow = data.sets["test"].sequence(0, frames=20)
        >>> frames.shape, flow.shape
        ((20, 64, 64), (20, 2, 64, 64))
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
            raise InputError(f"{root} is a file: set --data.root to the folder that contains MNIST/raw")
        if self.use_papers_data("MNIST", Path(root) / "MNIST" / "raw", digits.STAND_IN):
            images, test = digits.mnist(root, train=True)[0], digits.mnist(root, train=False)[0]
            train, val = images[:50_000], images[50_000:]
        else:
            images = digits.small_digits()[0]
            train, val, test = images[:1200], images[1200:1400], images[1400:]
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
                    f"the fixed test set has {len(sequences)} sequences, fewer than --data.test_sequences "
                    f"{self.counts['test']}: lower that"
                )
            self.sets["test"] = FixedClips(sequences)
            self.test_name = "the fixed test sequences of Srivastava et al. (2015)"
        self.sets["predict"] = self.sets["test"]
        if stage == "predict" and h.clip:
            self.sets["predict"] = FixedClips(own_clip(h.clip, h.frames)[None])
            self.counts["predict"] = 1


def fixed_test_sequences(root: Path) -> np.ndarray:
    """Return the published test set, uint8 (10000, 20, 64, 64), memory-mapped.

    Raises:
        InputError: If neither file exists, or the file does not contain such an array.
    """
    for name in ("bouncing_mnist_test.npy", "mnist_test_seq.npy"):
        path = root / "MovingMNIST" / name
        if not path.exists():
            continue
        try:
            sequences = np.lib.format.open_memmap(path, mode="r")  # np.load would also take an .npz
        except Exception as error:  # for a damaged header NumPy raises various exceptions
            raise InputError(f"{path} is not a readable .npy file ({error}): fetch it again") from error
        if sequences.ndim == 4 and sequences.shape[0] == 20:  # in mnist_test_seq.npy time comes first
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
    """Return the first ``max_frames`` frames of a user's clip, uint8 (T, 64, 64).

    Raises:
        InputError: If the clip cannot be read or has another size.
    """
    frames = video_files.read_clip(path, max_frames).numpy()
    height, width = frames.shape[1:]
    if (height, width) != (SIZE, SIZE):
        raise InputError(f"{path} is {width}x{height} pixels, the model is for {SIZE}x{SIZE}: scale or crop the clip")
    return frames
