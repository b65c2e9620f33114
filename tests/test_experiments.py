"""The contract that every experiment meets: add ``configs/NAME.yaml`` and ``tests/tiny/NAME.yaml`` to be under it.

What may happen to a run is in ``test_faults.py``.
"""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_meta.cli import main
from lightning_meta.storage.names import full_path
from tests.conftest import CONFIGS, DRAWN, ROOT, arguments, some
from tests.runs import at_hook, free_port, signals, two_nodes, two_ranks

QUICK = ("dfn_steerable", "hyper_enwik8", "l2l_quadratic", "learnet_omniglot")  # one of each paper
every = pytest.mark.parametrize("name", CONFIGS)


@every
def test_fit_leaves_a_record_that_says_what_it_is(name, fitted):
    folder = fitted(name)
    record = json.loads((folder / "results.json").read_text())
    for key in ("measure", "unit", "data", "device", "precision", "processes", "commit", "torch"):
        assert key in record
    assert ("stand-in" in record["data"]) == (name not in DRAWN)
    assert record["steps"] > 0
    assert record["seed"] == 0
    assert record["parameters"] > 0
    assert record["samples"] > 0
    assert record["seconds"] >= 0
    assert record["value"] == record["value"]  # a number, not NaN
    assert record["baselines"]
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert ("stand-in" in (folder / "hparams.yaml").read_text()) == (name not in DRAWN)
    assert (folder / "config.yaml").exists()


@every
def test_tensorboard_has_scalars_and_pictures_of_every_validation(name, fitted):
    board = EventAccumulator(str(fitted(name)), size_guidance={"images": 0})
    board.Reload()
    tags = board.Tags()
    assert any(tag.startswith("train/") for tag in tags["scalars"])
    validations = [tag for tag in tags["scalars"] if tag.startswith("val/")]
    assert validations
    images = [tag for tag in tags["images"] if not tag.startswith("test/")]
    assert images
    for tag in images:
        assert [image.step for image in board.Images(tag)] == [v.step + 1 for v in board.Scalars(validations[0])]


@pytest.mark.parametrize("name", QUICK)
def test_forty_tiny_steps_are_better_than_one(name, tmp_path):
    values = []
    for steps in (1, 40):
        more = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--last.every_n_steps=100"]
        main(["fit", *arguments(name, tmp_path, *more)])
        values.append(json.loads((tmp_path / name / "results.json").read_text())["value"])
    assert values[1] < values[0]


@every
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_every_verb_runs_from_a_checkpoint(name, verb, fitted, tmp_path):
    shutil.copytree(fitted(name), tmp_path / name)
    config = (tmp_path / name / "config.yaml").read_bytes()
    before = (tmp_path / name / "results.json").read_bytes()
    main([verb, *arguments(name, tmp_path)])
    assert (tmp_path / name / "config.yaml").read_bytes() == config
    if verb == "test":
        again, record = json.loads((tmp_path / name / "results.json").read_text()), json.loads(before)
        assert again["value"] == record["value"]
        assert again["steps"] == record["steps"]
    if verb == "predict":
        written = list((tmp_path / name / "predictions").iterdir())
        assert written
        assert all(path.stat().st_size > 100 for path in written)


@every
def test_the_library_loads_what_the_command_line_trained(name, fitted):
    saved = torch.load(fitted(name) / "checkpoints" / "best.ckpt", weights_only=True)
    module, cls = full_path(saved["hyper_parameters"]["_class_path"]).rsplit(".", 1)
    cls = getattr(__import__(module, fromlist=[cls]), cls)
    model = cls.load_from_checkpoint(fitted(name) / "checkpoints" / "best.ckpt", weights_only=True)
    assert all(torch.equal(v, saved["state_dict"][k]) for k, v in model.state_dict().items())


