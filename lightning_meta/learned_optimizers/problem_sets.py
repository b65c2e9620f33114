"""Endless sets of inner problems, in which every problem is a function of its number.

Shapes: B problems of n coordinates each; minibatches of M images.
"""

from typing import NamedTuple

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.problems import Classification, Quadratics
from lightning_meta.learned_optimizers.unroll import Problems
from lightning_meta.running.data_module import SPLITS
from lightning_meta.running.segments import Key, Segment, evaluation_keys
from lightning_meta.sources.arrays import open_npz
from lightning_meta.sources.seeding import generator


class DrawnProblems(NamedTuple):
    """A batch from a loader. ``ProblemSet.problems`` makes B problems of it on the device."""

    set_name: str
    arrays: tuple[Tensor, ...]  # (B, ...) each
    start: Tensor  # theta_0, (B, n)
    scale: Tensor | None  # (B, n)
    segment: Segment


class ProblemSet(Dataset[tuple[list[np.ndarray], Segment]]):
    """An endless set of problems; problem i is a function of (seed, split, i).

    Args:
        name: The split (``train``, ``val``, ``test``, ``tune`` or ``predict``), alone or before a slash.
        seed: Seed of the training problems; the problems of other splits do not depend on it.
        coordinates: Number n of coordinates of a problem.
        start_std: Standard deviation of theta_0. None if a subclass overrides ``draw_start``.
        scaling: Width r of the random scaling: each coordinate is stretched by exp(u), u uniform in [-r, r].
    """

    def __init__(self, name: str, seed: int, coordinates: int, start_std: float | None, scaling: float = 0.0):
        split = name.split("/")[0]
        self.name, self.key = name, (seed if split == "train" else 0, SPLITS[split])
        self.coordinates, self.start_std, self.scaling = coordinates, start_std, scaling

    def __getitem__(self, key: Key) -> tuple[list[np.ndarray], Segment]:
        index, segment = key
        random = generator(*self.key, index)
        start = self.draw_start(random)
        # Lv et al. 2017: f(c * theta) from theta_0 / c is the same problem in other units
        scale = np.exp(random.uniform(-self.scaling, self.scaling, self.coordinates)) if self.scaling else None
        start, scale = (start, []) if scale is None else (start / scale, [scale.astype(np.float32)])
        return [start.astype(np.float32), *scale, *self.draw(random, segment)], segment

    def draw_start(self, random: np.random.Generator) -> np.ndarray:
        """Draw theta_0, (n,)."""
        return self.start_std * random.standard_normal(self.coordinates)

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        """Draw the arrays that define a problem besides theta_0."""
        raise NotImplementedError

    def problems(self, drawn: DrawnProblems) -> Problems:
        """Make problems of a batch, on its device."""
        raise NotImplementedError

    def collate(self, samples: list[tuple[list[np.ndarray], Segment]]) -> DrawnProblems:
        """Join samples of one segment."""
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*(s for s, _ in samples), strict=True)]
        start, *arrays = columns
        scale = arrays.pop(0) if self.scaling else None
        return DrawnProblems(self.name, tuple(arrays), start, scale, samples[0][1])

    def batch(self, count: int, steps: int, like: Tensor) -> Problems:
        """Return the first ``count`` problems with all their steps, on the device and in the dtype of ``like``."""
        drawn = self.collate([self[key] for key in evaluation_keys(count, steps)])
        return self.problems(
            apply_to_collection(drawn, Tensor, lambda x: x.to(like) if x.is_floating_point() else x.to(like.device))
        )


class QuadraticSet(ProblemSet):
    """Quadratics whose W and y have independent entries: normal, or uniform in [0, 1] as in the authors' code."""

    def __init__(self, name: str, seed: int, dimension: int, entries: str, start_std: float, scaling: float = 0.0):
        super().__init__(name, seed, dimension, start_std, scaling)
        self.entries = entries

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        n = self.coordinates
        draw = random.standard_normal if self.entries == "normal" else random.random
        return [draw((n, n)).astype(np.float32), draw(n).astype(np.float32)]

    def problems(self, drawn: DrawnProblems) -> Quadratics:
        return Quadratics(*drawn.arrays, drawn.start, drawn.scale, drawn.segment)


class OneQuadratic(QuadraticSet):
    """A user's quadratic from many starting points.

    Args:
        name: As for ``ProblemSet``.
        path: An ``.npz`` file with W (n, n) and y (n,).
        start_std: Standard deviation of theta_0.

    Raises:
        InputError: If the file cannot be read, or the arrays have other shapes or are not finite.
    """

    def __init__(self, name: str, path: str, start_std: float):
        try:
            with open_npz(path) as arrays:
                self.W, self.y = (arrays[key].astype(np.float32, casting="same_kind") for key in ("W", "y"))
        except Exception as error:  # for a damaged file NumPy can raise any exception
            reason = f"is not an .npz file with arrays W and y ({error})"
            raise InputError(f"{path} {reason}: save one with np.savez") from error
        if self.y.ndim != 1 or self.W.shape != (len(self.y), len(self.y)) or not len(self.y):
            raise InputError(f"{path}: W has shape {self.W.shape} and y {self.y.shape}: save (n, n) and (n,)")
        if not np.isfinite(self.W).all() or not np.isfinite(self.y).all():
            raise InputError(f"{path}: W or y has values that are not finite: save finite ones")
        super().__init__(name, 0, len(self.y), "normal", start_std)

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        return [self.W, self.y]


class ClassificationSet(ProblemSet):
    """Networks with random initial weights, each with its own minibatches; all images stay on the device."""

    def __init__(
        self,
        name: str,
        seed: int,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        minibatch: int,
        start_std: float,
        scaling: float = 0.0,
    ):
        super().__init__(name, seed, sum(p.numel() for p in network.parameters()), start_std, scaling)
        self.network, self.images, self.labels, self.minibatch = network, images, labels, minibatch

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        indices = random.integers(len(self.images), size=(segment.stop + 1, self.minibatch))
        return [indices[segment.start :]]  # drawn from step 0 on, so that step t has one minibatch in all segments

    def problems(self, drawn: DrawnProblems) -> Classification:
        self.images, self.labels = self.images.to(drawn.start.device), self.labels.to(drawn.start.device)
        return Classification(
            self.network, self.images, self.labels, *drawn.arrays, drawn.start, drawn.scale, drawn.segment
        )
