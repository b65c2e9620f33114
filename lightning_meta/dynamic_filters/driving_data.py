"""Driving video (De Brabandere et al. 2016, section 4.2), and videos of the user's own.

Shapes: T frames of 64x64 pixels; one grey channel; values in [0, 1] once they are in a batch.
"""

from pathlib import Path

import numpy as np

from lightning_meta.dynamic_filters.moving_mnist_data import ClipDataModule, DrawnClips, FixedClips
from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, Source
from lightning_meta.seeding import generator
from lightning_meta.sources import driving, image_files

STAND_IN = "drives over bundled photographs, a stand-in for driving video"


class RandomWindows(DrawnClips):
    """Pieces of videos from anywhere in them: which piece is a function of (seed, split, i).

    Args:
        videos: uint8 (T, 64, 64) each.
        split: Of ``SPLITS``.
        seed: Of the pieces.
        frame_step: Take every so-many-th frame.
    """

    def __init__(self, videos: list[np.ndarray], split: str, seed: int, frame_step: int = 1):
        self.videos, self.key, self.frame_step = videos, (seed, SPLITS[split]), frame_step

    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, None]:
        pieces = _pieces(self.videos, frames, self.frame_step)
        if not pieces:
            raise InputError(
                f"the longest video to train on has {max(map(len, self.videos))} frames, a sequence {frames} at "
                f"data.frame_step {self.frame_step}: give a longer one, or lower schedule.horizon"
            )
        video, start = pieces[generator(*self.key, index).integers(len(pieces))]
        return self.videos[video][start :: self.frame_step][:frames], None


class DrawnDrives(DrawnClips):
    """The stand-in: drive `i` is a function of (seed, split, i)."""

    def __init__(self, photographs: list[np.ndarray], split: str, seed: int, with_flow: bool = False):
        self.photographs, self.key, self.with_flow = photographs, (seed, SPLITS[split]), with_flow

    def sequence(self, index: int, frames: int) -> tuple[np.ndarray, np.ndarray | None]:
        random = generator(*self.key, index)
        photograph = self.photographs[random.integers(len(self.photographs))]
        seen, flow = driving.drawn_drive(photograph, frames, random)
        return seen, flow if self.with_flow else None


class DrivingVideoDataModule(ClipDataModule):
    """Grey driving video of 64x64 pixels, 3 frames to see and 3 to predict; or a video to predict from.

    Of every video the first 80 % are to train on, the next 10 % to validate on and the last 10 % to test on; of the
    authors' training file the last 10 % are to validate on, and their test file is to test on. Validation and test take
    pieces at equal distances, every one where nothing else is said.

    Args:
        root: Folder with ``highway/highwayDriving_{train,test}.h5``, or with videos in ``video/highway/``.
        source: ``paper`` insists on the authors' files; ``stand-in`` takes drives over photographs that come with
            installed packages; ``auto`` takes the authors' files, else the videos in ``video/highway/``, else the
            stand-in.
        video: Train and test on this instead: a video, an animated GIF or a folder of pictures of any size, or a folder
            of videos.
        clip: What ``predict`` goes on from, of any size, as ``video`` but one. None: test sequences.
        batch_size: Sequences a process and step.
        frame_step: Take every so-many-th frame of a video, for one of more frames a second than the authors' 11.
        frames: Frames of a sequence in validation and test, the first of them for the model to see.
        val_sequences: Sequences to validate on, at most.
        test_sequences: Sequences to test on, at most. None: all.
        predict_sequences: Test sequences that ``predict`` continues where there is no clip, at most.
        num_workers: Processes that draw sequences; 0 draws them in the training process.
        seed: Of the training sequences.

    Raises:
        InputError: Where files are missing, damaged or not what they should be, or a video is too short.
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
            found = {name: image_files.grey(picture) for name, picture in image_files.bundled_photographs().items()}
            names = {"train": ("china", "flower"), "val": ("minduka",), "test": ("grace_hopper",)}
            pictures = {split: [found[name] for name in names[split]] for split in names}
            self.sets = {
                "train": DrawnDrives(pictures["train"], "train", h.seed),
                "val": DrawnDrives(pictures["val"], "val", seed=0),
                "test": DrawnDrives(pictures["test"], "test", seed=0, with_flow=True),
            }
            self.test_name = "drives over another photograph"
        else:
            self.sets = {
                "train": RandomWindows(videos["train"], "train", h.seed, h.frame_step),
                "val": self._windows("val", videos["val"], h.val_sequences),
                "test": self._windows("test", videos["test"], h.test_sequences),
            }
            self.counts["predict"] = min(self.counts["predict"], self.counts["test"])
            self.test_name = "later frames"
        self.sets["predict"] = self.sets["test"]
        if stage == "predict" and h.clip:
            self.sets["predict"] = self._windows("predict", [driving.read_drive(h.clip)], h.predict_sequences)

    def _windows(self, split: str, videos: list[np.ndarray], at_most: int | None) -> FixedClips:
        """Every piece of the videos, or so many at equal distances; a video that is too short is one whole."""
        h = self.hparams
        pieces = _pieces(videos, h.frames, h.frame_step) or [(i, 0) for i in range(len(videos))]
        self.counts[split] = min(at_most or len(pieces), len(pieces))
        chosen = np.linspace(0, len(pieces) - 1, self.counts[split]).round().astype(int)
        return FixedClips(
            np.stack(
                [videos[video][start :: h.frame_step][: h.frames] for video, start in map(pieces.__getitem__, chosen)]
            )
        )

    def read(self) -> dict[str, list[np.ndarray]] | None:
        """Frames of each split; None for the stand-in. Sets ``data_name``."""
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
                if not _pieces([part], h.frames, h.frame_step):
                    raise InputError(
                        f"{path} has {len(frames)} frames, a tenth of which is fewer than a sequence of {h.frames} at "
                        f"data.frame_step {h.frame_step}: give a longer video or lower these"
                    )
                splits[split].append(part)
        return splits


def _pieces(videos: list[np.ndarray], frames: int, frame_step: int) -> list[tuple[int, int]]:
    """All sequences of so many frames: which video, and where they start."""
    reach = (frames - 1) * frame_step
    return [(i, start) for i, video in enumerate(videos) for start in range(len(video) - reach)]


def _videos(folder: Path) -> list[Path]:
    """The videos that lie in a folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.suffix.lower() in (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")]
