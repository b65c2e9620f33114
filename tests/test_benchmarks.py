import argparse
import json

import pytest

from benchmarks import local_filtering, training_step
from benchmarks.__main__ import main
from benchmarks.report import report
from lightning_meta.results import benchmarks


def test_the_list_names_every_benchmark(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert "local_filtering" in printed
    assert "training_step" in printed
    with pytest.raises(SystemExit, match="choose one of these"):
        main(["elsewhere"])


def test_rows_become_a_record_and_a_table(tmp_path, monkeypatch, capsys):
    options = argparse.Namespace(device="cpu", threads=1, repeats=1, json=tmp_path / "benchmarks" / "it.json")
    monkeypatch.setattr(training_step, "FORMS", dict(list(training_step.FORMS.items())[:1]))
    rows = local_filtering.measure(1, 1, 8, 3, "cpu", 1)
    assert {row["form"] for row in rows} >= {"ours, contiguous", "unfold"}
    assert all(row["ms"] > 0 and row["x bound"] > 0 for row in rows)
    report("it", rows, options)
    assert json.loads(options.json.read_text())["rows"] == rows
    table = benchmarks(tmp_path).splitlines()
    assert table[0].startswith("`it`, 1 threads of ")
    assert table[2].startswith("| setting | form | ms |")
    assert len(table) == 4 + len(rows)
    (row,) = training_step.measure(1, options)
    assert row["x faster than float32"] == 1
