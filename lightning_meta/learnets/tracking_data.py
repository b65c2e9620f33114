"""Training triplets (exemplar, search, label) and test videos for tracking (Bertinetto et al. 2016, section 4.2).

Shapes: B triplets; S pixels along a side of a search.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from kornia.enhance import (
    adjust_brightness,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)
from kornia.geometry.transform import warp_affine
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.learnets.tracker import EXEMPLAR_SIZE, context_side, crops
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.options import Numbers
from lightning_meta.running.segments import Key, Segment
from lightning_meta.sources import tracks, video_files
from lightning_meta.sources.seeding import generator, shuffled
from lightning_meta.sources.tracks import Track

SEEDS = {"val": 10**6, "test": 10**6 + 1}  # of the generated videos
EVALUATION_SHIFT = 48  # largest offset in pixels, along x and y, of the object in validation and test searches
# Ranges of augmentation: stretch along x and y and shift in pixels along x and y (both as in the authors' later
# tracker), added brightness, factors of contrast and saturation.
LOWEST = np.array([0.95, 0.95, -4, -4, -0.1, 0.8, 0.0], np.float32)
HIGHEST = np.array([1.05, 1.05, 4, 4, 0.1, 1.2, 1.2], np.float32)


class Triplets(NamedTuple):
    """A batch of exemplars, each with a search."""

    exemplars: Tensor  # (B, 3, 127, 127), uint8 from the loader, float from 0 to 1 after ``prepare``
    searches: Tensor  # (B, 3, S, S), likewise
    label: Tensor  # (B,): +1 if the search shows the exemplar's object, else -1
    offset: Tensor  # (B, 2): from the search's centre to the object's, in pixels to the right and downwards
    changes: Tensor | None  # (B, 2, 7): augmentation of exemplar and search; None: no augmentation
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[list[Any], Segment]]) -> "Triplets":
        """Join samples of ``TripletSet``."""
        columns = [
            None if column[0] is None else torch.from_numpy(np.stack(column))
            for column in zip(*(values for values, _ in samples), strict=True)
        ]
        return cls(*columns, samples[0][1])

    def prepare(self) -> "Triplets":
        """Convert images to float and augment them."""
        dtype = self.offset.dtype
        exemplars, searches = self.exemplars.to(dtype) / 255, self.searches.to(dtype) / 255
        if self.changes is None:
            return self._replace(exemplars=exemplars, searches=searches)
        for_z, for_x = self.changes.unbind(1)
        return self._replace(
            exemplars=augment(exemplars, for_z),
            searches=augment(searches, for_x),
            offset=self.offset * for_x[:, :2] + for_x[:, 2:4],
            changes=None,
        )


def augment(images: Tensor, changes: Tensor) -> Tensor:
    """Stretch, shift and recolour images (B, 3, S, S) by ``changes`` (B, 7), see ``LOWEST``."""
    stretch, shift, (brightness, contrast, saturation) = changes[:, :2], changes[:, 2:4], changes[:, 4:].T
    centre = (images.shape[-1] - 1) / 2
    matrix = torch.cat([torch.diag_embed(stretch), (centre * (1 - stretch) + shift)[..., None]], 2)
    images = warp_affine(images, matrix, images.shape[-2:], padding_mode="border")
    images = adjust_saturation_with_gray_subtraction(images, saturation)
    return adjust_brightness(adjust_contrast_with_mean_subtraction(images, contrast), brightness)


class TripletSet(Dataset[tuple[list[Any], Segment]]):
    """Random triplets. Sample `i` is a function of (seed, split, i).

    Args:
        videos: Videos to sample from. Each gives an exemplar in turn, in shuffled order.
        split: ``train``, ``val`` or ``test``; each has random numbers of its own.
        seed: Seed of the random numbers.
        search_size: S.
        shift: Largest distance in pixels, along x and y, of the object from the centre of its search.
        positives: Share of searches that show the exemplar's object. The others show an object of another video.
        max_distance: Largest number of frames between exemplar and search, counting frames that show the object.
        augment: Sample augmentations.

    Raises:
        InputError: If there are too few videos.
    """

    def __init__(
        self,
        videos: list[Track],
        split: str,
        seed: int = 0,
        search_size: int = 255,
        shift: float = EVALUATION_SHIFT,
        positives: float = 1.0,
        max_distance: int = 50,
        augment: bool = False,
    ):
        if len(videos) < (1 if positives == 1 else 2):
            raise InputError(f"{len(videos)} videos for {split}: negatives need another video, so give at least 2")
        self.videos, self.key = videos, (seed, SPLITS[split])
        self.search_size, self.shift, self.positives = search_size, shift, positives
        self.max_distance, self.augment = max_distance, augment

    def __getitem__(self, key: Key) -> tuple[list[Any], Segment]:
        index, segment = key
        random = generator(*self.key, index)
        place = shuffled(index, len(self.videos), *self.key)
        video, frames = self._video(place)
        i = random.integers(len(frames))
        exemplar = object_crop(video, frames[i], np.zeros(2), EXEMPLAR_SIZE)
        positive = random.random() < self.positives
        if positive:
            j = random.integers(max(0, i - self.max_distance), min(len(frames), i + self.max_distance + 1))
        else:
            video, frames = self._video((place + random.integers(1, len(self.videos))) % len(self.videos))
            j = random.integers(len(frames))
        offset = random.uniform(-self.shift, self.shift, 2).astype(np.float32)
        search = object_crop(video, frames[j], offset, self.search_size)
        changes = random.uniform(LOWEST, HIGHEST, (2, 7)).astype(np.float32) if self.augment else None
        return [exemplar, search, np.float32(1 if positive else -1), offset, changes], segment

    def _video(self, place: int) -> tuple[Track, list[int]]:
        """Return a video and the numbers of its frames with a box."""
        video = self.videos[place]
        return video, has_box(video).nonzero()[:, 0].tolist()


def has_box(video: Track) -> Tensor:
    """Return whether each frame has a box, (T,)."""
    return ~video.boxes.isnan().any(1)


def object_crop(video: Track, t: int, offset: np.ndarray, size: int) -> np.ndarray:
    """Cut a crop at the scale of exemplars, uint8 (3, size, size), with the object ``offset`` pixels off its centre."""
    left, top, width, height = video.boxes[t].tolist()
    scale = context_side(width, height) / EXEMPLAR_SIZE
    centre = [left + width / 2 - scale * offset[0], top + height / 2 - scale * offset[1]]
    return (crops(video.frame(t), centre, [scale * size], size)[0] * 255).round().to(torch.uint8).numpy()


class VideoToTrack(NamedTuple):
    """A video for ``predict``, and the object's box in its first frame."""

    name: str
    frames: Callable[[], Iterator[Tensor]]  # each call starts at the first frame
    box: Tensor  # (4,)


