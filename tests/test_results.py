import json

import pytest

from lightning_meta.errors import InputError
from lightning_meta.results import details, experiments, fill, main

RECORD = {
    "measure": "cross-entropy",
    "unit": "nats",
    "value": 123.45,
    "baselines": {"nothing": 200.0},
    "data": "MNIST",
    "samples": 1000,
    "steps": 2000,
    "seed": 3,
    "device": "a machine",
    "precision": "32-true",
    "seconds": 120,
}


@pytest.fixture
def folder(tmp_path):
    rows = "one: {run: default, measure: nats, published: 99}\npaper/one: {run: paper, measure: nats}\n"
    (tmp_path / "rows.yaml").write_text(rows)
    return tmp_path


def test_rows_without_a_record_say_so(folder):
    lines = experiments(folder).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| `one` | default | nats | 99 | not run |")
    (folder / "one.json").write_text(json.dumps(RECORD))
    lines = experiments(folder).splitlines()
    assert lines[2] == (
        "| `one` | default | nats | 99 | **123.5** | nothing 200 | MNIST, 1,000 samples | 2,000, seed 3 | "
        "a machine, 32-true, 2 min |"
    )
    assert "not run" in lines[3]


def test_records_that_cannot_be_shown_are_named(folder):
    (folder / "two.json").write_text(json.dumps(RECORD))
    with pytest.raises(InputError, match=r"two.json has no row"):
        experiments(folder)
    (folder / "two.json").unlink()
    (folder / "one.json").write_text("{}")
    with pytest.raises(InputError, match=r"one.json is not a record of a test: it has no 'measure'"):
        experiments(folder)


def test_details_show_every_measure_with_its_interval(folder):
    further = {
        "measure": "longer",
        "unit": "nats",
        "value": 0.123456,
        "interval": 0.0234,
        "baselines": {"Adam": 12345.6},
    }
    further["baseline_intervals"] = {"Adam": 100.0}
    (folder / "one.json").write_text(json.dumps(RECORD | {"further": [further]}))
    assert details(folder, "on").splitlines()[2:] == [
        "| `one` | cross-entropy, nats | **123.5** | nothing 200 |",
        "| `one` | longer, nats | **0.1235 ± 0.023** | Adam 12345.6 ± 1e+02 |",
    ]
    assert len(details(folder, "two").splitlines()) == 2


def test_filling_keeps_what_is_around():
    text = "a\n<!-- results -->\nold\n<!-- /results -->\nb"
    assert fill(text, "results", "new") == "a\n<!-- results -->\nnew\n<!-- /results -->\nb"
    with pytest.raises(InputError, match="add the two lines"):
        fill("nothing", "results", "new")


def test_results_takes_no_options():
    with pytest.raises(InputError, match="takes no options"):
        main(["--help-me"])
