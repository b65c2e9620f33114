"""Data modules of inner problems for training, validation and test (Andrychowicz et al. 2016, section 3)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.problem_sets import (
    ClassificationSet,
    DrawnProblems,
    OneQuadratic,
    ProblemSet,
    QuadraticSet,
)
from lightning_meta.learned_optimizers.problems import MLP, ConvNet
from lightning_meta.learned_optimizers.unroll import Problems
from lightning_meta.running.data_module import MetaDataModule, Source
from lightning_meta.running.labelled_image_data import LabelledImageDataModule
from lightning_meta.running.options import Integers
from lightning_meta.sources import labelled_images


class InnerProblemsDataModule(MetaDataModule):
    """Base class of this paper's data modules: it makes the set of problems of each split and test case.

    Args:
        batch_size: Inner problems for each process and outer step.
        steps: Inner steps in validation and test.
        val_problems: Number of problems to validate on.
        test_problems: Number of problems to test on, for each test case.
        tune_problems: Number of problems from the training data on which the baselines' learning rates are chosen.
        predict_problems: Number of problems that ``predict`` shows.
        tests: Further test cases: by name, the options in which the problems differ from the training problems, such
            as ``{"two layers": {"hidden": [20, 20]}}`` or ``{"200 steps": {"steps": 200}}``.
        random_scaling: Width r of the random scaling of coordinates in training (Lv et al. 2017: 3). 0: none.
        num_workers: Number of processes that draw problems. 0: the training process draws them.
        seed: Seed of the training problems.
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
        self.horizon = steps
        self.cases = {f"{steps} steps": {}} | (tests or {})
        self.counts = {"val": val_problems, "test": test_problems, "predict": predict_problems}

    def problem_set(self, name: str, **case: Any) -> ProblemSet:
        """Make the set of problems of a split or test case.

        Args:
            name: The split; for a test case ``SPLIT/CASE``.
            case: Options of the test case.

        Raises:
            TypeError: If the problems do not have such an option.
        """
        raise NotImplementedError

    def add_sets(self) -> None:
        """Make the sets of all splits and test cases; ``make_sets`` calls this after it has read the data."""
        names = {"train": {}, "val": {}, "predict": {}}
        names |= {f"{split}/{case}": options for case, options in self.cases.items() for split in ("test", "tune")}
        for name, options in names.items():
            options = {option: value for option, value in options.items() if option != "steps"}
            try:
                self.sets[name] = self.problem_set(name, **options)
            except (TypeError, KeyError) as error:
                case = name.split("/")[-1]
                raise InputError(f"data.tests: {case}: {error}: check the options of this case") from error

    def case_steps(self, case: str) -> int:
        """Return the number of inner steps of a test case."""
        return self.cases[case].get("steps", self.hparams.steps)

    def tuning_problems(self, case: str, like: Tensor) -> Problems:
        """Return problems on which to choose the learning rates of a test case, on the device of ``like``.

        Their data are training data.
        """
        return self.sets[f"tune/{case}"].batch(self.hparams.tune_problems, self.case_steps(case), like)

    def test_dataloader(self) -> list[DataLoader]:
        return [
            self.evaluation_loader(f"test/{case}", self.counts["test"], self.case_steps(case)) for case in self.cases
        ]

    def on_after_batch_transfer(self, batch: DrawnProblems, dataloader_idx: int) -> Problems:
        return self.sets[batch.set_name].problems(batch)


