import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import safe_open

import lightning_meta
from lightning_meta.hypernetworks import text_data, translation_data
from lightning_meta.learnets.tracking_data import LAYOUTS
from lightning_meta.sources.data_terms import UNKNOWN, terms
from lightning_meta.storage.weights import shipped
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAPERS = sorted((ROOT / "lightning_meta").glob("*/README.md"))


def ranges(*lists: list[str]) -> dict[str, Requirement]:
    """By name, without the extras of this package itself."""
    found = [Requirement(text) for requirements in lists for text in requirements]
    return {canonicalize_name(one.name): one for one in found if one.name != PROJECT["name"]}


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return ranges([line.partition("#")[0] for line in lines])


@pytest.mark.parametrize(
    ("file", "declared"),
    [
        ("requirements.txt", ranges(PROJECT["dependencies"])),
        ("requirements-dev.txt", ranges(EXTRAS["test"], EXTRAS["onnx"])),
    ],
)
def test_pinned_versions_are_in_the_ranges(file, declared):
    pinned = pins(file)
    assert pinned.keys() == declared.keys()
    for name, requirement in declared.items():
        (pin,) = pinned[name].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement} and {file}: {pin}"
        assert requirement.extras == pinned[name].extras


def test_no_release_is_excluded_without_a_reason():
    """Each upper bound has a comment on its line."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    bounded = [line for line in lines if re.search(r'^ *"[^"]*<', line)]
    assert any("jsonargparse" in line for line in bounded)
    assert all("#" in line for line in bounded)


def test_one_version():
    assert "version" in PROJECT["dynamic"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lightning_meta.__version__
    assert f"## {lightning_meta.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_the_package_is_cheap():
    code = "import sys, lightning_meta; print('torch' in sys.modules, lightning_meta.__version__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", lightning_meta.__version__]


@pytest.mark.parametrize("command", [["run.py"], ["-m", "lightning_meta"]])
def test_the_command_is_the_same_in_a_clone_and_as_a_module(command):
    command = [sys.executable, *command, "catalogue"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split() == [*shipped()]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    pages = {path.read_text().splitlines()[0].removeprefix("# "): path.read_text() for path in PAPERS}
    assert {reference["title"] for reference in citation["references"]} == pages.keys()
    for reference in citation["references"]:
        page = pages[reference["title"]].partition("**Claim.**")[0]
        assert reference["url"] in page
        assert reference["identifiers"][0]["value"] == "arXiv:" + reference["url"].rpartition("/")[2]
        assert re.search(rf" {reference['year']}\b", page)
        for author in reference["authors"]:
            assert author["family-names"].split()[-1] in page


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "the lightning_meta authors" in text
    assert PROJECT["license-files"] == ["LICENSE"]


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_before_a_commit_runs_what_ci_checks():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert all(hook["language"] == "system" for hook in repository["hooks"]), "nothing is fetched"
    checks = {line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith(("ruff ", "mypy"))}
    assert checks >= {"ruff check", "ruff format --check", "mypy"}
    assert {hook["entry"] for hook in repository["hooks"]} >= checks


@pytest.mark.parametrize("name", shipped())
def test_every_card_names_the_terms_of_its_data(name):
    with safe_open(shipped()[name], "pt") as file:
        data = json.loads(file.metadata()["notes"])["data"].rpartition("; ")[0]
    assert terms(data) != UNKNOWN
    assert f"\n- **Terms of the data:** {terms(data)}\n" in shipped()[name].with_suffix(".md").read_text()


def test_the_terms_of_all_named_data_sets_are_known():
    corpora = [f"{name} by characters" for name in text_data.NAMES.values()]
    names = ["MNIST", "CIFAR-10", "Omniglot", "IAM-OnDB", *corpora, *translation_data.NAMES.values()]
    layouts = [layout.name for layout in LAYOUTS.values()]
    records = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
    stand_ins = {record["data"].rpartition("; ")[0] for record in records if "stand-in" in record.get("data", "")}
    assert len(stand_ins) > 5
    for name in [*names, *layouts, *stand_ins]:
        assert terms(name) != UNKNOWN, name


def test_the_terms_of_other_data_are_not_made_up():
    assert terms("mine.txt by characters, 90/5/5 %") == UNKNOWN
    assert terms("mine, a stand-in for MNIST") == UNKNOWN
    assert terms("MNIST; mine") == UNKNOWN
    both = "bundled photographs, a stand-in for paintings", "VGG-16 with ImageNet weights (a)"
    assert terms("; ".join(both)) == f"{terms(both[0])} {terms(both[1])}"
