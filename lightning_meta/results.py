"""``python run.py results``: the README's tables, made from the records under ``results/``."""

import json
from pathlib import Path
from typing import Any

import yaml

from lightning_meta.errors import InputError
from lightning_meta.files import whole

ROOT = Path(__file__).parents[1]
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


def _measured(path: Path) -> list[str]:
    record = json.loads(path.read_text())
    try:
        return [
            f"**{record['value']:.1f}**",
            ", ".join(f"{name} {value:.1f}" for name, value in record["baselines"].items()),
            f"{record['data']}, {record['samples']:,} samples",
            f"{record['steps']:,}, seed {record['seed']}",
            f"{record['device']}, {record['precision']}, {record['seconds'] / 60:.0f} min",
        ]
    except KeyError as error:
        raise InputError(f"{path} is not a record of a test: it has no {error}; run the test again") from error


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
        raise InputError(f"README.md has no {head} ... {tail} for the table to go between: add the two lines")
    return text[: text.index(head)] + f"{head}\n{content}\n{tail}" + text[text.index(tail) + len(tail) :]


def page(root: Path = ROOT) -> str:
    """The README as it should be."""
    text = fill((root / "README.md").read_text(), "results", experiments(root / "results"))
    return fill(text, "benchmarks", benchmarks(root / "results"))


def main(arguments: list[str]) -> None:
    """Writes the tables into README.md."""
    if arguments:
        raise InputError(f"results takes no options, got {' '.join(arguments)}: it reads results/ and writes README.md")
    text = page()
    with whole(ROOT / "README.md") as part:
        part.write_text(text)
