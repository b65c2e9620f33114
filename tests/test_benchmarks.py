import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import (
    decoding,
    hyper_lstm,
    hyper_resnet,
    learnet_layer,
    local_filtering,
    meta_step,
    one_shot,
    training_step,
)
from benchmarks.__main__ import main
from benchmarks.report import report
from lightning_meta.hypernetworks import HyperLSTM
from lightning_meta.learnets.layers import FactorisedConv2d
from tools.results import benchmarks


def test_the_list_names_every_benchmark(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert "local_filtering" in printed
    assert "training_step" in printed
    assert "one_shot" in printed
    with pytest.raises(SystemExit, match="choose one of these"):
        main(["elsewhere"])


def test_without_a_name_none_runs_that_takes_hours(monkeypatch):
    ran = []
    for module in (
        decoding,
        hyper_lstm,
        hyper_resnet,
        learnet_layer,
        local_filtering,
        meta_step,
        one_shot,
        training_step,
    ):
        monkeypatch.setattr(module, "main", lambda arguments, module=module: ran.append(module))
    main([])
    assert ran == [decoding, hyper_lstm, hyper_resnet, learnet_layer, local_filtering, meta_step, training_step]
    main(["one_shot"])
    assert ran[-1] is one_shot


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


def test_forms_of_a_predicted_layer_compute_the_same():
    layer = FactorisedConv2d(2, 3, 3, bias=False).double()
    x, filters = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    wanted = layer(x, filters)
    torch.testing.assert_close(learnet_layer.one_at_a_time(layer, x, filters), wanted)
    kernels = torch.einsum("od,bdhw,di->boihw", layer.M_prime.weight[..., 0, 0], filters, layer.M.weight[..., 0, 0])
    torch.testing.assert_close(learnet_layer.full_convolution(x, kernels), wanted)


def test_rows_of_a_predicted_layer():
    options = argparse.Namespace(device="cpu", repeats=1)
    rows = learnet_layer.measure(learnet_layer.Setting("tiny", 2, 2, 3, 3, 6, 5), options)
    assert [row["x ours"] == 1 for row in rows] == [True, False, True, False]
    assert all(row["peak MiB"] > 0 for row in rows)
    assert [row["predicted values"] for row in rows] == ["27", "27", "27", "54"]
    assert [row["head's parameters"] for row in rows] == ["", "", f"{6 * 27}", f"{6 * 54}"]


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_hyper_lstm_step_by_step_computes_the_same(layer_norm):
    lstm = HyperLSTM(3, 5, hyper_size=4, embedding_size=2, layer_norm=layer_norm).double()
    for weight in lstm.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(hyper_lstm.step_by_step(lstm.cells[0], x), lstm(x)[0])


def test_rows_of_a_hyper_lstm():
    options = argparse.Namespace(device="cpu", repeats=1)
    rows = hyper_lstm.measure(hyper_lstm.Setting("tiny", 2, 3, 4, 5, 3, 2), options)
    forms = ["torch.nn.LSTM", "HyperLSTM", "HyperLSTM, layer norm", "step by step", "step by step, layer norm"]
    assert [row["form"] for row in rows] == forms + ["labml-nn, layer norm"] * bool(find_spec("labml_nn"))
    assert [row["form"] for row in rows if row["x torch.nn.LSTM"] == 1] == ["torch.nn.LSTM"]
    assert all(row["ms"] > 0 and row["peak MiB"] > 0 for row in rows)


def test_rows_of_a_hyper_residual_network():
    options = argparse.Namespace(device="cpu", repeats=1)
    rows = hyper_resnet.measure("10-1", 10, 1, 2, options)
    assert [row["form"] for row in rows] == ["plain", "hyper", "hyper, layer by layer"]
    assert [row["x plain"] == 1 for row in rows] == [True, False, False]
    assert all(row["ms"] > 0 and row["peak MiB"] > 0 for row in rows)
    assert rows[1]["parameters"] == rows[2]["parameters"] != rows[0]["parameters"]
    one, other = (make(True, 10).eval() for make, hyper in hyper_resnet.FORMS.values() if hyper)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(one(x)[0], other(x)[0])


@pytest.mark.parametrize("network", ["lstm", "hyper_lstm"])
def test_rows_of_decoding(network):
    options = argparse.Namespace(device="cpu", repeats=1)
    rows = decoding.measure(decoding.Setting("tiny", network, 9, 6, 3, 2, length=4, sentences=3, beam=2), options)
    assert [row["form"] for row in rows] == ["greedy", "beam of 2", "beam of 2, one at a time"]
    assert rows[0]["x time of greedy"] == 1
    assert all(row["sentences/s"] > 0 for row in rows)


@pytest.fixture
def fits(monkeypatch):
    """What was asked of ``fit``, which only leaves a record: its error is 30 with seed 0, 31 with seed 1."""
    asked = []

    def fit(arguments):
        given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        asked.append(given)
        if given["--model.metric"] == "euclidean" and given.get("--model.lr") == "inf":
            raise SystemExit("error: the loss is nan")
        logger = "--trainer.logger.init_args"
        folder = Path(given[f"{logger}.save_dir"], given[f"{logger}.name"])
        folder.mkdir(parents=True)
        record = {"experiment": folder.name, "measure": "20-way", "data": "made up", "steps": 7, "seconds": 90}
        (folder / "results.json").write_text(json.dumps(record | {"value": 30.0 + int(given["--seed_everything"])}))

    monkeypatch.setattr(one_shot.cli, "main", fit)
    return asked


def test_one_shot_runs_what_is_missing_and_shows_it_beside_the_paper(tmp_path, fits, capsys):
    to = [f"--out={tmp_path / 'runs'}", f"--json={tmp_path / 'results'}"]
    one_shot.main([*to, "--steps", "7", "--root", "there", "--", "--model.trunk=deep"])
    assert len(fits) == 16
    assert {run["--model.loss"] for run in fits[:-1]} == {"logistic"}
    assert fits[-1]["--model.loss"] == "softmax"
    assert fits[-1]["--model.metric"] == "squared_euclidean"
    expected = {"--trainer.max_steps": "7", "--timer.duration": "null", "--data.root": "there", "--model.trunk": "deep"}
    assert all(expected.items() <= run.items() for run in fits)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["learnet", "weighted l1", "30.0", "28.6", "7", "1.5"] in rows
    assert ["siamese", "euclidean", "30.0", "37.3 ?", "7", "1.5"] in rows
    assert len(list((tmp_path / "results").iterdir())) == 16

    one_shot.main([*to, "--only", "learnet", "--seeds", "0", "1", "--seconds", "90000"])
    assert len(fits) == 19, "three of seed 1; those of seed 0 were there"
    assert fits[-1]["--timer.duration"] == "01:01:00:00"
    assert fits[-1]["--ckpt_path"] == "last"
    assert "30.5 (30.0, 31.0)" in capsys.readouterr().out
    for seed in (0, 1):
        record = json.loads((tmp_path / "results" / f"learnet_omniglot_learnet_euclidean_{seed}.json").read_text())
        assert record["value"] == 30 + seed


def test_one_shot_goes_on_after_a_run_that_fails(tmp_path, fits, capsys):
    options = [f"--out={tmp_path}", "--only", "siamese"]
    with pytest.raises(SystemExit, match="1 run stopped"):
        one_shot.main([*options, "--", "--model.lr=inf"])
    printed = capsys.readouterr()
    assert "the loss is nan" in printed.err
    assert "weighted l1" in printed.out
    assert len(fits) == 3
    one_shot.main(options)
    assert len(fits) == 4
