"""Trained models by name, and how to share one: ``lightning-meta catalogue RUN FILE.safetensors [LIMITS]``."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_meta.errors import InputError
from lightning_meta.running.measures import amounts
from lightning_meta.sources.data_terms import terms
from lightning_meta.storage.atomic import write_text
from lightning_meta.storage.checkpoints import read_checkpoint
from lightning_meta.storage.names import full_path, short_name
from lightning_meta.storage.weights import find, shipped, write

LIMITS = "one run; nothing but this test was tried."


def names() -> list[str]:
    """The names of the models that ship with the package."""
    return list(shipped())


def load(weights: str | Path) -> LightningModule:
    """Load a trained model onto the CPU, in evaluation mode. No code in the file can run.

    Args:
        weights: One of ``names()``, or the path of a ``.safetensors`` file from ``share`` or of a ``.ckpt`` file that
            the command line wrote.

    Raises:
        InputError: If there is no such model, or the file is damaged or something else.

    >>> import torch
    >>> model = load("dfn_steerable")
    >>> model(torch.rand(1, 1, 64, 64), torch.tensor([0.5])).shape
    torch.Size([1, 1, 64, 64])
    """
    path = find(weights)
    checkpoint = read_checkpoint(path)
    try:
        saved = checkpoint["hyper_parameters"]
        kind = _module_class(saved["_class_path"])
        options = {name: value for name, value in saved.items() if not name.startswith("_")}
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):  # compare the sizes before they take memory
                kind(**options).load_state_dict(checkpoint["state_dict"], assign=True)
            with torch.device("cpu"):
                model = kind(**options)
        model.load_state_dict(checkpoint["state_dict"])
        model.on_load_checkpoint(checkpoint)
    except Exception as error:  # wrong hyper-parameters can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path} does not fit the model that it names ({reason:.300}): get the file again, or use the version that "
            "wrote it"
        ) from error
    return model.eval()


def _module_class(class_path: str) -> type[LightningModule]:
    module, _, name = full_path(class_path).rpartition(".")
    kind = getattr(importlib.import_module(module), name) if module.startswith("lightning_meta.") else None
    if not (isinstance(kind, type) and issubclass(kind, LightningModule) and kind.__module__ == module):
        raise TypeError(f"{class_path} is not a LightningModule of this package")
    return kind


def share(run: str | Path, path: str | Path, limits: str = LIMITS) -> None:
    """Write the best weights of a run, for ``load`` and ``--ckpt_path``, and a model card (``.md``) beside them.

    Args:
        run: Folder of a run, such as ``runs/hyper_ptb``, with its best checkpoint and the record of its test.
        path: File to write; it ends in ``.safetensors``.
        limits: The card's sentence on where the model can be used.

    Raises:
        InputError: If the run was not tested, the record belongs to another checkpoint, or a file cannot be written.
    """
    checkpoint = read_checkpoint(Path(run) / "checkpoints" / "best.ckpt")
    try:
        record = json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))
        text = card(path, checkpoint["hyper_parameters"], record, limits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run} has no record of a test ({error!r}): run test first") from error
    write(path, checkpoint, record)
    write_text(Path(path).with_suffix(".md"), text)


def card(path: str | Path, hyper_parameters: dict[str, Any], record: dict[str, Any], limits: str) -> str:
    """Return a model card for a weight file, as Markdown; all numbers come from the record."""
    path = Path(path)
    name = path.stem if path.resolve().parent.parent.parent == Path(__file__).parent else path.name
    kind = short_name(hyper_parameters["_class_path"])
    trained, tested = record["data"].rsplit("; ", 1)
    lines = [
        f"# {path.stem}",
        "",
        f"`{kind}` of the experiment `{record['experiment']}`: {record['parameters']:,} parameters.",
        "",
        f"- **Trained on:** {trained}",
        f"- **Terms of the data:** {terms(trained)}",
        f"- **With:** {record['steps']:,} steps (the checkpoint that validated best), seed {record['seed']}, on "
        f"{record['device']}, {record['precision']}, {record['seconds'] / 60:.0f} minutes; commit {record['commit']}",
        f"- **Options:** {', '.join(f'{option} {value}' for option, value in record['model'].items())}",
        f"- **Limits:** {limits}",
        "",
        f"Results on {record['samples']:,} samples of {trained}; {tested}:",
        "",
        "| measure | model | baselines |",
        "| --- | --- | --- |",
    ]
    for values in (record, *record.get("further", [])):
        value, *others = amounts(values)
        baselines = ", ".join(f"{key} {other}" for key, other in zip(values["baselines"], others, strict=True))
        lines.append(f"| {values['measure']}, {values['unit']} | {value} | {baselines} |")
    lines += [
        "",
        "```bash",
        f"python run.py test --config configs/{record['experiment']}.yaml --ckpt_path {name}",
        "```",
        "",
        "```python",
        "from lightning_meta import catalogue",
        "",
        f'model = catalogue.load("{name}")  # {kind.rpartition(".")[2]}',
        "```",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str], prog: str = "catalogue") -> None:
    """Write a run's weights and their card; without arguments, list the models of the package."""
    parser = argparse.ArgumentParser(prog, description=main.__doc__)
    parser.add_argument("run", nargs="?", help="folder of a run that was tested, such as runs/hyper_ptb")
    parser.add_argument("file", nargs="?", help="where to write the weights: NAME.safetensors; the card is NAME.md")
    parser.add_argument("limits", nargs="?", default=LIMITS, help="what the card says of where the model can be used")
    given = parser.parse_args(arguments)
    if given.run is None:
        print("\n".join(names()))
    elif given.file is None:
        parser.error("name the file to write, too: a NAME.safetensors")
    else:
        share(given.run, given.file, given.limits)
        print(f"wrote {given.file} and its card; check what the card says of its limits")
