"""Inner problems for training, validation and test, drawn by their number (Andrychowicz et al. 2016, section 3).

Shapes: B problems of n coordinates each; minibatches of M images.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import center_crop, resize

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.features import Features, load_features, targets
from lightning_meta.learned_optimizers.problems import MLP, Classification, ConvNet, Quadratics, StyleTransfers
from lightning_meta.learned_optimizers.unroll import Problems
from lightning_meta.sampling import Key, Segment, SegmentSampler, evaluation_keys, generator, ignore_interrupts
from lightning_meta.sources import cifar, digits, photos

SPLITS = {"train": 0, "val": 1, "test": 2, "predict": 2, "tune": 3}


class Drawn(NamedTuple):
    """What a loader draws: numbers that ``ProblemSet.problems`` makes B problems of, on the device."""

    set_name: str
    arrays: tuple[Tensor, ...]  # (B, ...) each
    start: Tensor  # theta_0, (B, n)
    scale: Tensor | None  # (B, n)
    segment: Segment


class ProblemSet(Dataset[tuple[list[np.ndarray], Segment]]):
    """An endless supply of problems; number `i` is a function of (seed, split, i).

    Args:
        name: Begins with the split: ``train``, ``val``, ``test`` or ``tune``.
        seed: Of the training problems; the others are the same for every seed.
        coordinates: n.
        start_std: Standard deviation of theta_0. None: a subclass has its own start.
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
        # Lv et al. 2017, section 4.2: f(c * theta) from theta_0 / c is the same problem in other units.
        scale = np.exp(random.uniform(-self.scaling, self.scaling, self.coordinates)) if self.scaling else None
        start, scale = (start, []) if scale is None else (start / scale, [scale.astype(np.float32)])
        return [start.astype(np.float32), *scale, *self.draw(random, segment)], segment

    def draw_start(self, random: np.random.Generator) -> np.ndarray:
        """theta_0, (n,)."""
        return self.start_std * random.standard_normal(self.coordinates)

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        """What else a problem is made of."""
        raise NotImplementedError

    def problems(self, drawn: Drawn) -> Problems:
        """The drawn problems, on the device where ``drawn`` is."""
        raise NotImplementedError

    def collate(self, samples: list[tuple[list[np.ndarray], Segment]]) -> Drawn:
        """Joins samples of one segment."""
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*(s for s, _ in samples), strict=True)]
        start, *arrays = columns
        scale = arrays.pop(0) if self.scaling else None
        return Drawn(self.name, tuple(arrays), start, scale, samples[0][1])

    def batch(self, count: int, steps: int, device: torch.device) -> Problems:
        """The first ``count`` problems, whole."""
        drawn = self.collate([self[key] for key in evaluation_keys(count, steps)])
        move = [None if value is None else value.to(device) for value in (drawn.start, drawn.scale)]
        arrays = tuple(array.to(device) for array in drawn.arrays)
        return self.problems(Drawn(drawn.set_name, arrays, *move, drawn.segment))


class QuadraticSet(ProblemSet):
    """W and y with independent Gaussian entries, or uniform in [0, 1] as in the authors' code."""

    def __init__(self, name: str, seed: int, dimension: int, entries: str, start_std: float, scaling: float = 0.0):
        super().__init__(name, seed, dimension, start_std, scaling)
        self.entries = entries

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        n = self.coordinates
        draw = random.standard_normal if self.entries == "normal" else random.random
        return [draw((n, n)).astype(np.float32), draw(n).astype(np.float32)]

    def problems(self, drawn: Drawn) -> Quadratics:
        return Quadratics(*drawn.arrays, drawn.start, drawn.scale, drawn.segment)


class OneQuadratic(QuadraticSet):
    """A user's W (n, n) and y (n,), from many starting points."""

    def __init__(self, name: str, path: str, start_std: float):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self.W, self.y = (arrays[key].astype(np.float32) for key in ("W", "y"))
        except Exception as error:  # over a damaged file NumPy raises all sorts
            raise InputError(f"{path} is not an .npz file with arrays W and y ({error}): save one with np.savez") from (
                error
            )
        if self.y.ndim != 1 or self.W.shape != (len(self.y), len(self.y)) or not len(self.y):
            raise InputError(f"{path}: W is {self.W.shape} and y {self.y.shape}: they must be (n, n) and (n,)")
        if not np.isfinite(self.W).all() or not np.isfinite(self.y).all():
            raise InputError(f"{path}: W and y must be finite")
        super().__init__(name, 0, len(self.y), "normal", start_std)

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        return [self.W, self.y]


