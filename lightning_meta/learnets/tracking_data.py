"""Triplets of exemplar, search and label from videos with boxes (Bertinetto et al. 2016, section 4.2), and test videos.

Shapes: B triplets; S the side of a search in pixels.
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

from lightning_meta.command_options import Numbers
from lightning_meta.errors import InputError
from lightning_meta.learnets.tracker import EXEMPLAR_SIZE, context_side, crops
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.segments import Key, Segment
from lightning_meta.seeding import generator, shuffled
from lightning_meta.sources import tracks, video_files
from lightning_meta.sources.tracks import Track

SEEDS = {"val": 10**6, "test": 10**6 + 1}  # of the drawn videos
EVALUATION_SHIFT = 48  # pixels that the object may lie from the centre of a search in validation and test
# Random changes of training pictures: stretch along x and y and shift in pixels along x and y, which are those of the
# authors' later tracker; brightness that is added, factors of contrast and saturation.
LOWEST = np.array([0.95, 0.95, -4, -4, -0.1, 0.8, 0.0], np.float32)
HIGHEST = np.array([1.05, 1.05, 4, 4, 0.1, 1.2, 1.2], np.float32)


class Triplets(NamedTuple):
    """B exemplars, each with a search."""

    exemplars: Tensor  # (B, 3, 127, 127), from 0 to 1; uint8 as the loader brings them
    searches: Tensor  # (B, 3, S, S), likewise
    label: Tensor  # (B,): +1 where the search shows the exemplar's object, else -1
    offset: Tensor  # (B, 2): of the object's centre from the search's, pixels to the right and downwards
    changes: Tensor | None  # (B, 2, 7), of exemplar and search; None: they stay as they are
    segment: Segment

    @classmethod
    def collate(cls, samples: list[tuple[list[Any], Segment]]) -> "Triplets":
        """Joins samples of ``TripletSet``."""
        columns = [
            None if column[0] is None else torch.from_numpy(np.stack(column))
            for column in zip(*(values for values, _ in samples), strict=True)
        ]
        return cls(*columns, samples[0][1])

    def ready(self) -> "Triplets":
        """From bytes to numbers, with the changes made."""
        dtype = self.offset.dtype
        exemplars, searches = self.exemplars.to(dtype) / 255, self.searches.to(dtype) / 255
        if self.changes is None:
            return self._replace(exemplars=exemplars, searches=searches)
        for_z, for_x = self.changes.unbind(1)
        return self._replace(
            exemplars=changed(exemplars, for_z),
            searches=changed(searches, for_x),
            offset=self.offset * for_x[:, :2] + for_x[:, 2:4],
            changes=None,
        )


def changed(pictures: Tensor, changes: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) stretched about their centre and shifted, with other colours, by ``changes`` (B, 7)."""
    stretch, shift, (brightness, contrast, saturation) = changes[:, :2], changes[:, 2:4], changes[:, 4:].T
    centre = (pictures.shape[-1] - 1) / 2
    matrix = torch.cat([torch.diag_embed(stretch), (centre * (1 - stretch) + shift)[..., None]], 2)
    pictures = warp_affine(pictures, matrix, pictures.shape[-2:], padding_mode="border")
    pictures = adjust_saturation_with_gray_subtraction(pictures, saturation)
    return adjust_brightness(adjust_contrast_with_mean_subtraction(pictures, contrast), brightness)


class TripletSet(Dataset[tuple[list[Any], Segment]]):
    """Triplets: sample `i` is a function of (seed, split, i).

    Args:
        videos: Where they come from; each in turn, in a shuffled order, gives an exemplar.
        split: Which random numbers.
        seed: Of the random numbers.
        search_size: S.
        shift: Pixels of a search that the object may lie from its centre, along x and y.
        positives: Share of searches that show the exemplar's object; the others show another video's.
        max_distance: Frames of the object between exemplar and search, at most.
        augment: Bring random changes.

    Raises:
        InputError: Where there are too few videos.
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
            raise InputError(f"{len(videos)} videos for {split}: negatives come from another one, give at least 2")
        self.videos, self.key = videos, (seed, SPLITS[split])
        self.search_size, self.shift, self.positives = search_size, shift, positives
        self.max_distance, self.augment = max_distance, augment

    def __getitem__(self, key: Key) -> tuple[list[Any], Segment]:
        index, segment = key
        random = generator(*self.key, index)
        place = shuffled(index, len(self.videos), *self.key)
        video, frames = self._video(place)
        i = random.integers(len(frames))
        exemplar = cut(video, frames[i], np.zeros(2), EXEMPLAR_SIZE)
        positive = random.random() < self.positives
        if positive:
            j = random.integers(max(0, i - self.max_distance), min(len(frames), i + self.max_distance + 1))
        else:
            video, frames = self._video((place + random.integers(1, len(self.videos))) % len(self.videos))
            j = random.integers(len(frames))
        offset = random.uniform(-self.shift, self.shift, 2).astype(np.float32)
        search = cut(video, frames[j], offset, self.search_size)
        changes = random.uniform(LOWEST, HIGHEST, (2, 7)).astype(np.float32) if self.augment else None
        return [exemplar, search, np.float32(1 if positive else -1), offset, changes], segment

    def _video(self, place: int) -> tuple[Track, list[int]]:
        """A video and its frames with a box."""
        video = self.videos[place]
        return video, known(video).nonzero()[:, 0].tolist()


def known(video: Track) -> Tensor:
    """Whether the object's place is known in each frame, (T,)."""
    return ~video.boxes.isnan().any(1)


