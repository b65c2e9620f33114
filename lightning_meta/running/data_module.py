"""The base class of all data modules: where the data come from, the sets, and the loaders over them."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.segments import Episode, SegmentSampler, evaluation_keys
from lightning_meta.running.workers import ignore_interrupts

Source = Literal["auto", "paper", "stand-in"]
SPLITS = {"train": 0, "val": 1, "test": 2, "tune": 3, "predict": 4}  # part of the key of a sample's random numbers


class MetaDataModule(LightningDataModule):
    """A data module whose training batches follow ``MetaSchedule``.

    A subclass sets ``batch_size`` in ``__init__`` and defines ``make_sets``, which fills ``sets`` and ``counts`` and
    sets ``data_name`` and ``test_name``. It also defines ``present`` and ``fetch`` if it can download its data, and
    ``collate`` if its data sets have no such method. Among its hyper-parameters is ``num_workers``.
    """

    train_batches: SegmentSampler | None = None  # set by MetaSchedule
    horizon: int = 1  # steps of a problem in validation and test
    data_name: str | None = None  # what records call the data
    test_name: str  # what records call the test samples
    batch_size: int
    collate: Callable[[list[Any]], Any]  # joins samples of a set that has no method of this name

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, Dataset[Any]] = {}  # by split
        self.counts: dict[str, int] = {}  # samples of the sets to validate on, to test on and to predict

    @property
    def users_data(self) -> Any:
        """The user's own data, used in place of the paper's; None if there are none."""
        return None

    @property
    def present(self) -> bool:
        """Whether the paper's data lie below ``root``."""
        return True

    def fetch(self) -> None:
        """Download the paper's data into ``root``."""

    def prepare_data(self) -> None:
        h: Any = self.hparams
        if h.get("download") and h.source != "stand-in" and not self.users_data and not self.present:
            with suppress(InputError):  # make_sets uses the stand-in, or says what is missing
                self.fetch()

    def use_papers_data(self, paper: str, where: str | Path, stand_in: str, more: str = "") -> bool:
        """Choose between the paper's data and their stand-in, and name the choice.

        ``source: auto`` takes the paper's data if they are present; otherwise it takes the stand-in and warns.

        Args:
            paper: What records call the paper's data.
            where: The folder in which they are looked for.
            stand_in: What records call the stand-in.
            more: Further options that help, for the warning.

        Returns:
            Whether to read the paper's data.
        """
        h: Any = self.hparams
        source = h.source
        if source == "paper" or (source == "auto" and self.present):
            self.data_name = paper
            return True
        self.data_name = stand_in
        if source == "auto":
            rank_zero_warn(
                f"{paper} not found in {where}: this run uses {stand_in}; --data.root names another place{more}"
            )
        return False

    def make_sets(self, stage: str) -> None:
        """Read the data and fill ``sets`` and ``counts``."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        self.make_sets(stage)
        if self.data_name is not None:
            self.save_hyperparameters({"data_name": self.data_name})

    @property
    def test_samples(self) -> int:
        """Number of samples that a test result is a mean of."""
        return self.counts["test"]

    def scheduled(self) -> SegmentSampler:
        """The training batches.

        Raises:
            InputError: If the trainer has no ``MetaSchedule``.
        """
        if self.train_batches is None:
            raise InputError("no schedule: add lightning_meta.running.schedule.MetaSchedule to the trainer's callbacks")
        return self.train_batches

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.sets["train"], batch_sampler=self.scheduled())

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader("val")

    def test_dataloader(self) -> Any:
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader("predict")

    def evaluation_loader(
        self,
        split: str,
        count: int | None = None,
        horizon: int | None = None,
        episode: Episode | None = None,
        batch_size: int | None = None,
    ) -> DataLoader[Any]:
        """A loader of this rank's part of a set, in a fixed order; arguments not given are those of the split."""
        trainer: Any = self.trainer
        keys = evaluation_keys(
            self.counts[split] if count is None else count,
            self.horizon if horizon is None else horizon,
            trainer.global_rank,
            trainer.world_size,
            episode,
        )
        return self.loader(self.sets[split], sampler=keys, batch_size=batch_size or self.batch_size)

    def loader(self, dataset: Dataset[Any], **order: Any) -> DataLoader[Any]:
        """A loader of a data set; ``order`` is a ``batch_sampler``, or a ``sampler`` and a ``batch_size``."""
        h: Any = self.hparams
        return DataLoader(
            dataset,
            **order,
            num_workers=h.num_workers,
            collate_fn=getattr(dataset, "collate", None) or self.collate,
            worker_init_fn=ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
        )
