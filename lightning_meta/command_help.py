"""What ``--help`` prints: the commands and experiments, or all options of one command, the experiment's own first."""

import importlib
from argparse import SUPPRESS
from inspect import getdoc

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.storage.names import experiments

COMMANDS = {
    "fit": "train an experiment, then test it; --ckpt_path last resumes a run",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint and its baselines on the test data; writes results.json",
    "predict": "apply a checkpoint to your own data; writes pictures, video or text",
    "catalogue": "list the trained models of the package, or make one of a run of yours",
}

OPTIONS = {  # texts for options whose Lightning texts are wrong here
    "ckpt_path": "a checkpoint file, the name of a model of the package (see catalogue; not for fit), or best or last "
    "of this run's folder. Without it, fit begins a new run and the other commands take best",
    "weights_only": SUPPRESS,  # always true: no code in a checkpoint is ever run
}
TITLES = {
    "trainer": "trainer, Lightning's Trainer",
    "checkpoint": "checkpoint, Lightning's ModelCheckpoint: keeps the checkpoint that validates best",
    "last": "last, LastCheckpoint: keeps last.ckpt, to resume from",
    "timer": "timer, Lightning's Timer: ends training after a time",
}


def usage(program: str, command: str) -> str:
    """Return the usage line of ``fit``, ``validate``, ``test`` or ``predict``."""
    options = " ".join(f"[--{part}.OPTION VALUE]" for part in ("model", "data", "schedule", "trainer"))
    return f"{program} {command} --config NAME_OR_FILE [--ckpt_path NAME_OR_FILE] {options}"


def overview(program: str, commands: dict[str, str]) -> str:
    """Return the help text of the program: one line for each command and each experiment."""
    about = {name: _about(path.read_text(encoding="utf-8")) for name, path in experiments().items()}
    return "\n".join(
        [
            f"usage: {program} COMMAND --config NAME_OR_FILE [OPTIONS]",
            "",
            "Networks that write other networks: four papers as one PyTorch Lightning application.",
            "",
            "commands:",
            *_columns(commands),
            "",
            "experiments (packaged configurations; paper/NAME, given after NAME, has the paper's sizes and schedule):",
            *_columns(about),
            "",
            "examples:",
            f"  {program} fit --config dfn_mnist",
            f"  {program} fit --config dfn_mnist --config paper/dfn_mnist --trainer.devices 2",
            f"  {program} predict --config dfn_highway --ckpt_path dfn_highway --data.video my_drive.mp4",
            f"  {program} fit --config dfn_mnist --help    the options of this experiment, with its values",
        ]
    )


def _about(configuration: str) -> str:
    """Return the task from the first comment of a configuration, where it follows the paper and its section."""
    return configuration.splitlines()[0].rpartition(": ")[2].rstrip(".")


def _columns(rows: dict[str, str]) -> list[str]:
    return [f"  {name:20}{text}" for name, text in rows.items()]


def options(parser: LightningArgumentParser, command: str, program: str, config: Namespace | None) -> str:
    """Return the help text of a command: first the options of the experiment's model, data and schedule.

    Args:
        parser: Parser of the command. It is changed and must not be used afterwards.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        program: Command by which this program was started.
        config: Configuration whose values are shown as defaults. None: no experiment was named.
    """
    own = LightningArgumentParser(usage=SUPPRESS, description=None, add_help=False)
    named = "" if config else "Give --config to see the options of an experiment's model and data.\n"
    for part in ("model", "data") if config else ():
        module, _, name = config[part].class_path.rpartition(".")
        _add(own, part, getattr(importlib.import_module(module), name), config[part].init_args)
    _add(own, "schedule", MetaSchedule, config.schedule if config else Namespace())
    parser.usage, parser.description, parser.default_config_files = SUPPRESS, None, []
    known = {action.dest for action in parser._actions} - {"config"}
    parser.set_defaults({key: value for key, value in (config or Namespace()).items() if key in known})
    for action in parser._actions:
        action.help = OPTIONS.get(action.dest, action.help)
    for key, title in TITLES.items():
        parser.groups[key].title = title
    general, method = parser._action_groups[1], parser._action_groups[-1]  # the latter has the command's own options
    general._group_actions += method._group_actions
    parser._action_groups = [general, *(parser.groups[key] for key in reversed(TITLES))]
    head = f"usage: {usage(program, command)}\n\n{command}: {COMMANDS[command]}.\n{named}"
    return f"{head}\n{own.format_help()}\n{parser.format_help()}"


def _add(parser: LightningArgumentParser, key: str, kind: type, values: Namespace) -> None:
    """Add the options of a class, with the configuration's values as defaults."""
    added = parser.add_class_arguments(kind, key, skip={"seed"})  # --seed_everything sets it
    parser.groups[key].title = f"{key}, {kind.__name__}: {(getdoc(kind) or '').splitlines()[0].rstrip('.')}"
    parser.set_defaults({f"{key}.{name}": value for name, value in values.items() if f"{key}.{name}" in added})
