"""``python run.py results``: the READMEs' tables, made from the records under ``results/``."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from lightning_meta.errors import InputError
from lightning_meta.files import whole
from lightning_meta.reports import amounts

ROOT = Path(__file__).parents[1]
DETAILS = ("record", "measure", "measured", "baselines")
HEADER = ("experiment", "run", "measure", "published", "measured", "baselines", "data", "steps", "on")


def experiments(folder: Path) -> str:
    """The table of experiments: every row of ``rows.yaml``, with its record where one was kept.

    Raises:
        InputError: For a record that no row names, or one without the fields of a record.
    """
    rows = yaml.safe_load((folder / "rows.yaml").read_text())
    records = {str(path.relative_to(folder).with_suffix("")): path for path in folder.rglob("*.json")}
    if strangers := [key for key in records if key not in rows and not key.startswith("benchmarks/")]:
        raise InputError(f"{records[strangers[0]]} has no row in {folder / 'rows.yaml'}: add one")
    table = [HEADER, ["---"] * len(HEADER)]
    for key, row in rows.items():
        head = [f"`{Path(key).name}`", row["run"], row["measure"], str(row.get("published", ""))]
        table.append(head + (_measured(records[key]) if key in records else ["not run", "", "", "", ""]))
    return _markdown(table)


def details(folder: Path, prefix: str) -> str:
    """All measures of the records whose names begin with ``prefix``, each beside its baselines."""
    table = [DETAILS, ["---"] * len(DETAILS)]
    for key in yaml.safe_load((folder / "rows.yaml").read_text()):
        path = folder / f"{key}.json"
        if not Path(key).name.startswith(prefix) or not path.exists():
            continue
        record = _record(path)
        for values in (record, *record.get("further", [])):
            table.append([f"`{key}`", f"{values['measure']}, {values['unit']}", *_amounts(values)])
    return _markdown(table)


def _record(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    for field in ("measure", "unit", "value", "baselines", "data", "samples", "steps", "seed", "device", "seconds"):
        if field not in record:
            raise InputError(f"{path} is not a record of a test: it has no {field!r}; run the test again")
    return record


def _amounts(values: dict[str, Any]) -> list[str]:
    value, *others = amounts(values)
    return [
        f"**{value}**",
        ", ".join(f"{name} {other}" for name, other in zip(values["baselines"], others, strict=True)),
    ]


def _measured(path: Path) -> list[str]:
    record = _record(path)
    return [
        *_amounts(record),
        f"{record['data']}, {record['samples']:,} samples",
        f"{record['steps']:,}, seed {record['seed']}",
        f"{record['device']}, {record['precision']}, {record['seconds'] / 60:.0f} min",
    ]


def benchmarks(folder: Path) -> str:
    """The tables of ``benchmarks/*.json``, as ``python -m benchmarks NAME --json`` wrote them."""
    parts = []
    for path in sorted((folder / "benchmarks").glob("*.json")):
        record = json.loads(path.read_text())
        header = list(record["rows"][0])
        rows = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in record["rows"]]
        parts.append(f"`{record['name']}`, {record['device']}, torch {record['torch']}:\n")
        parts.append(_markdown([header, ["---"] * len(header), *rows]) + "\n")
    return "\n".join(parts).rstrip()


def _markdown(table: list[Any]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def fill(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the comments ``<!-- name -->`` and ``<!-- /name -->``."""
    head, tail = f"<!-- {name} -->", f"<!-- /{name} -->"
    if head not in text or tail not in text:
        raise InputError(f"a README has no {head} ... {tail} for the table to go between: add the two lines")
    return text[: text.index(head)] + f"{head}\n{content}\n{tail}" + text[text.index(tail) + len(tail) :]


def pages(root: Path = ROOT) -> dict[Path, str]:
    """The README, and those papers' READMEs that have a place for details, as they should be."""
    text = fill((root / "README.md").read_text(), "results", experiments(root / "results"))
    texts = {root / "README.md": fill(text, "benchmarks", benchmarks(root / "results"))}
    for path in sorted(root.glob("lightning_meta/*/README.md")):
        text = path.read_text()
        for prefix in re.findall("<!-- results ([a-z0-9_]+) -->", text):
            text = fill(text, f"results {prefix}", details(root / "results", prefix))
        texts[path] = text
    return texts


def main(arguments: list[str]) -> None:
    """Writes the tables into the READMEs."""
    if arguments:
        raise InputError(
            f"results takes no options, got {' '.join(arguments)}: it reads results/ and writes the READMEs"
        )
    for path, text in pages().items():
        with whole(path) as part:
            part.write_text(text)