def own_video(path: str, box: list[float] | None) -> VideoToTrack:
    """Open a user's video.

    Raises:
        InputError: If there is no box, it lies outside the first frame, or the video cannot be read.
    """
    if box is None:
        raise InputError("data.box is not set: give the first frame's box with --data.box left,top,width,height")
    first = next(video_files.read_frames(path))
    return VideoToTrack(Path(path).stem, partial(video_files.read_frames, path), tracks.own_box(box, *first.shape[1:]))


def from_first_box(video: Track) -> VideoToTrack:
    """Start a test video at its first frame with a box."""
    start = int(has_box(video).nonzero()[0])
    frames = partial(map, video.frame, range(start, len(video)))
    return VideoToTrack(video.name.replace("/", "_"), frames, video.boxes[start])


class TrainingVideos(NamedTuple):
    """A data set to train on."""

    name: str
    there: Callable[[str], bool]
    read: Callable[[str], list[Track]]


LAYOUTS = {
    "vid": TrainingVideos("ImageNet VID", tracks.has_imagenet_vid, tracks.imagenet_vid),
    "got10k": TrainingVideos("GOT-10k", tracks.has_got10k, tracks.got10k),
}


class TrackingDataModule(MetaDataModule):
    """Videos with boxes to train and test a tracker, and the user's own video for ``predict``.

    A tenth of the training videos is used for validation. In validation and test the object lies up to 48 pixels from
    the centre of a search along x and y, so that a tracker that always predicts the centre has errors.

    Args:
        root: Folder that contains ``ILSVRC2015/`` or ``GOT-10k/``, and ``tracking/`` with the test sequences.
        source: ``paper`` (the videos of ``layout`` and the test sequences, both required), ``stand-in`` (generated
            videos of textured objects that move over photographs) or ``auto`` (each of the two if it is in ``root``,
            else generated).
        layout: Training videos: ``vid`` (ImageNet VID; paper) or ``got10k`` (GOT-10k).
        sequences: Folder of test sequences in the format of VOT or OTB. None: ``tracking/`` in ``root``.
        video: Video for ``predict``: an MP4, a GIF or a folder of images. None: test videos.
        box: Box of the object in the first frame of ``video``: left, top, width, height in pixels.
        batch_size: Number of triplets of each process in each step.
        search_size: Side of a search in training and validation, in pixels; it is 255 in the test.
        shift: Largest distance of the object from the centre of a training search, in pixels along x and y (paper: 0).
        positives: Share of training searches that show the object (paper: 0.75).
        max_distance: Largest number of frames between exemplar and search.
        augment: Stretch, shift and recolour training images (the paper does not say).
        train_videos: Number of generated videos for training.
        test_videos: Number of generated videos for the test, and for validation.
        test_frames: Number of frames of each generated test video.
        val_triplets: Number of triplets to validate on.
        test_triplets: Number of triplets to test on.
        predict_videos: Number of test videos that ``predict`` tracks if ``video`` is not set.
        num_workers: Number of processes that cut triplets; 0 cuts them in the training process.
        seed: Seed of the training triplets and of the generated training videos.

    Raises:
        InputError: If files are missing or damaged, or the box lies outside the video.
    """

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        layout: Literal["vid", "got10k"] = "vid",
        sequences: str | None = None,
        video: str | None = None,
        box: Numbers | None = None,
        batch_size: int = 8,
        search_size: Literal[239, 255] = 255,
        shift: float = EVALUATION_SHIFT,
        positives: float = 0.75,
        max_distance: int = 50,
        augment: bool = True,
        train_videos: int = 300,
        test_videos: int = 12,
        test_frames: int = 60,
        val_triplets: int = 96,
        test_triplets: int = 256,
        predict_videos: int = 2,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    collate = staticmethod(Triplets.collate)

    @property
    def present(self) -> bool:
        return LAYOUTS[self.hparams.layout].there(self.hparams.root)

    def make_sets(self, stage: str) -> None:
        h, layout = self.hparams, LAYOUTS[self.hparams.layout]
        official = self.use_papers_data(layout.name, h.root, f"drawn videos, a stand-in for {layout.name}")
        self.counts = {"val": h.val_triplets, "test": h.test_triplets}
        if stage in ("fit", "validate"):
            if official:
                train, val = split_by_video(layout.read(h.root))
            else:
                train, val = self._drawn(h.train_videos, h.seed), self._drawn(h.test_videos, SEEDS["val"])
            shared = {"search_size": h.search_size, "positives": h.positives, "max_distance": h.max_distance}
            self.sets["train"] = TripletSet(train, "train", h.seed, shift=h.shift, augment=h.augment, **shared)
            self.sets["val"] = TripletSet(val, "val", **shared)
        if stage == "predict" and h.video:
            self.videos_to_track = [own_video(h.video, h.box)]
            return
        folder = Path(h.sequences or Path(h.root, "tracking"))
        if h.sequences or h.source == "paper" or (h.source == "auto" and folder.is_dir()):
            self.test_videos = tracks.sequences(folder)
            self.test_name = f"{len(self.test_videos)} sequences of {folder.resolve().name}/"
        else:
            self.test_videos = self._drawn(h.test_videos, SEEDS["test"], h.test_frames)
            self.test_name = f"{h.test_videos} videos drawn for the test"
        self.sets["test"] = TripletSet(self.test_videos, "test")
        self.videos_to_track = [from_first_box(video) for video in self.test_videos[: h.predict_videos]]

    def _drawn(self, videos: int, seed: int, frames: int = 60) -> list[Track]:
        return [tracks.moving_objects(i, seed, frames) for i in range(videos)]

    def test_dataloader(self) -> list[DataLoader]:
        """Return the loaders of the triplets and of the test videos' numbers."""
        return [super().test_dataloader(), self._numbers(self.test_videos)]

    def predict_dataloader(self) -> DataLoader:
        """Return a loader of the numbers of ``videos_to_track``."""
        return self._numbers(self.videos_to_track)

    def _numbers(self, videos: list[Any]) -> DataLoader:
        return DataLoader(range(self.trainer.global_rank, len(videos), self.trainer.world_size), batch_size=None)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.prepare() if isinstance(batch, Triplets) else batch


def split_by_video(videos: list[Track]) -> tuple[list[Track], list[Track]]:
    """Split into nine tenths for training and one for validation. All objects of a video are on the same side."""

    def source(video: Track) -> str:
        return video.name.rpartition("/")[0] or video.name

    held_out = set(sorted({source(video) for video in videos})[::10])
    train, val = ([v for v in videos if has_box(v).any() and (source(v) in held_out) == held] for held in (False, True))
    return train, val
