"""Inner problems for training, validation and test, drawn by their number (Andrychowicz et al. 2016, section 3).

Shapes: B problems of n coordinates each; minibatches of M images.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_meta.command_options import Integers
from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.problem_sets import (
    ClassificationSet,
    Drawn,
    OneQuadratic,
    ProblemSet,
    QuadraticSet,
)
from lightning_meta.learned_optimizers.problems import MLP, ConvNet
from lightning_meta.learned_optimizers.unroll import Problems
from lightning_meta.running.data_module import MetaDataModule, Source
from lightning_meta.running.labelled_image_data import LabelledImageDataModule
from lightning_meta.sources import labelled_images


class InnerProblemsDataModule(MetaDataModule):
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
        self.horizon = steps
        self.cases = {f"{steps} steps": {}} | (tests or {})
        self.counts = {"val": val_problems, "test": test_problems, "predict": predict_problems}

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

    def case_steps(self, case: str) -> int:
        """Inner steps of a test case."""
        return self.cases[case].get("steps", self.hparams.steps)

    def tuning_problems(self, case: str, like: Tensor) -> Problems:
        """Problems from the training data on which to choose the learning rates of a test case, where ``like`` is."""
        return self.sets[f"tune/{case}"].batch(self.hparams.tune_problems, self.case_steps(case), like)

    def test_dataloader(self) -> list[DataLoader]:
        return [
            self.evaluation_loader(f"test/{case}", self.counts["test"], self.case_steps(case)) for case in self.cases
        ]

    def on_after_batch_transfer(self, batch: Drawn, dataloader_idx: int) -> Problems:
        return self.sets[batch.set_name].problems(batch)


class QuadraticDataModule(InnerProblemsDataModule):
    """Random quadratics of section 3.1; ``predict`` takes one of the user's own.

    Args:
        dimension: n (paper: 10).
        entries: Of W and y: ``normal`` as in the paper, ``uniform`` in [0, 1] as in the authors' code.
        start_std: Standard deviation of theta_0 (authors' code: 0.01).
        problem: What ``predict`` minimises: an ``.npz`` file with W (n, n) and y (n,). None: test problems.
        options: Of ``InnerProblemsDataModule``.
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
    """Small networks that learn to classify images: what ``DigitProblems`` and ``PictureProblems`` share.

    Training problems draw their minibatches from five sixths of the training images, validation problems from the
    rest, test problems from the test images: the data are new there too.
    """

    def network(self, classes: int, **case: Any) -> nn.Module:
        """The network of a problem, with what a test case has different."""
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
    """Section 3.2: a small MLP that learns MNIST, or the user's own pictures in grey.

    Args:
        root: Folder with ``MNIST/raw/``.
        source: ``paper`` insists on MNIST; ``stand-in`` takes scikit-learn's 8x8 digits, enlarged; ``auto`` takes
            MNIST where it lies or can be downloaded, else the stand-in.
        download: Whether to fetch MNIST into ``root`` where it is missing.
        pictures: A folder or archive of the user's own: one folder of pictures a class, or these below ``train`` and
            ``test``. They are scaled to 28x28 in grey.
        hidden: Units of each hidden layer (paper: [20]).
        activation: ``sigmoid`` (paper) or ``relu``.
        minibatch: Images of an inner step (paper: 128).
        start_std: Standard deviation of theta_0, weights and biases (authors' code: 0.01). Baselines depend on it: all
            rules start from the same theta_0.
        options: Of ``InnerProblemsDataModule``.
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
    """Section 3.3: a small convolutional network that learns CIFAR-10, or the user's own pictures.

    Args:
        root: Folder with ``cifar-10-batches-py/`` or ``cifar-10-python.tar.gz``.
        source: ``paper`` insists on CIFAR-10; ``stand-in`` takes coloured digits over patches of photographs;
            ``auto`` takes CIFAR-10 where it lies or can be downloaded, else the stand-in.
        download: Whether to fetch CIFAR-10 into ``root`` where it is missing.
        pictures: A folder or archive of the user's own: one folder of pictures a class, or these below ``train`` and
            ``test``. They are scaled to 32x32.
        labels: The classes to take, renumbered from 0; none: all. With those that the test cases leave out, this is
            the paper's LSTM-sub.
        channels: Of each convolution (authors' code: 16).
        minibatch: Images of an inner step (authors' code: 128).
        start_std: Standard deviation of theta_0 (authors' code: 0.01).
        options: Of ``InnerProblemsDataModule``.
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
