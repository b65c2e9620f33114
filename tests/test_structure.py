"""Who may know whom, and what every experiment brings with it."""

import ast
import inspect
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from lightning_meta.storage.names import full_path
from tests.conftest import CONFIGS, ROOT

PACKAGE = ROOT / "lightning_meta"
PAPERS = [path.name for path in PACKAGE.iterdir() if (path / "layers.py").exists()]


FLOORS = [  # rooms of the package, from the ground up: a room knows only those below its own floor
    ["errors"],
    ["nn"],
    ["sources", "storage"],
    ["drawing"],
    ["running"],
    PAPERS,
    ["catalogue", "command_help"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    """Papers do not know one another, sources know no paper, and the rest of the floor plan."""
    ours = room(path)
    for name in (name for name in imports(path) if name.startswith("lightning_meta.")):
        theirs = name.split(".")[1]
        assert theirs == ours or FLOOR[theirs] < FLOOR[ours], f"{ours} must not import {name}"


@pytest.mark.parametrize("paper", PAPERS)
def test_layers_and_operators_know_no_lightning(paper):
    plain = [PACKAGE / paper / "layers.py", *(PACKAGE / paper / "ops").glob("*.py"), *(PACKAGE / "nn").glob("*.py")]
    for path in plain:
        found = imports(path)
        assert not any(name.split(".")[0] == "lightning" for name in found), path
        rooms = {name.split(".")[1] for name in found if name.startswith("lightning_meta.")}
        assert rooms <= {paper, "nn", "errors"}, path


@pytest.mark.parametrize("paper", PAPERS)
def test_a_paper_has_its_page(paper):
    assert (PACKAGE / paper / "README.md").exists()


def test_sources_know_no_lightning():
    for path in (PACKAGE / "sources").glob("*.py"):
        assert not any(name.split(".")[0] == "lightning" for name in imports(path)), path


@pytest.mark.parametrize("name", CONFIGS)
def test_every_experiment_has_its_files_and_its_rows(name):
    assert (ROOT / "configs" / "paper" / f"{name}.yaml").exists()
    assert (ROOT / "tests" / "tiny" / f"{name}.yaml").exists()
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert config["trainer"]["logger"]["init_args"]["name"] == name
    rows = yaml.safe_load((ROOT / "results" / "rows.yaml").read_text())
    assert {name, f"paper/{name}"} <= rows.keys()
    assert name in (ROOT / "README.md").read_text()
    assert name in (ROOT / "data" / "README.md").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_read(name):
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    paths = [full_path(config[part]["class_path"]).rpartition(".") for part in ("model", "data")]
    classes = [getattr(import_module(module), kind) for module, _, kind in paths]
    bases = {base for kind in classes for base in kind.__mro__ if base.__module__.startswith("lightning_meta")}
    read = set().union(*(options_read(Path(inspect.getfile(base))) for base in bases))
    for kind in (base for base in bases if "__init__" in vars(base)):
        for option in inspect.signature(kind).parameters.keys() - {"options"}:
            assert option in read or option in names_used(kind.__init__), f"{kind.__name__} does nothing with {option}"


def options_read(path: Path) -> set[str]:
    """Hyper-parameters that a module reads, as ``hparams.name``, ``h.name`` or ``h.get("name")``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] in ("h", "hparams"):
            found.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "h.get":
            found.add(ast.literal_eval(node.args[0]))
    return found


def names_used(function) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
