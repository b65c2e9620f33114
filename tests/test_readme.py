import re
import shlex

import pytest

from lightning_meta import results
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = [line for block in BLOCKS for line in block.splitlines() if line.endswith("pytest")]
    assert command in ci
    assert ci.index("ruff format --check") < ci.index(command)
    assert "ruff check" in ci


def test_the_first_command_sets_up_and_trains():
    assert BLOCKS[0].strip() == ("pip install -r requirements.txt && python run.py fit --config configs/dfn_mnist.yaml")


def test_every_file_that_it_names_is_there():
    names = {word for block in BLOCKS for word in shlex.split(block, comments=True)}
    named = {name for name in names if name.endswith((".yaml", ".txt", ".py")) and "NAME" not in name}
    named |= set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    assert len(named) > 3
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_tables_are_those_of_the_records():
    for path, text in results.pages().items():
        assert text == path.read_text(), "run: python run.py results"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_python_that_it_shows_runs(code, capsys):
    exec(code, {})


@pytest.mark.parametrize("requirement", (ROOT / "requirements.txt").read_text().splitlines())
def test_requirements_are_pinned_exactly(requirement):
    assert re.fullmatch(r"[A-Za-z0-9_-]+(\[\w+\])?==[0-9.]+( *#.*)?", requirement)
