"""Checkpoints of a run: written atomically, and a last one at every stop."""

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
from lightning_meta.storage.atomic import atomic_write
from lightning_meta.storage.weights import read


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, with tensors mapped from the file. No code in the file is executed.

    A ``.safetensors`` file gives a checkpoint that can be tested, but training cannot resume from it.

    Raises:
        InputError: If the file does not exist or is not a checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        return read(path) | {"pytorch-lightning_version": lightning.__version__}
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}: check --ckpt_path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, step = checkpoint["state_dict"], checkpoint["global_step"]
        if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items()):
            raise TypeError("its state_dict is not a mapping from names to tensors")
        if type(step) is not int or step < 0:
            raise TypeError(f"its global_step is {step!r:.40}")
    except Exception as error:  # torch raises all sorts of exceptions for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is not a checkpoint of this application or is damaged ({reason}): give one that fit wrote"
        ) from error
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes atomically, and also reads ``.safetensors`` files."""

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        if Path(path).suffix == ".safetensors":
            return read_checkpoint(path)
        return super().load_checkpoint(path, *args, **options)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part, open(part, "wb") as file:
            torch.save(checkpoint, file)


class LastCheckpoint(Checkpoint):
    """Save ``last.ckpt`` every few steps, after each validation, at the end, and on Ctrl-C or SIGTERM.

    If a validation follows a step, the checkpoint is saved after the validation, so that a resumed run does not
    validate again. The first Ctrl-C finishes the step, saves and stops. The second one stops at once.

    Args:
        every_n_steps: Number of optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int = 50):
        self.every_n_steps = every_n_steps
        self.interrupted = False
        self.signal = signal.SIGINT  # the signal that interrupted the run, if this process received it
        self._saved_step = -1
        self._accumulating = False

    def path(self, trainer: Trainer) -> Path:
        """Return the path of this run's last checkpoint."""
        return Path(trainer.log_dir) / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # Lightning has just stored all handlers, and restores them after training
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._interrupt)

    def _interrupt(self, signum: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted, self.signal = True, signal.Signals(signum)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1:  # a collective operation, so that every rank stops after the same batch
            self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        self._accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if self._accumulating:  # a checkpoint does not hold gradients
            return
        due = trainer.global_step % self.every_n_steps == 0
        validation_follows = (batch_idx + 1) % trainer.val_check_batch == 0
        if (self.interrupted or due) and not validation_follows:
            self._save(trainer)
        if self.interrupted and not validation_follows:  # otherwise Lightning would validate before it stops
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
