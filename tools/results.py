"""``python run.py results``: make the tables and plots of the pages from the records in ``results/``."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from lightning_meta.errors import InputError
from lightning_meta.running.measures import amounts
from lightning_meta.storage.atomic import write_text
from tools.plots import Bar, Panel, bars

ROOT = Path(__file__).parents[1]
DETAILS = ("record", "measure", "measured", "baselines")
HEADER = ("experiment", "run", "measure", "published", "measured", "baselines", "data", "steps", "on")
MAIN = ("experiment", "measure", "published", "measured here", "best baseline", "data", "steps")


def main_runs(folder: Path, names: list[str]) -> str:
    """Return the README's table: each default run beside the published number and its best baseline."""
    rows = _rows(folder / "rows.yaml")
    table = [MAIN, ["---"] * len(MAIN)]
    for name in names:
        row, path = rows[name], folder / f"{name}.json"
        published = row.get("published", rows.get(f"paper/{name}", {}).get("published", ""))
        head = [f"`{name}`", row["measure"], str(published)]
        if not path.exists():
            table.append([*head, "not run", "", "", ""])
            continue
        record = _record(path)
        value, *others = amounts(record)
        named = zip(record["baselines"].values(), record["baselines"], others, strict=True)
        _, best, other = min(named, default=(0, "", ""))
        table.append([*head, f"**{value}**", f"{best} {other}", record["data"], f"{record['steps']:,}"])
    return _markdown(table)


def experiments(folder: Path) -> str:
    """Return the table of all rows of ``rows.yaml``, each with its record if there is one.

    Raises:
        InputError: If no row names a record, or a record lacks fields.
    """
    rows = _rows(folder / "rows.yaml")
    records = {str(path.relative_to(folder).with_suffix("")): path for path in folder.rglob("*.json")}
    if strangers := [key for key in records if key not in rows | {"faults": {}} and not key.startswith("benchmarks/")]:
        raise InputError(f"{records[strangers[0]]} has no row in {folder / 'rows.yaml'}: add one")
    table = [HEADER, ["---"] * len(HEADER)]
    for key, row in rows.items():
        head = [f"`{Path(key).name}`", row["run"], row["measure"], str(row.get("published", ""))]
        table.append(head + (_measured(records[key]) if key in records else ["not run", "", "", "", ""]))
    return _markdown(table)


def details(folder: Path, prefix: str) -> str:
    """Return a table of all measures of the records whose names begin with ``prefix``, beside their baselines."""
    table = [DETAILS, ["---"] * len(DETAILS)]
    for key in _rows(folder / "rows.yaml"):
        path = folder / f"{key}.json"
        if not Path(key).name.startswith(prefix) or not path.exists():
            continue
        record = _record(path)
        for values in (record, *record.get("further", [])):
            table.append([f"`{key}`", *_detail(values)])
    return _markdown(table)


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as YAML ({error}): correct it") from error
    for key, row in rows.items() if isinstance(rows, dict) else [(None, None)]:
        fields = [key, row.get("run"), row.get("measure")] if isinstance(row, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise InputError(f"{path} is not a list of rows, each with a run and a measure: correct it")
        if not isinstance(row.get("published", ""), str | int | float):
            raise InputError(f"{path}: {key}: published is neither a text nor a number: correct it")
        if not isinstance(row.get("published_value", 0), int | float):
            raise InputError(f"{path}: {key}: published_value is not a number: correct it")
        if not isinstance(row.get("bar", ""), str):
            raise InputError(f"{path}: {key}: bar is not a text: correct it")
    return rows


_FIELDS = {
    **dict.fromkeys(("measure", "unit", "data", "device", "precision"), str),
    **dict.fromkeys(("samples", "steps", "seed"), int),
    **dict.fromkeys(("value", "seconds"), (int, float)),
    "baselines": dict,
}


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): run the test again") from error
    wrong = f"{path} is not a record of a test"
    if not isinstance(record, dict):
        raise InputError(f"{wrong}: it is a {type(record).__name__}; run the test again")
    for field, kind in _FIELDS.items():
        if field not in record:
            raise InputError(f"{wrong}: it has no {field!r}; run the test again")
        if not isinstance(record[field], kind):
            raise InputError(f"{wrong}: its {field!r} is a {type(record[field]).__name__}; run the test again")
    try:
        for values in (record, *record.get("further", [])):
            _detail(values)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{wrong}: a measure of it cannot be shown ({error!r}); run the test again") from error
    return record


def _detail(values: dict[str, Any]) -> list[str]:
    return [f"{values['measure']}, {values['unit']}", *_amounts(values)]


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


def panels(folder: Path, names: list[str]) -> list[Panel]:
    """Return each experiment's bars: published, measured, and the variants whose rows have a ``bar``."""
    rows = _rows(folder / "rows.yaml")
    variants = {key: row["bar"] for key, row in rows.items() if "bar" in row}
    return [
        _panel(folder, name, rows, {key: bar for key, bar in variants.items() if _experiment(key, names) == name})
        for name in names
    ]


def _experiment(key: str, names: list[str]) -> str:
    """Return the experiment that a row is a variant of: the longest name that its own begins with."""
    return max((name for name in names if Path(key).name.startswith(name)), key=len, default="")


