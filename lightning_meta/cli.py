"""The command line: LightningCLI with this application's defaults, and one line for each mistake."""

import ctypes
import errno
import io
import json
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_dumper, set_loader
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_meta import catalogue, command_help
from lightning_meta.errors import InputError
from lightning_meta.running.callbacks import PredictionWriter, Record, TensorBoardPictures
from lightning_meta.running.options import OptionParser
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.storage.atomic import lost_worker
from lightning_meta.storage.checkpoints import LastCheckpoint, read_checkpoint
from lightning_meta.storage.names import configurations, expand, full_path, rename_classes, short_name
from lightning_meta.storage.weights import find

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "single_device")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MODE = "yaml with short class names"  # of the parser: how it reads and writes configurations


class SaveFitConfig(SaveConfigCallback):
    """Save the configuration of ``fit``; the other commands do not overwrite it."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class MetaCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for an experiment that ``--config`` describes.

    ``--ckpt_path`` takes a file, the name of a model of the package (not for ``fit``), or ``best`` or ``last`` of this
    run's folder. Without it, ``fit`` begins a new run and moves a former one of the same name aside; the other commands
    take ``best``.
    """

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Lightning's own option also takes true, for a seed that nobody knows, and false
        text = "seed of the data, the first weights and the random numbers of training"
        parser.add_argument("--seed_everything", type=int, default=self.seed_everything_default, help=text)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(MetaSchedule, "schedule")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # After the best one: the last checkpoint remembers which was best.
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(Timer, "timer")
        parser.link_arguments("seed_everything", "schedule.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = command_help.usage(program(), subcommand)
        if subcommand == "test":
            parser.set_defaults(verbose=False)  # Record prints a table that says what is what
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.arguments = list(sys.argv[1:] if args is None else args)
        arguments = list(expand(self.arguments))
        if any(option in arguments for option in ("-h", "--help")) and arguments[0] in self.subcommands():
            self._help(parser, arguments[0], [option for option in arguments if option not in ("-h", "--help")])
        super().parse_arguments(parser, arguments)

    def _help(self, parser: LightningArgumentParser, command: str, arguments: list[str]) -> NoReturn:
        """Print the options of a command and exit."""
        named = any(argument.split("=")[0] in ("-c", "--config", "--model") for argument in arguments)
        config = parser.parse_args(arguments)[command] if named else None
        print(command_help.options(self._parser(command), command, program(), config))
        sys.exit(0)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the configuration decides, not the hyper-parameters in a checkpoint."""

    def before_instantiate_classes(self) -> None:
        self.options = self.config[self.subcommand]
        refuse_strategy(self.options.trainer.strategy)
        refuse_precision(self.options.trainer.precision)
        if self.options.trainer.max_time is not None:  # Lightning ignores it if there is a Timer
            self.options.timer.duration, self.options.trainer.max_time = self.options.trainer.max_time, None
        self.run_folder = _run_folder(self.options.trainer.logger)
        self.options.ckpt_path = self._checkpoint_path(self.options.ckpt_path)
        self.options.weights_only = True  # no code in a checkpoint is ever run
        if self.options.trainer.precision is None:
            self.options.trainer.precision = fast_precision(self.options.trainer.accelerator)

    def _checkpoint_path(self, choice: str | None) -> str | None:
        if choice is None and self.subcommand != "fit":
            choice = "best"
        if choice is None:
            return None
        if choice not in ("best", "last"):
            path = find(choice)
            if self.subcommand == "fit" and path.suffix == ".safetensors":
                raise InputError(
                    f"{choice} has no training state, so fit cannot resume from it: give a .ckpt, best or last"
                )
            return str(path)
        path = self.run_folder / "checkpoints" / f"{choice}.ckpt"
        if path.exists():
            return str(path)
        if self.subcommand == "fit" and choice == "last":  # the run stopped before its first checkpoint
            say(f"{path} does not exist yet: starting from the beginning")
            return None
        raise InputError(f"no {path}: train first ({program()} fit ...) or name a file with --ckpt_path")

    def after_instantiate_classes(self) -> None:
        for part in (self.model, self.datamodule):  # so that a checkpoint outlives the module that defines its class
            part.hparams["_class_path"] = short_name(part.hparams["_class_path"])
            del part.hparams["_instantiator"]
        if self.trainer.precision == "64-true":
            self.model.double()  # Lightning would do so only after it has loaded a checkpoint, rounded to float32
        path = self.options.ckpt_path
        if path is not None:
            checkpoint = read_checkpoint(path)
            _refuse_other_weights(path, checkpoint, self.model)
            if self.subcommand == "fit" and not checkpoint.keys() >= {"optimizer_states", "lr_schedulers", "schedule"}:
                raise InputError(
                    f"{path} has no training state, so fit cannot resume from it: give a .ckpt, best or last"
                )

    def before_fit(self) -> None:
        if not self.trainer.fast_dev_run:
            prepare_run_folder(self.run_folder, keep=self.options.ckpt_path is not None)

    def after_fit(self) -> None:
        last = next(callback for callback in self.trainer.callbacks if isinstance(callback, LastCheckpoint))
        if last.interrupted:
            say(
                f"stopped at step {self.trainer.global_step}; resume with\n  {self._command('fit', '--ckpt_path=last')}"
            )
            sys.exit(128 + last.signal)
        best = self.run_folder / "checkpoints" / "best.ckpt"
        known = not self.trainer.fast_dev_run and best.exists()
        self.trainer.test(self.model, self.datamodule, ckpt_path=best if known else None, verbose=False)
        longer = [f"--trainer.max_steps={2 * self.trainer.max_steps}", "--timer.duration=null"]
        say(
            f"\nrun folder    {self.run_folder}\n"
            f"curves        tensorboard --logdir {self.run_folder.parent}\n"
            f"predictions   {self._command('predict')}\n"
            f"train longer  {self._command('fit', '--ckpt_path=last', *longer)}"
        )

    def _command(self, verb: str, *more: str) -> str:
        """Return this command line for another verb, with ``more`` in place of the user's options of the same names."""
        options, given = [], iter(self.arguments[1:])
        for option in given:
            if option.split("=")[0] in ("--ckpt_path", "--trainer.max_steps", "--timer.duration"):
                if "=" not in option:
                    next(given)
            else:
                options.append(option)
        return shlex.join([*shlex.split(program()), verb, *options, *more])

    def after_predict(self) -> None:
        say(f"pictures in {self.run_folder / 'predictions'}")


def _run_folder(logger: Any) -> Path:
    """Return the folder of the first logger; checkpoints and records are written there, too."""
    first = logger[0] if isinstance(logger, list) else logger
    options = first.init_args if isinstance(first, Namespace) else {}
    if not options.get("save_dir") or not options.get("name"):
        raise InputError(
            "trainer.logger: a run needs a folder; give a logger with init_args.save_dir and init_args.name"
        )
    return Path(options.save_dir) / options.name / str(options.get("version") or "")


def refuse_strategy(strategy: Any) -> None:
    """Refuse strategies that shard parameters, and processes that Ctrl-C and the checkpoints do not know.

    Raises:
        InputError: For any other strategy than DDP and a single device.
    """
    if isinstance(strategy, str):
        name, fine = strategy, strategy in STRATEGIES
    else:
        name, options = strategy.class_path.rpartition(".")[2], strategy.get("init_args") or {}
        fine = name in ("DDPStrategy", "SingleDeviceStrategy") and options.get("start_method", "popen") == "popen"
    if not fine:
        raise InputError(
            f"trainer.strategy {name} is not supported: every process needs all parameters, and processes must be "
            "started as commands; use --trainer.strategy ddp"
        )


def refuse_precision(precision: Any) -> None:
    """Refuse weights of 16 bits.

    Raises:
        InputError: For such a precision.
    """
    if str(precision).startswith(("16-true", "bf16-true", "transformer-engine")):
        raise InputError(
            f"trainer.precision {precision} is not supported: weights of 16 bits lose small updates and overflow; use "
            "bf16-mixed, which keeps weights in 32 bits"
        )


def fast_precision(accelerator: str) -> str:
    """Return bf16-mixed if the device computes in bfloat16, else 32-true."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"


def _refuse_other_weights(path: str, checkpoint: dict[str, Any], model: LightningModule) -> None:
    saved, wanted = checkpoint["state_dict"], model.state_dict()
    for name in sorted(saved.keys() | wanted.keys()):
        ours, theirs = (tuple(d[name].shape) if name in d else "nothing" for d in (wanted, saved))
        if ours != theirs:
            raise InputError(
                f"{path} is from another experiment or of other sizes: {name} is {theirs} there and {ours} in this "
                f"configuration; {_trained_with(checkpoint, model)}"
            )


def _trained_with(checkpoint: dict[str, Any], model: LightningModule) -> str:
    """Say which options of the configuration to change for a checkpoint to fit."""
    options, kind = checkpoint.get("hyper_parameters"), short_name(f"{type(model).__module__}.{type(model).__name__}")
    options = options if isinstance(options, dict) else {}
    trained = short_name(str(options.get("_class_path", kind)))
    if trained != kind:
        return f"give the --config of {trained}"
    others = [name for name, value in model.hparams.items() if str(options.get(name, value)) != str(value)]
    if not others:
        return "give the --config and --model options it was trained with"
    given = [f"--model.{name}={json.dumps(options[name], default=str)}" for name in others]
    return f"it was trained with {shlex.join(given)}"


@rank_zero_only
def prepare_run_folder(folder: Path, keep: bool) -> None:
    """Create the run folder; move a former run aside, unless it is to be resumed (``keep``).

    Raises:
        InputError: If the folder cannot be written.
    """
    if not keep and (folder / "checkpoints").exists():
        aside = next(p for i in range(1, sys.maxsize) if not (p := folder.with_name(f"{folder.name}.{i}")).exists())
        folder.rename(aside)
        say(f"{folder} held a run: moved to {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: choose another with --trainer.logger.init_args.save_dir")


@rank_zero_only
def say(text: str) -> None:
    """Print on the first process only."""
    print(text, flush=True)


def program() -> str:
    """Return the command by which this program was started."""
    started = {"run.py": "python run.py", "__main__.py": "python -m lightning_meta"}
    return started.get(Path(sys.argv[0]).name, "lightning-meta")


class Command(NamedTuple):
    """A command that LightningCLI does not have."""

    text: str  # for the list of commands
    run: Callable[[list[str], str], None]  # takes the arguments after the command, and how it was called


def run(args: list[str] | None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``."""
    set_loader(MODE, lambda text: rename_classes(get_loader("yaml")(text), full_path), (yaml.YAMLError,))
    set_dumper(MODE, lambda content: yaml.safe_dump(rename_classes(content, short_name), sort_keys=False))
    options = {"parser_mode": MODE, "default_config_files": [str(configurations() / "defaults.yaml")]}
    MetaCLI(
        args=args,
        parser_class=OptionParser,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": [Record(), TensorBoardPictures(), PredictionWriter()]},
        parser_kwargs={"parser_mode": MODE, **{name: options.copy() for name in LightningCLI.subcommands()}},
    )


def main(args: list[str] | None = None, commands: dict[str, Command] | None = None) -> None:
    """Run one command.

    Args:
        args: The arguments of the command line. None: ``sys.argv[1:]``.
        commands: Further commands of the caller, by name.
    """
    arguments = sys.argv[1:] if args is None else args
    commands = {"catalogue": Command(command_help.COMMANDS["catalogue"], catalogue.main), **(commands or {})}
    _quieten()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the tables have characters that not every encoding has
    prepare_processor()
    try:
        command, *options = arguments or ["--help"]
        if command in commands:
            commands[command].run(options, f"{program()} {command}")
        elif command in ("-h", "--help"):
            texts = command_help.COMMANDS | {name: command.text for name, command in commands.items()}
            print(command_help.overview(program(), texts))
        elif command in LightningCLI.subcommands() or command.startswith("-"):
            run(args)
        else:
            known = ", ".join([*LightningCLI.subcommands(), *commands])
            raise InputError(f"there is no command {command}: choose one of {known}")
    except UnicodeDecodeError as error:  # from the parser of options; our own readers name their file
        sys.exit(f"error: a file given with --config is not UTF-8 ({error}): convert it or give another")
    except (InputError, MisconfigurationException, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not lost_worker(error):
            raise
        sys.exit(f"error: {' '.join(str(error).split()).rstrip('.')}{_advice(error)}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes 1 of it
            sys.exit(128 + signal.SIGINT)
        raise


def _advice(error: Exception) -> str:
    """Return what to do about an error of another library, which says only what is wrong."""
    if lost_worker(error):
        return ": free memory or lower --data.num_workers, then resume with --ckpt_path last"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return ": free the disk, then resume with --ckpt_path last"
    return ""


def prepare_processor() -> None:
    """Change two settings of the process that can make CPU training twice as fast. Call it before any thread starts."""
    torch.set_flush_denormal(True)  # gradients of saturated units are denormal, and slow
    # By default glibc returns large blocks to the system at every free and gets them back page by page.
    with suppress(AttributeError, OSError, TypeError):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)


def _quieten() -> None:
    for message in (
        ".*does not have many workers.*",  # a batch is drawn in milliseconds
        ".*dataloader is not resumable.*",  # MetaSchedule resumes it
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own, with torch 2.11
        ".*is smaller than the logging interval.*",
        ".*is not supported by the model summary.*",
        ".*using a custom batch sampler.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
        ".*args parameter is intended to run from within Python.*",  # as it does in a notebook, which has arguments too
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", module="lightning.pytorch.cli", category=DeprecationWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    threading.excepthook = _thread_failed


def _thread_failed(failure: Any) -> None:
    if not isinstance(failure.exc_value, OSError):  # TensorBoard's thread; the main one gets the same error in a moment
        threading.__excepthook__(failure)