class ClassificationSet(ProblemSet):
    """Networks with random weights, each with minibatches of its own; the images stay on the device."""

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
        indices = random.integers(len(self.images), size=(segment.stop + 1, self.minibatch))  # the same from the start
        return [indices[segment.start :]]

    def problems(self, drawn: Drawn) -> Classification:
        self.images, self.labels = self.images.to(drawn.start.device), self.labels.to(drawn.start.device)
        return Classification(
            self.network, self.images, self.labels, *drawn.arrays, drawn.start, drawn.scale, drawn.segment
        )


class InnerProblems(LightningDataModule):
    """What all experiments of this paper share: which problems are drawn for what.

    Test cases are given by name, each with what differs from the training problems: ``{"two layers": {"hidden": [20,
    20]}}``; ``steps`` differs where an optimizer is run for longer than it was trained for.

    Args:
        batch_size: Inner problems a process and outer step.
        steps: Inner steps in validation and test.
        val_problems: To validate on.
        test_problems: To test on, for each test case.
        tune_problems: Problems from the training data on which the baselines' learning rates are chosen.
        predict_problems: Problems that ``predict`` shows.
        tests: Further test cases by name.
        random_scaling: Width r of the random scaling of coordinates in training (Lv et al. 2017: 3). 0: none.
        num_workers: Processes that draw problems; 0 draws them in the training process.
        seed: Of the training problems.
    """

    unit = "nats"

    def __init__(
        self,
        batch_size: int = 1,
        steps: int = 100,
        val_problems: int = 20,
        test_problems: int = 100,
        tune_problems: int = 8,
        predict_problems: int = 8,
        tests: dict[str, dict[str, Any]] | None = None,
        random_scaling: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.train_batches: SegmentSampler | None = None  # from MetaSchedule
        self.cases = {f"{steps} steps": {}} | (tests or {})
        self.sets: dict[str, ProblemSet] = {}

    def problem_set(self, name: str, **case: Any) -> ProblemSet:
        """The problems of one split, with what a test case has different.

        Raises:
            TypeError: For an option that the problems do not have.
        """
        raise NotImplementedError

    def add_sets(self) -> None:
        """Makes the sets of problems, once the data are there."""
        names = {"train": {}, "val": {}, "predict": {}}
        names |= {f"{split}/{case}": options for case, options in self.cases.items() for split in ("test", "tune")}
        for name, options in names.items():
            options = {option: value for option, value in options.items() if option != "steps"}
            try:
                self.sets[name] = self.problem_set(name, **options)
            except (TypeError, KeyError) as error:
                raise InputError(
                    f"data.tests: {name.split('/')[-1]}: {error}: check the options of this case"
                ) from error

    @property
    def test_samples(self) -> int:
        """How many problems a test result is a mean of."""
        return self.hparams.test_problems

    def case_steps(self, case: str) -> int:
        """Inner steps of a test case."""
        return self.cases[case].get("steps", self.hparams.steps)

    def tuning_problems(self, case: str, device: torch.device) -> Problems:
        """Problems from the training data on which to choose the learning rates of a test case."""
        return self.sets[f"tune/{case}"].batch(self.hparams.tune_problems, self.case_steps(case), device)

    def train_dataloader(self) -> DataLoader:
        if self.train_batches is None:
            raise InputError("no schedule: add lightning_meta.schedule.MetaSchedule to the trainer's callbacks")
        return self._loader("train", batch_sampler=self.train_batches)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("val", self.hparams.val_problems, self.hparams.steps)

    def test_dataloader(self) -> list[DataLoader]:
        return [
            self._evaluation_loader(f"test/{case}", self.hparams.test_problems, self.case_steps(case))
            for case in self.cases
        ]

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("predict", self.hparams.predict_problems, self.hparams.steps)

    def _evaluation_loader(self, name: str, problems: int, steps: int) -> DataLoader:
        keys = evaluation_keys(problems, steps, self.trainer.global_rank, self.trainer.world_size)
        return self._loader(name, sampler=keys, batch_size=self.batch_size)

    def _loader(self, name: str, **order: Any) -> DataLoader:
        return DataLoader(
            self.sets[name],
            **order,
            num_workers=self.hparams.num_workers,
            collate_fn=self.sets[name].collate,
            worker_init_fn=ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Drawn, dataloader_idx: int) -> Problems:
        return self.sets[batch.set_name].problems(batch)


class QuadraticProblems(InnerProblems):
    """Random quadratics of section 3.1; ``predict`` takes one of the user's own.

    Args:
        dimension: n (paper: 10).
        entries: Of W and y: ``normal`` as in the paper, ``uniform`` in [0, 1] as in the authors' code.
        start_std: Standard deviation of theta_0 (authors' code: 0.01).
        problem: What ``predict`` minimises: an ``.npz`` file with W (n, n) and y (n,). None: test problems.
        options: Of ``InnerProblems``.
    """

    unit = "squared error"

    def __init__(
        self,
        dimension: int = 10,
        entries: Literal["normal", "uniform"] = "normal",
        start_std: float = 0.01,
        problem: str | None = None,
        **options,
    ):
        super().__init__(**options)
        self.save_hyperparameters()
        self.data_name = f"random {dimension}-dimensional quadratics, drawn ({entries})"
        self.test_name = "new draws"

    def setup(self, stage: str) -> None:
        self.add_sets()
        if stage == "predict" and self.hparams.problem:
            self.sets["predict"] = OneQuadratic("predict", self.hparams.problem, self.hparams.start_std)

    def problem_set(self, name: str, dimension: int | None = None) -> QuadraticSet:
        h = self.hparams
        scaling = h.random_scaling if name == "train" else 0.0
        return QuadraticSet(name, h.seed, dimension or h.dimension, h.entries, h.start_std, scaling)


class ClassificationProblems(InnerProblems):
    """Small networks that learn to classify images: what ``DigitProblems`` and ``PictureProblems`` share.

    Training problems draw their minibatches from five sixths of the training images, validation problems from the
    rest, test problems from the test images: the data are new there too.
    """

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images (N, C, S, S), uint8, and labels (N,), then test images and labels. Sets ``data_name``."""
        raise NotImplementedError

    def network(self, classes: int, **case: Any) -> nn.Module:
        """The network of a problem, with what a test case has different."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        images, labels, test_images, test_labels = self.read()
        count = len(images) * 5 // 6
        train, val, test = (
            (images[:count], labels[:count]),
            (images[count:], labels[count:]),
            (test_images, test_labels),
        )
        self.splits = {"train": train, "val": val, "tune": train, "test": test, "predict": test}
        self.test_name = "minibatches of the test images"
        self.add_sets()
        self.save_hyperparameters({"data_name": self.data_name})

    def problem_set(self, name: str, labels: list[int] | None = None, **case: Any) -> ClassificationSet:
        h, split = self.hparams, name.split("/")[0]
        images, targets = self.splits[split]
        labels = labels or h.get("labels")
        if labels:
            images, targets = only(images, targets, labels)
        network = self.network(int(targets.max()) + 1, **case)
        scaling = h.random_scaling if split == "train" else 0.0
        return ClassificationSet(name, h.seed, network, images, targets, h.minibatch, h.start_std, scaling)


class DigitProblems(ClassificationProblems):
    """Section 3.2: a small MLP that learns MNIST, or the user's own pictures in grey.

    Args:
        root: Folder with ``MNIST/raw/``.
        source: ``paper`` insists on MNIST; ``stand-in`` takes scikit-learn's 8x8 digits, enlarged; ``auto`` takes
            MNIST where it lies or can be downloaded, else the stand-in.
        download: Whether to fetch MNIST into ``root`` where it is missing.
        pictures: A folder or archive of the user's own: one folder of pictures a class, at best below ``train`` and
            ``test``. They are scaled to 28x28 in grey.
        hidden: Units of each hidden layer (paper: [20]).
        activation: ``sigmoid`` (paper) or ``relu``.
        minibatch: Images of an inner step (paper: 128).
        start_std: Standard deviation of theta_0, weights and biases (authors' code: 0.01). Baselines depend on it: all
            rules start from the same theta_0.
        options: Of ``InnerProblems``.
    """

    def __init__(
        self,
        root: str = "data",
        source: Literal["auto", "paper", "stand-in"] = "auto",
        download: bool = True,
        pictures: str | None = None,
        hidden: list[int] = [20],  # noqa: B006 - never changed
        activation: Literal["sigmoid", "relu"] = "sigmoid",
        minibatch: int = 128,
        start_std: float = 0.01,
        **options,
    ):
        super().__init__(**options)
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        h = self.hparams
        if h.pictures or h.source == "stand-in" or not h.download or digits.has_mnist(h.root):
            return
        with suppress(InputError):  # read says what is missing, or falls back
            digits.download_mnist(h.root)

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.hparams
        if h.pictures:
            self.data_name = f"pictures of {Path(h.pictures).name}, 28x28 in grey"
            train, train_labels, test, test_labels = own_pictures(h.pictures, 28)
            train, test = (images.float().mean(1, keepdim=True).round().to(torch.uint8) for images in (train, test))
            return train, train_labels, test, test_labels
        if h.source == "paper" or (h.source == "auto" and digits.has_mnist(h.root)):
            self.data_name = "MNIST"
            images, labels = digits.mnist(h.root, train=True)
            test, test_labels = digits.mnist(h.root, train=False)
        else:
            self.data_name = "scikit-learn's 8x8 digits, a stand-in for MNIST"
            images, labels = digits.small_digits()
            images, labels, test, test_labels = images[:1400], labels[:1400], images[1400:], labels[1400:]
            if h.source == "auto":
                warn_of_stand_in("MNIST", Path(h.root) / "MNIST" / "raw", self.data_name)
        return images[:, None], labels, test[:, None], test_labels

    def network(self, classes: int, hidden: list[int] | None = None, activation: str | None = None) -> MLP:
        return MLP(28 * 28, hidden or self.hparams.hidden, classes, activation or self.hparams.activation)


class PictureProblems(ClassificationProblems):
    """Section 3.3: a small convolutional network that learns CIFAR-10, or the user's own pictures.

    Args:
        root: Folder with ``cifar-10-batches-py/`` or ``cifar-10-python.tar.gz``.
        source: ``paper`` insists on CIFAR-10; ``stand-in`` takes coloured digits over patches of photographs;
            ``auto`` takes CIFAR-10 where it lies or can be downloaded, else the stand-in.
        download: Whether to fetch CIFAR-10 into ``root`` where it is missing.
        pictures: A folder or archive of the user's own: one folder of pictures a class, at best below ``train`` and
            ``test``. They are scaled to 32x32.
        labels: The classes to take, renumbered from 0; none: all. With those that the test cases leave out, this is
            the paper's LSTM-sub.
        channels: Of each convolution (authors' code: 16).
        minibatch: Images of an inner step (authors' code: 128).
        start_std: Standard deviation of theta_0 (authors' code: 0.01).
        options: Of ``InnerProblems``.
    """

    def __init__(
        self,
        root: str = "data",
        source: Literal["auto", "paper", "stand-in"] = "auto",
        download: bool = True,
        pictures: str | None = None,
        labels: list[int] | None = None,
        channels: int = 16,
        minibatch: int = 128,
        start_std: float = 0.01,
        **options,
    ):
        super().__init__(**options)
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        h = self.hparams
        if h.pictures or h.source == "stand-in" or not h.download or cifar.has_cifar10(h.root):
            return
        with suppress(InputError):
            cifar.download_cifar10(h.root)

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.hparams
        if h.pictures:
            self.data_name = f"pictures of {Path(h.pictures).name}, 32x32"
            return own_pictures(h.pictures, 32)
        if h.source == "paper" or (h.source == "auto" and cifar.has_cifar10(h.root)):
            self.data_name = "CIFAR-10"
            return *cifar.cifar10(h.root, train=True), *cifar.cifar10(h.root, train=False)
        self.data_name = "coloured digits over photograph patches, a stand-in for CIFAR-10"
        if h.source == "auto":
            warn_of_stand_in("CIFAR-10", Path(h.root) / "cifar-10-batches-py", self.data_name)
        return *cifar.coloured_digits(train=True), *cifar.coloured_digits(train=False)

    def network(self, classes: int) -> ConvNet:
        return ConvNet(32, self.hparams.channels, classes)


class StyleSet(ProblemSet):
    """Random crops of content pictures, all in one style, from noise around grey."""

    def __init__(
        self,
        name: str,
        seed: int,
        features: Features,
        contents: list[Tensor],
        style: Tensor,
        size: int,
        scaling: float = 0.0,
    ):
        super().__init__(name, seed, 3 * size * size, None, scaling)
        self.features, self.contents, self.size = features, contents, size
        self.style = _square(style, size)[None]

    def draw_start(self, random: np.random.Generator) -> np.ndarray:
        return 0.5 + 0.05 * random.standard_normal(self.coordinates)

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        picture = self.contents[random.integers(len(self.contents))]
        side = int(min(picture.shape[1:]) * random.uniform(0.5, 1))
        top, left = (random.integers(length - side + 1) for length in picture.shape[1:])
        crop = picture[:, top : top + side, left : left + side]
        return [resize(crop if random.random() < 0.5 else crop.flip(2), [self.size, self.size]).numpy()]

    def problems(self, drawn: Drawn) -> StyleTransfers:
        contents = drawn.arrays[0].to(drawn.start) / 255
        self.features, self.style = self.features.to(drawn.start), self.style.to(drawn.start)
        content_targets, style_targets = targets(self.features, contents, self.style)
        return StyleTransfers(self.features, contents, self.style, content_targets, style_targets, *drawn[2:])


class OwnPicture(StyleSet):
    """A user's picture, whole, in a user's style."""

    def __init__(self, features: Features, content: Tensor, style: Tensor, size: int):
        super().__init__("predict", 0, features, [content], style, size)
        self.content = resize(content, _within(content, size))
        self.coordinates = self.content.numel()

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        return [self.content.numpy()]


class StyleProblems(InnerProblems):
    """Section 3.4: pictures to be painted in the style of another, or the user's own.

    With ``source: paper`` the pictures are those of ``<root>/art/content`` (1,800 to train, 20 to validate and 100 to
    test on) and of ``<root>/art/style`` (by name, the first to train on, the second new in the test).

    Args:
        root: Folder with ``art/content/``, ``art/style/`` and, for the feature network, ``weights/``.
        source: ``paper`` insists on 1,920 content pictures and two styles; ``stand-in`` takes photographs that come
            with installed packages; ``auto`` takes what lies in ``art/`` (two of each at least), else the stand-in.
        download: Whether to fetch the feature network's weights where they are not on this machine.
        features: The feature network: ``squeezenet1_1``, ``vgg16`` or ``vgg19`` (paper: VGG).
        weights: Its weights, a ``.safetensors`` or ``.pth`` file. None: those in ``<root>/weights``, torch's cache or
            downloaded; without any, a fixed random initialisation.
        size: Side of the pictures in pixels (paper: 64); with ``content`` the longer side.
        content: Picture that ``predict`` paints. None: test pictures.
        style: Picture whose style ``predict`` takes. None: the one trained on.
        options: Of ``InnerProblems``.
    """

    unit = "content, style and smoothness"

    def __init__(
        self,
        root: str = "data",
        source: Literal["auto", "paper", "stand-in"] = "auto",
        download: bool = True,
        features: Literal["squeezenet1_1", "vgg16", "vgg19"] = "squeezenet1_1",
        weights: str | None = None,
        size: int = 64,
        content: str | None = None,
        style: str | None = None,
        **options,
    ):
        super().__init__(**options)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        h = self.hparams
        if h.size < 32:
            raise InputError(f"data.size: {h.size} pixels are too few for the feature network: take 32 at least")
        self.splits, self.styles, name = self.read()
        self.features, sentence = load_features(h.features, h.root, h.weights, h.download)
        if "random" in sentence:
            rank_zero_warn(f"{sentence}: the losses are real, the pictures will hardly show the style")
        self.data_name, self.test_name = f"{name}; {sentence}", "new contents"
        self.add_sets()
        if stage == "predict" and (h.content or h.style):
            content = photos.read_picture(h.content) if h.content else self.splits["test"][0]
            style = photos.read_picture(h.style) if h.style else self.styles["training"]
            self.sets["predict"] = OwnPicture(self.features, content, style, h.size)
        self.save_hyperparameters({"data_name": self.data_name})

    def read(self) -> tuple[dict[str, list[Tensor]], dict[str, Tensor], str]:
        """Content pictures of each split, the training style and a new one, and what they are."""
        h, art = self.hparams, Path(self.hparams.root) / "art"
        folders = [art / "content", art / "style"]
        contents, styles = (photos.picture_paths(f) if f.is_dir() else [] for f in folders)
        enough = len(contents) >= 2 and len(styles) >= 2
        if h.source == "paper" and (len(contents) < 1920 or len(styles) < 2):
            raise InputError(
                f"{art}: {len(contents)} pictures in content and {len(styles)} in style, the paper has 1,920 and two: "
                "put pictures of ImageNet and two paintings there"
            )
        if h.source == "stand-in" or not enough:
            pictures = photos.bundled_photographs()
            if h.source == "auto":
                warn_of_stand_in("pictures", art, "bundled photographs, a stand-in")
            contents, new = [pictures["china"]], [pictures["grace_hopper"]]
            styles = {"training": pictures["minduka"], "new": pictures["flower"]}
            splits = {"train": contents, "tune": contents, "val": contents, "test": new, "predict": new}
            return splits, styles, "bundled photographs, a stand-in for ImageNet and paintings"
        held_out = 120 if len(contents) >= 1920 else max(1, len(contents) // 6)
        contents = [photos.read_picture(path) for path in contents]
        train, test = contents[:-held_out], contents[-held_out:]
        val, test = (test[:20], test[20:]) if held_out == 120 else (train, test)
        splits = {"train": train, "tune": train, "val": val, "test": test, "predict": test}
        style, new = (photos.read_picture(path) for path in styles[:2])
        return splits, {"training": style, "new": new}, f"{len(contents)} pictures, style of {styles[0].name}"

    def problem_set(self, name: str, style: str = "training", size: int | None = None) -> StyleSet:
        h, split = self.hparams, name.split("/")[0]
        if style not in self.styles:
            raise InputError(f"data.tests: style {style!r}: it is 'training' or 'new'")
        scaling = h.random_scaling if split == "train" else 0.0
        return StyleSet(name, h.seed, self.features, self.splits[split], self.styles[style], size or h.size, scaling)


def _square(picture: Tensor, size: int) -> Tensor:
    """The middle of a picture (3, H, W), scaled to (3, size, size), 0 to 1."""
    side = min(picture.shape[1:])
    return resize(center_crop(picture, [side, side]), [size, size]) / 255


def _within(picture: Tensor, size: int) -> list[int]:
    """Height and width of a picture (3, H, W) whose longer side is to be ``size``, but none below 32."""
    return [max(32, round(length * size / max(picture.shape[1:]))) for length in picture.shape[1:]]


def only(images: Tensor, labels: Tensor, wanted: list[int]) -> tuple[Tensor, Tensor]:
    """The images of the ``wanted`` classes, with labels renumbered from 0.

    Raises:
        InputError: For a class that the data do not have.
    """
    if missing := sorted(set(wanted) - set(labels.unique().tolist())):
        raise InputError(f"labels: no class {missing[0]} in these data: they have 0 to {int(labels.max())}")
    numbers = torch.full((int(labels.max()) + 1,), -1)
    numbers[sorted(wanted)] = torch.arange(len(wanted))
    renumbered = numbers[labels.long()]
    return images[renumbered >= 0], renumbered[renumbered >= 0]


def own_pictures(path: str, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A user's class folders: training images (N, 3, S, S) and labels, test images and labels.

    Without a ``test`` folder every sixth picture of the (shuffled) ones there is for testing.

    Raises:
        InputError: Where they cannot be read, or training and test classes differ.
    """
    images, labels, names = cifar.class_folders(path, size, split="train")
    test, test_labels, test_names = cifar.class_folders(path, size, split="test")
    if names != test_names:
        raise InputError(f"{path}: the classes of train and test differ, {names} and {test_names}: use the same names")
    one_set = torch.equal(images, test)
    order = torch.from_numpy(generator(0).permutation(len(images)))
    images, labels = images[order], labels[order]
    if one_set:
        held_out = torch.arange(len(images)) % 6 == 5
        images, labels, test, test_labels = images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    if len(images) < 6 or not len(test):
        raise InputError(f"{path}: {len(images)} pictures are too few: give at least a dozen")
    return images, labels, test, test_labels


def warn_of_stand_in(wanted: str, where: Path, used: str) -> None:
    """Says on the first process that a stand-in is used."""
    rank_zero_warn(f"no {wanted} in {where}: this run uses {used}; --data.root names another place")
