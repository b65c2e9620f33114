"""What all data modules share: the order of training batches comes from MetaSchedule."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.segments import SegmentSampler
from lightning_meta.running.workers import ignore_interrupts


class ScheduledData(LightningDataModule):
    """A data module whose training batches are those of ``train_batches``.

    It has ``batch_size``, and ``num_workers`` among its hyper-parameters.
    """

    train_batches: SegmentSampler | None = None  # MetaSchedule's

    def scheduled(self) -> SegmentSampler:
        """The training batches.

        Raises:
            InputError: Nobody has given them.
        """
        if self.train_batches is None:
            raise InputError("no schedule: add lightning_meta.running.schedule.MetaSchedule to the trainer's callbacks")
        return self.train_batches

    def loader(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], **order: Any) -> DataLoader[Any]:
        """A loader of our own batches; ``order`` is a ``batch_sampler``, or a ``sampler`` and a ``batch_size``."""
        hparams: Any = self.hparams
        return DataLoader(
            dataset,
            **order,
            num_workers=hparams.num_workers,
            collate_fn=collate,
            worker_init_fn=ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
        )
