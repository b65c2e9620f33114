"""How a run is saved: checkpoints that a kill cannot harm, and a last one at every stop."""

import signal
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.storage.atomic import whole
from lightning_meta.storage.weights import read


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents on the CPU, tensors mapped from the file; no code in it can run.

    Of a ``.safetensors`` those of a checkpoint that can be tested and not gone on with.

    Raises:
        InputError: Where there is no such file or it is not a checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        return read(path) | {"pytorch-lightning_version": lightning.__version__}
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}: check --ckpt_path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, step = checkpoint["state_dict"], checkpoint["global_step"]
        if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items()):
            raise TypeError("its state_dict holds something else than tensors by name")
        if type(step) is not int or step < 0:
            raise TypeError(f"its global_step is {step!r:.40}")
    except Exception as error:  # torch has a different exception for every way in which a file can be broken
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a checkpoint of this application or is damaged ({reason})") from error
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: a kill while writing leaves the former one whole.

    Reads ``.safetensors`` too.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        return (
            read_checkpoint(path)
            if Path(path).suffix == ".safetensors"
            else super().load_checkpoint(path, *args, **options)
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part, open(part, "wb") as file:
            torch.save(checkpoint, file)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``: every few steps, after each validation, at the end, and on Ctrl-C or SIGTERM.

    Where a validation follows a step, the checkpoint is written after it: a run taken up from there has validated.
    The first Ctrl-C lets the step end, saves and stops; the second one stops at once.

    Args:
        every_n_steps: Optimizer steps between two writings.
    """

    def __init__(self, every_n_steps: int = 50):
        self.every_n_steps = every_n_steps
        self.interrupted = False
        self.signal = signal.SIGINT  # the one that interrupted, where it was this process that got it
        self._saved_step = -1
        self._accumulating = False

    def path(self, trainer: Trainer) -> Path:
        """Where this run's last checkpoint lies."""
        return Path(trainer.log_dir) / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # Lightning has just noted all handlers, and puts them back after training
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._interrupt)

    def _interrupt(self, signum: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted, self.signal = True, signal.Signals(signum)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1:  # a collective: every rank must stop after the same batch
            self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        self._accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if self._accumulating:  # gradients are not in a checkpoint
            return
        due = trainer.global_step % self.every_n_steps == 0
        validation_follows = (batch_idx + 1) % trainer.val_check_batch == 0
        if (self.interrupted or due) and not validation_follows:
            self._save(trainer)
        if self.interrupted and not validation_follows:  # Lightning would validate, and perhaps find a best one here
            trainer.limit_val_batches = 0
        trainer.should_stop = trainer.should_stop or self.interrupted

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self._accumulating:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path(trainer), weights_only=False)
            self._saved_step = trainer.global_step
