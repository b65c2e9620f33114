"""Who may know whom, and what every experiment brings with it."""

import ast
from pathlib import Path

import pytest
import yaml

from tests.conftest import CONFIGS, ROOT

PACKAGE = ROOT / "lightning_meta"
PAPERS = [path.name for path in PACKAGE.iterdir() if (path / "layers.py").exists()]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def knows(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports(path))


@pytest.mark.parametrize("paper", PAPERS)
def test_papers_do_not_know_one_another_and_layers_know_no_lightning(paper):
    for path in (PACKAGE / paper).glob("*.py"):
        assert not any(knows(path, f"lightning_meta.{other}") for other in PAPERS if other != paper), path
    layers = PACKAGE / paper / "layers.py"
    assert not knows(layers, "lightning")
    assert not any(name.startswith("lightning_meta") for name in imports(layers))
    assert (PACKAGE / paper / "README.md").exists()


def test_shared_code_knows_no_paper_and_sources_no_lightning():
    shared = [*PACKAGE.glob("*.py"), *(PACKAGE / "sources").glob("*.py")]
    for path in shared:
        assert not any(knows(path, f"lightning_meta.{paper}") for paper in PAPERS), path
    for path in (PACKAGE / "sources").glob("*.py"):
        assert not knows(path, "lightning"), path


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
