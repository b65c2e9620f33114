import json
import re
import shlex

import pytest

from tests.conftest import CONFIGS, ROOT
from tools import results
from tools.plots import drawn

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
PAPERS = sorted((ROOT / "lightning_meta").glob("*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "fifth_paper.md", ROOT / "results" / "README.md", *PAPERS]


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = [line for block in BLOCKS for line in block.splitlines() if line.endswith("pytest")]
    assert command in ci
    assert ci.index("ruff format --check") < ci.index(command)
    assert "ruff check" in ci


def test_two_commands_set_up_and_train_and_draw():
    start, then = (shlex.split(line, comments=True) for line in BLOCKS[0].strip().splitlines())
    assert shlex.join(start) == "pip install -r requirements.txt '&&' python run.py fit --config configs/dfn_mnist.yaml"
    assert then == ["python", "run.py", "predict", *start[-2:]]


def test_a_picture_and_the_two_commands_are_on_the_first_page():
    top = README.splitlines()[:25]
    assert any(line.startswith("![") for line in top)
    assert "```" in top  # the block has ended


def test_it_is_short():
    assert len(README.splitlines()) < 250
    assert len(README) < 16_000


@pytest.mark.parametrize("name", CONFIGS)
def test_every_experiment_is_in_both_tables(name):
    tables = README.partition("## Results")
    assert f"| [`{name}`](configs/{name}.yaml) |" in tables[0]
    assert f"| `{name}` |" in tables[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        path = page.parent / name if name else page
        assert path.exists(), name
        headings = re.findall("^#+ (.*)", path.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], anchor


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.parent.name)
def test_the_page_of_a_paper_has_its_four_parts_and_its_plot(page):
    text = page.read_text()
    assert "**Claim.**" in text
    assert re.search("^## From the paper to the code\n(.+\n|\n)*?\\| paper \\| code \\|", text, re.MULTILINE)
    assert re.search("^#+ What differs from the paper", text, re.MULTILINE)
    assert re.search("^## Results", text, re.MULTILINE)
    assert "(../../results/README.md)" in text
    assert re.search(r"\.\./results/\w+\.svg\)", text)


def test_every_file_that_it_names_is_there():
    names = {word for block in BLOCKS for word in shlex.split(block, comments=True)}
    named = {name for name in names if name.endswith((".yaml", ".txt", ".py")) and "NAME" not in name}
    assert len(named) > 3
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_tables_are_those_of_the_records():
    for path, text in results.pages().items():
        assert text == path.read_text(), "run: python run.py results"


def test_the_plots_are_those_of_the_records():
    figures = results.figures()
    assert {path.name for path in figures} == {path.name for path in (ROOT / "results").glob("*.svg")}
    for path, panels in figures.items():
        assert drawn(path.read_text()) == json.loads(json.dumps(panels)), "run: python run.py results"
        assert path.stat().st_size < 150_000
        assert f"({path.name})" in (ROOT / "results" / "README.md").read_text()
        assert f"../../results/{path.name})" in "".join(page.read_text() for page in PAPERS)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_python_that_it_shows_runs(code, capsys):
    exec(code, {})


REQUIREMENTS = [
    requirement
    for name in ("requirements.txt", "requirements-dev.txt")
    for requirement in (ROOT / name).read_text().splitlines()
]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_requirements_are_pinned_exactly(requirement):
    assert re.fullmatch(r"[A-Za-z0-9_-]+(\[\w+\])?==[0-9.]+( *#.*)?", requirement)