DDP = ("--trainer.precision=64-true", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--data.batch_size=2")


def equal_to_rounding(one: Path, two: Path) -> None:
    """Adam makes much of the rounding of a gradient that is nearly zero."""
    records = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    assert records[1]["processes"] == 2
    assert records[1]["value"] == pytest.approx(records[0]["value"], rel=1e-9)
    checkpoints = [torch.load(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (one, two)]
    for key, value in checkpoints[0].items():
        torch.testing.assert_close(checkpoints[1][key], value, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", some(QUICK, pytest.mark.slow))
def test_two_ranks_equal_one_of_twice_the_batch(name, fitted_in_float64, tmp_path, processes):
    """Two processes (gloo), killed in mid-horizon and taken up, against one that was not stopped."""
    kill = partial(at_hook, "on_train_batch_start", 3, partial(signals, signal.SIGKILL))
    assert two_ranks(processes, name, tmp_path, *DDP, sabotage=kill) == [-signal.SIGKILL] * 2
    last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert two_ranks(processes, name, tmp_path, *DDP) == [0, 0]
    equal_to_rounding(fitted_in_float64(name), tmp_path / name)


@pytest.mark.parametrize("name", some(QUICK[:1], pytest.mark.campaign))
def test_two_nodes_equal_one_of_twice_the_batch(name, fitted_in_float64, tmp_path, processes):
    assert two_nodes(processes, name, tmp_path, *DDP) == [0, 0]
    equal_to_rounding(fitted_in_float64(name), tmp_path / name)


@pytest.mark.slow
def test_lightning_starts_the_second_rank(fitted_in_float64, tmp_path):
    options = arguments(QUICK[0], tmp_path, *DDP, "--trainer.devices=2")
    subprocess.run([sys.executable, str(ROOT / "run.py"), "fit", *options], check=True, capture_output=True)
    equal_to_rounding(fitted_in_float64(QUICK[0]), tmp_path / QUICK[0])


@pytest.mark.slow
def test_torchrun_starts_two_nodes(fitted_in_float64, tmp_path):
    """Here on one machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--master_addr=127.0.0.1"]
    torchrun.append(f"--master_port={free_port()}")
    command = [str(ROOT / "run.py"), "fit", *arguments(QUICK[0], tmp_path, *DDP)]
    command += ["--trainer.num_nodes=2", "--trainer.devices=1"]
    nodes = [
        subprocess.Popen(
            [*torchrun, f"--node_rank={rank}", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for rank in range(2)
    ]
    assert [node.wait(240) for node in nodes] == [0, 0]
    equal_to_rounding(fitted_in_float64(QUICK[0]), tmp_path / QUICK[0])


@pytest.mark.parametrize("name", some(QUICK, pytest.mark.slow))
def test_accumulated_gradients_and_bf16(name, fitted, tmp_path):
    more = ["--trainer.accumulate_grad_batches=2", "--trainer.precision=bf16-mixed", "--trainer.max_steps=4"]
    main(["fit", *arguments(name, tmp_path, *more)])
    record = json.loads((tmp_path / name / "results.json").read_text())
    assert record["precision"] == "bf16-mixed"
    reference = json.loads((fitted(name) / "results.json").read_text())
    assert record["value"] == pytest.approx(reference["value"], rel=0.5)
    last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert last["schedule"]["batch"] == 8
    assert all(v.dtype == torch.float32 for v in last["state_dict"].values() if v.is_floating_point())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in DRAWN])
def test_the_paper_overlay_insists_on_the_papers_data(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight: weight)  # takes long for the paper's sizes
    overlay = ROOT / "configs" / "paper" / f"{name}.yaml"
    options = ["fit", *arguments(name, tmp_path), f"--config={overlay}"]
    with pytest.raises(SystemExit) as stop:
        main(options)
    message = str(stop.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert str(tmp_path / "no-data") in message


@every
def test_a_checkpoint_of_another_experiment_is_refused(name, tmp_path):
    stranger = tmp_path / "stranger.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "global_step": 1}, stranger)
    for verb in ("fit", "test"):
        with pytest.raises(SystemExit, match="from another experiment or of other sizes"):
            main([verb, *arguments(name, tmp_path), f"--ckpt_path={stranger}"])
    assert not (tmp_path / name).exists()
