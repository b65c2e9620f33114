"""What a run leaves to look at: pictures in TensorBoard, predictions on disk, a table and a record of the test."""

import json
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_meta.checkpoints import read_checkpoint
from lightning_meta.figures import write_png
from lightning_meta.files import whole, write_text
from lightning_meta.sources.clips import write_gif, write_mp4


class Measure(NamedTuple):
    """What an experiment is judged by: a module's attribute ``measure``, and those in ``further_measures``, if any.

    Further measures that a test did not log (for want of a truth to compare with) are left out of its record.
    ``metric`` and the values of ``baselines`` are names that the test logs. Where it logs ``NAME/interval`` too, that
    is half the width of the 95 % interval of ``NAME``.
    """

    name: str
    unit: str
    metric: str
    baselines: dict[str, str]


class Record(Callback):
    """After ``test``: prints the model beside its baselines and writes ``results.json`` into the run's folder."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or ".")  # asks the other processes; a fast_dev_run has none
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        checkpoint = read_checkpoint(trainer.ckpt_path) if trainer.ckpt_path else {}
        timer = checkpoint.get("callbacks", {}).get("Timer", {"time_elapsed": {"train": 0.0}})
        measured = _values(pl_module.measure, trainer.callback_metrics)
        further = [
            _values(measure, trainer.callback_metrics)
            for measure in getattr(pl_module, "further_measures", ())
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
        if not trainer.fast_dev_run:
            folder.mkdir(parents=True, exist_ok=True)
            with whole(folder / "results.json") as part:
                part.write_text(json.dumps(record, indent=2) + "\n")


def _values(measure: Measure, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """A measure's part of the record."""
    names = measure.baselines.items()
    values = {
        "measure": measure.name,
        "unit": measure.unit,
        "value": metrics[measure.metric].item(),
        "baselines": {name: metrics[metric].item() for name, metric in names},
    }
    if f"{measure.metric}/interval" in metrics:
        values["interval"] = metrics[f"{measure.metric}/interval"].item()
        values["baseline_intervals"] = {name: metrics[f"{metric}/interval"].item() for name, metric in names}
    return values


def amounts(values: dict[str, Any]) -> list[str]:
    """A measure's value and those of its baselines for a table: four digits, and half the 95 % interval if known."""
    numbers = [values["value"], *values["baselines"].values()]
    intervals = values.get("baseline_intervals", {})
    halves = [values.get("interval"), *map(intervals.get, values["baselines"])]
    texts = [f"{number:.1f}" if 1000 <= abs(number) < 100_000 else f"{number:.4g}" for number in numbers]
    return [text if half is None else f"{text} ± {half:.2g}" for text, half in zip(texts, halves, strict=True)]


class TensorBoardPictures(Callback):
    """Shows ``module.pictures(batch)``, made from the first validation batch, in TensorBoard."""

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
    """Writes what ``predict_step`` returns, ``{file name: content}``, into the run's ``predictions/``.

    The content is uint8 (3, H, W) for ``.png``, (T, 3, H, W) for ``.gif``, pictures one after another, which need not
    fit into memory together, for ``.mp4``, and text for ``.svg`` and ``.txt``.
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


def device_name(trainer: Trainer) -> str:
    """What the numbers were computed on, for a person."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {cpu_name()}"


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """The commit of this checkout, with ``+`` where files were changed since; None outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    try:  # an installed package may lie in somebody else's repository, which does not track this file
        head = git("rev-parse", "--short=12", "HEAD") if git("ls-files", Path(__file__).name) else None
    except FileNotFoundError:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if head else None