def _panel(folder: Path, name: str, rows: dict[str, dict[str, Any]], variants: dict[str, str]) -> Panel:
    labels = {name: "", f"paper/{name}": "", **variants}
    published = {}
    for key, label in labels.items():
        if "published_value" in rows.get(key, {}):
            value = rows[key]["published_value"]
            text = ", ".join(filter(None, ("published", label)))
            published[text] = Bar(text, "published", *_finite(value), f"{value:g}")
    drawn = list(published.values()) or [Bar("published", "published", None, None, "not in this measure")]
    record = _record(folder / f"{name}.json") if (folder / f"{name}.json").exists() else None
    if record is None:
        drawn.append(Bar("measured here", "measured", None, None, "not run"))
    else:
        drawn.append(_bars("measured here", "measured", record)[0])
    labels = {f"paper/{name}": "here, the paper's schedule", **variants}
    for key, label in labels.items():
        if (folder / f"{key}.json").exists():
            kind = "measured" if key == f"paper/{name}" else "variant"
            drawn.append(_bars(label, kind, _record(folder / f"{key}.json"))[0])
    drawn += _bars("", "baseline", record)[1:] if record else []
    note = f"Here: {record['data']}; {record['steps']:,} steps." if record else ""
    return Panel(name, rows[name]["measure"], drawn, note)


def _bars(label: str, kind: str, record: dict[str, Any]) -> list[Bar]:
    """Return the bars of a record's value and of its baselines."""
    names = [label, *record["baselines"]]
    values = [record["value"], *record["baselines"].values()]
    halves = [record.get("interval"), *map(record.get("baseline_intervals", {}).get, record["baselines"])]
    numbers = zip(names, values, halves, amounts(record), strict=True)
    return [Bar(name, kind, *_finite(value, half), text) for name, value, half, text in numbers]


def _finite(value: float, half: float | None = None) -> tuple[float | None, float | None]:
    return (value, half) if math.isfinite(value) and math.isfinite(half or 0) else (None, None)


_FAULTS = """## Faults

Runs drawn from all experiments were killed, starved of disk, or interrupted at random, and taken up again. *Held* are
those that ended with the very weights of a run that was never disturbed. More of them: `python -m pytest
tests/test_faults.py -m campaign --campaign 50`."""


def faults(folder: Path) -> str:
    """Return the table of the fault campaign of ``faults.json``; an empty text if there is none."""
    path = folder / "faults.json"
    if not path.exists():
        return ""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [[row["fault"], f"{row['tried']:,}", f"{row['held']:,}"] for row in record["rows"]]
        said = f"Seed {record['seed']}, commit {record['commit']}, {record['machine']}:"
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{path} is not a record of a fault campaign ({error!r}): run it again") from error
    return f"{_FAULTS}\n\n{said}\n\n{_markdown([('fault', 'tried', 'held'), ['---'] * 3, *rows])}"


def benchmarks(folder: Path) -> str:
    """Return the tables of ``benchmarks/*.json``, which ``python -m benchmarks NAME --json`` wrote."""
    parts = []
    for path in sorted((folder / "benchmarks").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            header = list(record["rows"][0])
            rows = [[v if isinstance(v, str) else f"{v:.2f}" for v in row.values()] for row in record["rows"]]
            parts.append(f"`{record['name']}`, {record['device']}, torch {record['torch']}:\n")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is not a record of a benchmark ({error!r}): measure again") from error
        parts.append(_markdown([header, ["---"] * len(header), *rows]) + "\n")
    return "\n".join(parts).rstrip()


def _markdown(table: list[Any]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def fill(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the comments ``<!-- name -->`` and ``<!-- /name -->``."""
    head, tail = f"<!-- {name} -->", f"<!-- /{name} -->"
    if head not in text or tail not in text:
        raise InputError(f"a README has no {head} ... {tail} for the table to go between: add the two lines")
    return text[: text.index(head)] + f"{head}\n{content}\n{tail}" + text[text.index(tail) + len(tail) :]


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Return the README, the page of results and the papers' pages, with their tables made from the records."""
    folder = root / "results"
    texts = {path: path.read_text(encoding="utf-8") for path in (root / "README.md", folder / "README.md")}
    texts |= {path: path.read_text(encoding="utf-8") for path in sorted(root.glob("lightning_meta/*/README.md"))}
    content = {"results": experiments(folder), "benchmarks": benchmarks(folder), "faults": faults(folder)}
    for name, table in content.items():
        texts[folder / "README.md"] = fill(texts[folder / "README.md"], name, table)
    texts[root / "README.md"] = fill(texts[root / "README.md"], "results", main_runs(folder, configured(root)))
    for path, text in texts.items():
        for prefix in re.findall("<!-- results ([a-z0-9_]+) -->", text):
            texts[path] = fill(texts[path], f"results {prefix}", details(folder, prefix))
    return texts


def figures(root: Path = ROOT) -> dict[Path, list[Panel]]:
    """Return the panels of each paper's plot, ``results/PREFIX.svg``."""
    papers: dict[str, list[str]] = {}
    for name in configured(root):
        papers.setdefault(name.partition("_")[0], []).append(name)
    return {root / "results" / f"{paper}.svg": panels(root / "results", group) for paper, group in papers.items()}


def configured(root: Path) -> list[str]:
    """Return the experiments that have a configuration, in the order of their rows."""
    there = {path.stem for path in (root / "configs").glob("*.yaml")}
    return [name for name in _rows(root / "results" / "rows.yaml") if name in there]


def main(arguments: list[str], prog: str = "results", root: Path = ROOT) -> None:
    """Write the tables of the records in results/ into the README and the pages, and the plots into results/."""
    argparse.ArgumentParser(prog, description=main.__doc__).parse_args(arguments)
    for path, text in pages(root).items():
        write_text(path, text)
    for path, shown in figures(root).items():
        write_text(path, bars(path.stem, shown))