def cut(video: Track, t: int, offset: np.ndarray, size: int) -> np.ndarray:
    """A crop at the scale of exemplars, uint8 (3, size, size), with the object ``offset`` pixels from its centre."""
    left, top, width, height = video.boxes[t].tolist()
    scale = context_side(width, height) / EXEMPLAR_SIZE
    centre = [left + width / 2 - scale * offset[0], top + height / 2 - scale * offset[1]]
    return (crops(video.frame(t), centre, [scale * size], size)[0] * 255).round().to(torch.uint8).numpy()


class Film(NamedTuple):
    """A video to follow an object through."""

    name: str
    frames: Callable[[], Iterator[Tensor]]  # begins anew at each call
    box: Tensor  # (4,), in the first frame


def own_film(path: str, box: list[float] | None) -> Film:
    """A user's video and box.

    Raises:
        InputError: Where there is no box, it does not lie in the first frame, or the video cannot be read.
    """
    if box is None:
        raise InputError("no box: say where the object is in the first frame, --data.box left,top,width,height")
    first = next(video_files.read_frames(path))
    return Film(Path(path).stem, partial(video_files.read_frames, path), tracks.own_box(box, *first.shape[1:]))


def film(video: Track) -> Film:
    """A test video, from the first frame whose box is known."""
    start = int(known(video).nonzero()[0])
    return Film(video.name.replace("/", "_"), lambda: map(video.frame, range(start, len(video))), video.boxes[start])


class Layout(NamedTuple):
    """A data set to train on."""

    name: str
    there: Callable[[str], bool]
    read: Callable[[str], list[Track]]


LAYOUTS = {
    "vid": Layout("ImageNet VID", tracks.has_imagenet_vid, tracks.imagenet_vid),
    "got10k": Layout("GOT-10k", tracks.has_got10k, tracks.got10k),
}


class TrackingDataModule(MetaDataModule):
    """Videos with boxes to train a tracker on, sequences to test it on, and a video of the user's for ``predict``.

    A tenth of the training videos is set aside to validate on. In validation and test the object lies anywhere within
    48 pixels of the centre of a search, so that a tracker that always says "the centre" is wrong.

    Args:
        root: Folder with ``ILSVRC2015/`` or ``GOT-10k/``, and with ``tracking/``, the test sequences.
        source: ``paper`` insists on the videos of ``layout`` and on test sequences; ``stand-in`` draws textured objects
            that move over photographs; ``auto`` takes what lies there.
        layout: ``vid``, ImageNet's videos (paper), or ``got10k``.
        sequences: Folder of test sequences as VOT's or OTB's. None: ``tracking/`` below the root.
        video: What ``predict`` follows an object through: an MP4, a GIF or a folder of pictures. None: test videos.
        box: Where that object is in its first frame: left, top, width, height in pixels.
        batch_size: Triplets a process and step.
        search_size: Side of a search in training and validation, in pixels; in the test it is 255.
        shift: Pixels that the object may lie from the centre of a training search (paper: 0).
        positives: Share of training searches that show the object (paper: 0.75).
        max_distance: Frames between exemplar and search, at most.
        augment: Stretch, shift and recolour training pictures (the paper does not say).
        train_videos: How many to draw for training, where they are drawn.
        test_videos: How many to draw for the test; for validation too.
        test_frames: Frames of each of these.
        val_triplets: To validate on.
        test_triplets: To test on.
        predict_videos: Test videos that ``predict`` follows where there is none of the user's.
        num_workers: Processes that cut triplets; 0 cuts them in the training process.
        seed: Of the training triplets.

    Raises:
        InputError: Where files are missing or damaged, or the box does not lie in the video.
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
                train, val = by_video(layout.read(h.root))
            else:
                train, val = self._drawn(h.train_videos, h.seed), self._drawn(h.test_videos, SEEDS["val"])
            shared = {"search_size": h.search_size, "positives": h.positives, "max_distance": h.max_distance}
            self.sets["train"] = TripletSet(train, "train", h.seed, shift=h.shift, augment=h.augment, **shared)
            self.sets["val"] = TripletSet(val, "val", **shared)
        if stage == "predict" and h.video:
            self.films = [own_film(h.video, h.box)]
            return
        folder = Path(h.sequences or Path(h.root, "tracking"))
        if h.sequences or h.source == "paper" or (h.source == "auto" and folder.is_dir()):
            self.test_videos = tracks.sequences(folder)
            self.test_name = f"{len(self.test_videos)} sequences of {folder.resolve().name}/"
        else:
            self.test_videos = self._drawn(h.test_videos, SEEDS["test"], h.test_frames)
            self.test_name = f"{h.test_videos} videos drawn for the test"
        self.sets["test"] = TripletSet(self.test_videos, "test")
        self.films = [film(video) for video in self.test_videos[: h.predict_videos]]

    def _drawn(self, videos: int, seed: int, frames: int = 60) -> list[Track]:
        return [tracks.moving_objects(i, seed, frames) for i in range(videos)]

    def test_dataloader(self) -> list[DataLoader]:
        """Triplets, and the numbers of the test videos."""
        return [super().test_dataloader(), self._numbers(self.test_videos)]

    def predict_dataloader(self) -> DataLoader:
        """The numbers of the films."""
        return self._numbers(self.films)

    def _numbers(self, videos: list[Any]) -> DataLoader:
        return DataLoader(range(self.trainer.global_rank, len(videos), self.trainer.world_size), batch_size=None)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.ready() if isinstance(batch, Triplets) else batch


def by_video(videos: list[Track]) -> tuple[list[Track], list[Track]]:
    """Nine tenths to train on and a tenth to validate on; all objects of one film are on one side."""

    def source(video: Track) -> str:
        return video.name.rpartition("/")[0] or video.name

    held_out = set(sorted({source(video) for video in videos})[::10])
    train, val = ([v for v in videos if known(v).any() and (source(v) in held_out) == held] for held in (False, True))
    return train, val
