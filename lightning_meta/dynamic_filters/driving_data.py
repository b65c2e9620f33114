"""Driving video (De Brabandere et al. 2016, section 4.2), and the user's own videos.

Shapes: T frames of 64x64 pixels; one grey channel; uint8 in data sets, in [0, 1] in batches.
"""

from pathlib import Path

import numpy as np

from lightning_meta.dynamic_filters.moving_mnist_data import ClipDataModule, FixedClips, GeneratedClips
from lightning_meta.dynamic_filters.photographs import grey_photographs
from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, Source
from lightning_meta.sources import driving
from lightning_meta.sources.seeding import generator

STAND_IN = "drives over bundled photographs, a stand-in for driving video"


class RandomSequences(GeneratedClips):
    """Random sequences from videos. Sequence `i` is a function of (seed, split, i).

    Args:
        videos: Frames of each video, uint8 (T, 64, 64).
        split: Name of the split, a key of ``SPLITS``.
        seed: Seed of the sequences.
        frame_step: Distance between the frames of a sequence; 1 takes every frame.
    """

    def __init__(self, videos: list[np.ndarray], split: str, seed: int, frame_step: int = 1):
        self.videos, self.key, self.frame_step = videos, (seed, SPLITS[split]), frame_step

    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, None]:
        sequences = _sequences(self.videos, frames, self.frame_step)
        if not sequences:
            raise InputError(
                f"the longest training video has {max(map(len, self.videos))} frames, too few for a sequence of "
                f"{frames} at data.frame_step {self.frame_step}: give a longer video, or lower schedule.horizon"
            )
        video, start = sequences[generator(*self.key, index).integers(len(sequences))]
        return self.videos[video][start :: self.frame_step][:frames], None


class RenderedDrives(GeneratedClips):
    """The stand-in: a camera moves over photographs. Sequence `i` is a function of (seed, split, i)."""

    def __init__(self, photographs: list[np.ndarray], split: str, seed: int, with_flow: bool = False):
        self.photographs, self.key, self.with_flow = photographs, (seed, SPLITS[split]), with_flow

    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, np.ndarray | None]:
        random = generator(*self.key, index)
        photograph = self.photographs[random.integers(len(self.photographs))]
        rendered, flow = driving.drawn_drive(photograph, frames, random)
        return rendered, flow if self.with_flow else None