class QuadraticDataModule(InnerProblemsDataModule):
    """Random quadratics of section 3.1; ``predict`` can minimise a quadratic of the user's.

    Args:
        dimension: Number n of coordinates (paper: 10).
        entries: Distribution of the entries of W and y: ``normal`` as in the paper, or ``uniform`` in [0, 1] as in
            the authors' code.
        start_std: Standard deviation of theta_0 (authors' code: 0.01).
        problem: An ``.npz`` file with W (n, n) and y (n,) that ``predict`` minimises. None: random quadratics.
        options: Options of ``InnerProblemsDataModule``.

    >>> import torch
    >>> data = QuadraticDataModule(dimension=3, test_problems=2)
    >>> data.setup("test")
    >>> data.sets["test/100 steps"].batch(2, steps=100, like=torch.zeros(())).W.shape
    torch.Size([2, 3, 3])
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

    def make_sets(self, stage: str) -> None:
        self.add_sets()
        if stage == "predict" and self.hparams.problem:
            self.sets["predict"] = OneQuadratic("predict", self.hparams.problem, self.hparams.start_std)

    def problem_set(self, name: str, dimension: int | None = None) -> QuadraticSet:
        h = self.hparams
        scaling = h.random_scaling if name == "train" else 0.0
        return QuadraticSet(name, h.seed, dimension or h.dimension, h.entries, h.start_std, scaling)


class ClassificationProblemsDataModule(InnerProblemsDataModule, LabelledImageDataModule):
    """Base class for small networks that learn to classify images.

    Training problems draw their minibatches from five sixths of the training images, validation problems from the
    rest, and test problems from the test images.
    """

    def network(self, classes: int, **case: Any) -> nn.Module:
        """Make the network of a problem, with the options of a test case."""
        raise NotImplementedError

    def make_sets(self, stage: str) -> None:
        images, labels, test_images, test_labels, classes, _ = self.read()
        count = len(images) * 5 // 6
        train, val, test = (
            (images[:count], labels[:count]),
            (images[count:], labels[count:]),
            (test_images, test_labels),
        )
        self.splits = {"train": train, "val": val, "tune": train, "test": test, "predict": test}
        self.classes = len(classes)
        self.test_name = "minibatches of the test images"
        self.add_sets()

    def problem_set(self, name: str, labels: list[int] | None = None, **case: Any) -> ClassificationSet:
        h, split = self.hparams, name.split("/")[0]
        images, targets = self.splits[split]
        labels = labels or h.get("labels")
        if labels:
            images, targets = only(images, targets, labels)
        network = self.network(len(set(labels)) if labels else self.classes, **case)
        scaling = h.random_scaling if split == "train" else 0.0
        return ClassificationSet(name, h.seed, network, images, targets, h.minibatch, h.start_std, scaling)


class DigitProblemsDataModule(ClassificationProblemsDataModule):
    """Section 3.2: a small MLP that learns MNIST, or the user's images in grey.

    Args:
        root: Folder with ``MNIST/raw/``.
        source: ``paper`` uses MNIST; ``stand-in`` uses scikit-learn's 8x8 digits, enlarged; ``auto`` uses MNIST if it
            is below ``root`` or can be downloaded, else the stand-in.
        download: Whether to download MNIST into ``root`` if it is missing.
        pictures: The user's images, a folder or archive with one folder of images for each class, or with such folders
            below ``train`` and ``test``. They are scaled to 28x28 pixels in grey.
        hidden: Units of each hidden layer (paper: [20]).
        activation: ``sigmoid`` (paper) or ``relu``.
        minibatch: Number of images in an inner step (paper: 128).
        start_std: Standard deviation of theta_0, weights and biases (authors' code: 0.01). The results of the
            baselines depend on it too, since all rules start from the same theta_0.
        options: Options of ``InnerProblemsDataModule``.
    """

    dataset = labelled_images.MNIST

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        pictures: str | None = None,
        hidden: Integers = [20],  # noqa: B006 - never changed
        activation: Literal["sigmoid", "relu"] = "sigmoid",
        minibatch: int = 128,
        start_std: float = 0.01,
        **options,
    ):
        super().__init__(**options)
        self.save_hyperparameters()

    def network(self, classes: int, hidden: list[int] | None = None, activation: str | None = None) -> MLP:
        return MLP(28 * 28, hidden or self.hparams.hidden, classes, activation or self.hparams.activation)


class ImageProblemsDataModule(ClassificationProblemsDataModule):
    """Section 3.3: a small convolutional network that learns CIFAR-10, or the user's images.

    Args:
        root: Folder with ``cifar-10-batches-py/`` or ``cifar-10-python.tar.gz``.
        source: ``paper`` uses CIFAR-10; ``stand-in`` uses coloured digits over patches of photographs; ``auto`` uses
            CIFAR-10 if it is below ``root`` or can be downloaded, else the stand-in.
        download: Whether to download CIFAR-10 into ``root`` if it is missing.
        pictures: The user's images, a folder or archive with one folder of images for each class, or with such folders
            below ``train`` and ``test``. They are scaled to 32x32 pixels.
        labels: Classes to use, renumbered from 0. None: all. The paper's LSTM-sub trains on classes that its test
            cases do not use.
        channels: Channels of each convolution (authors' code: 16).
        minibatch: Number of images in an inner step (authors' code: 128).
        start_std: Standard deviation of theta_0 (authors' code: 0.01).
        options: Options of ``InnerProblemsDataModule``.
    """

    dataset = labelled_images.CIFAR10

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        pictures: str | None = None,
        labels: Integers | None = None,
        channels: int = 16,
        minibatch: int = 128,
        start_std: float = 0.01,
        **options,
    ):
        super().__init__(**options)
        self.save_hyperparameters()

    def network(self, classes: int) -> ConvNet:
        return ConvNet(32, self.hparams.channels, classes)


def only(images: Tensor, labels: Tensor, wanted: list[int]) -> tuple[Tensor, Tensor]:
    """Return the images (K, ...) of the ``wanted`` classes and their labels (K,), renumbered from 0.

    Raises:
        InputError: If the data do not have one of these classes.
    """
    if missing := sorted(set(wanted) - set(labels.unique().tolist())):
        raise InputError(f"labels: no class {missing[0]} in these data: choose from 0 to {int(labels.max())}")
    numbers = torch.full((int(labels.max()) + 1,), -1)
    numbers[sorted(wanted)] = torch.arange(len(wanted))
    renumbered = numbers[labels.long()]
    return images[renumbered >= 0], renumbered[renumbered >= 0]
