import json
import re

import pytest

from lightning_meta.errors import InputError
from tools.plots import Bar, Panel, bars, drawn
from tools.results import benchmarks, details, experiments, faults, figures, fill, main, main_runs, panels

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
    with pytest.raises(SystemExit) as stop:
        main(["--help-me"])
    assert stop.value.code == 2


ROWS = """
toy_one: {run: default, measure: nats}
paper/toy_one: {run: paper, measure: nats, published: 99 (table 3), published_value: 99}
toy_one_small: {run: small, measure: nats, bar: small twin, published_value: 120.5}
toy_two: {run: default, measure: '%'}
"""
FAULTS = {"seed": 7, "commit": "abc", "machine": "a machine", "rows": [{"fault": "kill", "tried": 1200, "held": 1199}]}


@pytest.fixture
def root(tmp_path):
    """A small project: a page of each kind, two experiments, one of them with a variant, and a record."""
    for folder in ("results", "configs", "lightning_meta/toys"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("toy_one", "toy_two"):
        (tmp_path / "configs" / f"{name}.yaml").touch()
    (tmp_path / "results" / "rows.yaml").write_text(ROWS)
    (tmp_path / "results" / "toy_one.json").write_text(
        json.dumps(RECORD | {"baselines": {"worst": 300.0, "best": 200}})
    )
    places = {"README.md": ["results"], "results/README.md": ["results", "benchmarks", "faults"]}
    for page, names in (places | {"lightning_meta/toys/README.md": ["results toy"]}).items():
        (tmp_path / page).write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    return tmp_path


def test_the_main_table_has_a_row_an_experiment_and_its_best_baseline(root):
    assert main_runs(root / "results", ["toy_one", "toy_two"]).splitlines()[2:] == [
        "| `toy_one` | nats | 99 (table 3) | **123.5** | best 200 | MNIST | 2,000 |",
        "| `toy_two` | % |  | not run |  |  |  |",
    ]


def test_panels_have_what_was_published_measured_and_not_run(root):
    (root / "results" / "toy_one_small.json").write_text(json.dumps(RECORD | {"value": 150, "interval": 2.5}))
    one, two = panels(root / "results", ["toy_one", "toy_two"])
    assert one.bars == [
        Bar("published", "published", 99, None, "99"),
        Bar("published, small twin", "published", 120.5, None, "120.5"),
        Bar("measured here", "measured", 123.45, None, "123.5"),
        Bar("small twin", "variant", 150, 2.5, "150 ± 2.5"),
        Bar("worst", "baseline", 300, None, "300"),
        Bar("best", "baseline", 200, None, "200"),
    ]
    assert "MNIST" in one.note
    assert [bar.text for bar in two.bars] == ["not in this measure", "not run"]
    assert not any(bar.value for bar in two.bars)


def test_a_run_of_the_papers_schedule_has_a_bar(root):
    (root / "results" / "paper").mkdir()
    (root / "results" / "paper" / "toy_one.json").write_text(json.dumps(RECORD | {"value": float("nan")}))
    labels = {bar.label: bar for bar in panels(root / "results", ["toy_one"])[0].bars}
    assert labels["here, the paper's schedule"] == Bar("here, the paper's schedule", "measured", None, None, "nan")


def test_a_plot_is_the_same_every_time_and_says_what_it_shows():
    values = {"tiny": 0.001, "large": 900.0, "negative": -3.5, "unknown": None}
    for chosen in (["tiny", "large"], ["large", "negative", "unknown"], ["negative"], ["unknown"]):
        shown = [Bar(f"<{name}> & more", "measured", values[name], None, name) for name in chosen]
        panel = Panel("a title", "nats", shown, "a note that is so long that it " + "goes on " * 20)
        svg = bars("two", [panel, panel._replace(bars=[*shown, Bar("other", "published", 1.0, 0.5, "1")]), panel])
        assert svg == bars("two", drawn_as_panels(svg))
        assert "<dc:date>" not in svg
        assert "<text" not in svg  # letters are paths
        assert (chosen == ["tiny", "large"]) == ("<!-- log scale -->" in svg)


def drawn_as_panels(svg):
    return [Panel(title, measure, [Bar(*bar) for bar in shown], note) for title, measure, shown, note in drawn(svg)]


def test_bars_are_as_long_as_their_values():
    """Linear and from zero: the one twice as large is twice as long."""
    shown = [Bar("one", "measured", 2.0, None, "2"), Bar("two", "variant", 4.0, None, "4")]
    svg = bars("lengths", [Panel("a", "b", shown, "")])
    lengths = []
    for colour in ("#0072b2; stroke: #0072b2", "#8cc9ec"):
        outlines = re.findall(r'<path d="([^"]+)"[^>]*style="fill: ' + colour, svg)
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", outlines[0])]  # the legend comes later
        lengths.append(max(xs) - min(xs))
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.05)


def test_faults_are_shown_where_there_was_a_campaign(root):
    folder = root / "results"
    assert faults(folder) == ""
    (folder / "faults.json").write_text(json.dumps(FAULTS))
    assert "Seed 7, commit abc, a machine:" in faults(folder)
    assert faults(folder).endswith("| kill | 1,200 | 1,199 |")
    assert "faults" not in experiments(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rows": [{}]}', json.dumps(FAULTS | {"rows": [{"fault": "kill"}]})]
)
def test_what_is_no_record_of_faults_or_of_a_benchmark_is_named(root, content):
    (root / "results" / "faults.json").write_text(content)
    with pytest.raises(InputError, match=r"faults.json is not a record of a fault campaign.*run it again"):
        faults(root / "results")
    (root / "results" / "benchmarks").mkdir()
    (root / "results" / "benchmarks" / "speed.json").write_text(content)
    with pytest.raises(InputError, match=r"speed.json is not a record of a benchmark.*measure again"):
        benchmarks(root / "results")


@pytest.mark.parametrize("field", ["published_value: many", "bar: 3"])
def test_rows_that_cannot_be_drawn_are_named(root, field):
    (root / "results" / "rows.yaml").write_text(f"toy_one: {{run: a, measure: b, {field}}}")
    with pytest.raises(InputError, match=field.partition(":")[0]):
        panels(root / "results", ["toy_one"])


def test_the_command_writes_pages_and_plots_and_again_the_same(root):
    main([], root=root)
    (plot,) = figures(root)
    assert plot == root / "results" / "toy.svg"
    assert "**123.5**" in (root / "README.md").read_text()
    assert "small" in (root / "results" / "README.md").read_text()
    assert "cross-entropy, nats" in (root / "lightning_meta" / "toys" / "README.md").read_text()
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    main([], root=root)
    assert files == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