class DrivingVideoDataModule(ClipDataModule):
    """Grey driving video of 64x64 pixels, 3 given frames and 3 to predict; or the user's own videos.

    The first 80 % of every video are for training, the next 10 % for validation and the last 10 % for testing. Of the
    authors' training file the last 10 % are for validation; their test file is for testing. Validation and test
    sequences are evenly spaced.

    Args:
        root: Folder with ``highway/highwayDriving_{train,test}.h5``, or with videos in ``video/highway/``.
        source: ``paper`` requires the authors' files; ``stand-in`` renders drives over photographs that come with
            installed packages; ``auto`` uses the authors' files, else the videos in ``video/highway/``, else the
            stand-in.
        video: Train and test on this instead: a video, an animated GIF or a folder of images, of any size, or a folder
            of videos.
        clip: Clip whose frames ``predict`` continues: a video, an animated GIF or a folder of images, of any size.
            None: test sequences.
        batch_size: Number of sequences per process and step.
        frame_step: Distance between the frames of a sequence; 2 takes every second frame. The authors' recording has 11
            frames per second.
        frames: Number of frames of a validation or test sequence, given frames included.
        val_sequences: Largest number of sequences to validate on.
        test_sequences: Largest number of sequences to test on. None: all.
        predict_sequences: Largest number of sequences for ``predict``.
        num_workers: Number of processes that make sequences; 0 makes them in the training process.
        seed: Seed of the training sequences.

    Raises:
        InputError: If files are missing, damaged or not in the expected format, or a video is too short.

    Example:
        >>> from lightning_meta.dynamic_filters.driving_data import DrivingVideoDataModule
        >>> data = DrivingVideoDataModule(source="stand-in")
        >>> data.setup("test")
        >>> frames, flow = data.sets["test"].sequence(0, frames=20)
        >>> frames.shape, flow.shape
        ((20, 64, 64), (20, 2, 64, 64))
    """

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        video: str | None = None,
        clip: str | None = None,
        batch_size: int = 16,
        frame_step: int = 1,
        frames: int = 6,
        val_sequences: int = 100,
        test_sequences: int | None = None,
        predict_sequences: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    @property
    def present(self) -> bool:
        return (Path(self.hparams.root) / "highway" / "highwayDriving_train.h5").exists()

    def make_sets(self, stage: str) -> None:
        h, videos = self.hparams, self.read()
        self.counts = {"val": h.val_sequences, "test": h.test_sequences or 1000, "predict": h.predict_sequences}
        if videos is None:
            photographs = grey_photographs()
            self.sets = {
                "train": RenderedDrives(photographs["train"], "train", h.seed),
                "val": RenderedDrives(photographs["val"], "val", seed=0),
                "test": RenderedDrives(photographs["test"], "test", seed=0, with_flow=True),
            }
            self.test_name = "drives over another photograph"
        else:
            self.sets = {
                "train": RandomSequences(videos["train"], "train", h.seed, h.frame_step),
                "val": self._evenly_spaced("val", videos["val"], h.val_sequences),
                "test": self._evenly_spaced("test", videos["test"], h.test_sequences),
            }
            self.counts["predict"] = min(self.counts["predict"], self.counts["test"])
            self.test_name = "later frames"
        self.sets["predict"] = self.sets["test"]
        if stage == "predict" and h.clip:
            self.sets["predict"] = self._evenly_spaced("predict", [driving.read_drive(h.clip)], h.predict_sequences)

    def _evenly_spaced(self, split: str, videos: list[np.ndarray], at_most: int | None) -> FixedClips:
        """Return ``at_most`` evenly spaced sequences of the videos, or all; whole videos if all are too short."""
        h = self.hparams
        sequences = _sequences(videos, h.frames, h.frame_step) or [(i, 0) for i in range(len(videos))]
        self.counts[split] = min(at_most or len(sequences), len(sequences))
        chosen = np.linspace(0, len(sequences) - 1, self.counts[split]).round().astype(int)
        return FixedClips(
            np.stack(
                [
                    videos[video][start :: h.frame_step][: h.frames]
                    for video, start in map(sequences.__getitem__, chosen)
                ]
            )
        )

    def read(self) -> dict[str, list[np.ndarray]] | None:
        """Return the videos of each split, or None for the stand-in, and set ``data_name``."""
        h, highway = self.hparams, Path(self.hparams.root) / "highway"
        found = _videos(Path(h.root) / "video" / "highway")
        if h.video:
            paths = _videos(Path(h.video)) or [Path(h.video)]
        elif h.source == "auto" and found and not self.present:
            paths = found
        elif self.use_papers_data("the authors' highway recording", highway, STAND_IN):
            train, test = (
                driving.read_highway(highway / f"highwayDriving_{split}.h5", ["highway_L"])[0]
                for split in ("train", "test")
            )
            cut = len(train) * 9 // 10
            return {"train": [train[:cut]], "val": [train[cut:]], "test": [test]}
        else:
            return None
        self.data_name = ", ".join(path.name for path in paths)
        splits: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
        for path in paths:
            frames = driving.read_drive(path)
            cuts = len(frames) * 8 // 10, len(frames) * 9 // 10
            for split, part in zip(splits, np.split(frames, cuts), strict=True):
                if not _sequences([part], h.frames, h.frame_step):
                    raise InputError(
                        f"{path} has {len(frames)} frames, but a tenth of them must hold a sequence of {h.frames} at "
                        f"data.frame_step {h.frame_step}: give a longer video or lower these"
                    )
                splits[split].append(part)
        return splits


def _sequences(videos: list[np.ndarray], frames: int, frame_step: int) -> list[tuple[int, int]]:
    """Return the video and the first frame of every sequence of ``frames`` frames."""
    reach = (frames - 1) * frame_step
    return [(i, start) for i, video in enumerate(videos) for start in range(len(video) - reach)]


def _videos(folder: Path) -> list[Path]:
    """Return the paths of the videos in a folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.suffix.lower() in (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")]
