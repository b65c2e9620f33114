"""The notebook: its cells run, and the outputs in the file are those of a run.

After a change: ``jupyter nbconvert --to notebook --execute --inplace tutorial.ipynb``, from the top folder.
"""

import json
import re
import sys

import matplotlib
import pytest

from tests.conftest import ROOT

FILE = ROOT / "tutorial.ipynb"
CELLS = json.loads(FILE.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_its_cells_run_in_order_and_end_in_a_record(tmp_path, monkeypatch, capsys):
    plots = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: (plots.append(len(plt.gcf().axes)), plt.close("all")))
    monkeypatch.setattr(sys, "argv", sys.argv)  # which a cell sets
    names = {}
    for cell in CODE:
        exec("".join(cell["source"]), names)
    matplotlib.use(backend)
    assert plots == [4, 1, 1, 16]
    assert names["errors"][-1] < 0.1 * names["errors"][0]
    curves = names["curves"]
    assert sum(curves["learned, nothing to tune"]) < min(sum(c) for name, c in curves.items() if "Adam" in name)
    record = names["record"]
    assert record["steps"] == 600
    assert record["value"] < 0.1 * record["baselines"]["mean filter (zero)"]
    assert "error" not in capsys.readouterr().err.lower()


def test_its_outputs_came_from_a_run_and_say_nothing_of_a_machine():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CODE)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert FILE.stat().st_size < 500_000
    said = [json.dumps(output.get("text", output.get("data", {}).get("text/plain"))) for output in outputs]
    assert not [text for text in said if re.search(r"(?<![\w.])/\w+/", text)]


@pytest.mark.parametrize("name", re.findall(r"\]\(([^)#]+)\)", FILE.read_text()))
def test_its_links_lead_somewhere(name):
    assert (ROOT / name).exists()
