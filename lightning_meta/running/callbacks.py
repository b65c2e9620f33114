"""Callbacks that show and save results: pictures in TensorBoard, predictions on disk, the record of a test."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_meta.drawing.files import write_gif, write_mp4, write_png
from lightning_meta.running.machine import commit, device_name
from lightning_meta.running.measures import amounts, recorded
from lightning_meta.storage.atomic import atomic_write, write_text
from lightning_meta.storage.checkpoints import read_checkpoint


class Record(Callback):
    """After ``test``, write ``results.json`` into the run's folder and print the model beside its baselines."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or ".")  # a collective operation; a fast_dev_run has no folder
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        checkpoint = read_checkpoint(trainer.ckpt_path) if trainer.ckpt_path else {}
        timer = checkpoint.get("callbacks", {}).get("Timer", {"time_elapsed": {"train": 0.0}})
        measured = recorded(pl_module.measure, trainer.callback_metrics)
        further = [
            recorded(measure, trainer.callback_metrics)
            for measure in pl_module.further_measures
            if measure.metric in trainer.callback_metrics
        ]
        record = {
            "experiment": folder.name,
            **measured,
            "further": further,
            "data": f"{data.data_name}; {data.test_name}",
            "samples": data.test_samples,
            "seed": data.hparams.seed,
            "steps": checkpoint.get("global_step", trainer.global_step),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "device": device_name(trainer),
            "precision": trainer.precision,
            "processes": trainer.world_size,
            "seconds": round(timer["time_elapsed"]["train"]),
            "commit": commit(),
            "torch": torch.__version__,
            "model": {k: v for k, v in pl_module.hparams.items() if not k.startswith("_")},
        }
        if not trainer.fast_dev_run:  # before anything is printed: that may fail
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / "results.json") as part:
                part.write_text(json.dumps(record, indent=2) + "\n")
        table = Table("", title=measured["measure"])
        table.add_column(measured["unit"], justify="right")
        value, *others = amounts(measured)
        table.add_row(f"model after {record['steps']} steps", value, style="bold")
        for name, other in zip(measured["baselines"], others, strict=True):
            table.add_row(name, other)
        print(f"\n{record['samples']} samples of {record['data']}")
        Console().print(table)
        if further:
            table = Table("also", "", "baselines")
            for values in further:
                value, *others = amounts(values)
                named = [f"{name} {other}" for name, other in zip(values["baselines"], others, strict=True)]
                table.add_row(f"{values['measure']}, {values['unit']}", value, ", ".join(named))
            Console().print(table)


class TensorBoardPictures(Callback):
    """Show ``module.pictures(batch)`` of the first validation batch in TensorBoard."""

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx > 0 or trainer.sanity_checking:
            return
        boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for name, picture in pl_module.pictures(batch).items() if boards else ():
            boards[0].add_image(name, picture, trainer.global_step)


class PredictionWriter(Callback):
    """Write what ``predict_step`` returns, ``{file name: content}``, into the run's ``predictions/``.

    The content is uint8 (3, H, W) for ``.png``, uint8 (T, 3, H, W) for ``.gif``, an iterable of uint8 (3, H, W) for
    ``.mp4``, and text for ``.svg`` and ``.txt``.
    """

    writers = {  # noqa: RUF012 - never changed
        ".png": write_png,
        ".gif": write_gif,
        ".mp4": partial(write_mp4, fps=25),
        ".svg": write_text,
        ".txt": write_text,
    }

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = Path(trainer.log_dir) / "predictions"
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for name, content in outputs.items():
            self.writers[Path(name).suffix](self.folder / name, content)
