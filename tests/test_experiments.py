"""The contract that every experiment meets: add ``configs/NAME.yaml`` and ``tests/tiny/NAME.yaml`` to be under it."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_meta.cli import main
from tests.conftest import CONFIGS, DRAWN, ROOT, arguments

pytestmark = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Fits each experiment once; gives its run folder."""
    folders: dict[str, Path] = {}

    def fit(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with nullcontext() if name in DRAWN else pytest.warns(UserWarning, match="stand-in"):
                main(["fit", *arguments(name, folders[name])])
        return folders[name] / name

    return fit


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that training changes: weights, and the optimizer's state."""
    saved = torch.load(checkpoint, weights_only=True)
    state = {f"{i}.{k}": v for i, s in saved["optimizer_states"][0]["state"].items() for k, v in s.items()}
    return saved["state_dict"] | state


def same(one: Path, other: Path) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def child(argv: list[str], sabotage: int = 0) -> None:
    """A run in a process of its own; ``sabotage`` kills it in the middle of writing so-many-th checkpoint."""
    os.setsid()  # a group of its own, with the loader's workers
    multiprocessing.set_start_method("fork", force=True)  # for those workers, as in a run from the command line
    torch.set_num_threads(1)
    sys.argv = ["run.py"]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    save, count = torch.save, iter(range(1, 1000))

    def half_save(checkpoint, file):
        if next(count) != sabotage:
            return save(checkpoint, file)
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half_save
    main(argv)


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


def test_it_learns(name, tmp_path, capsys):
    """The model after 40 tiny steps is better than after one."""
    values = []
    for steps in (1, 40):
        more = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--last.every_n_steps=100"]
        main(["fit", *arguments(name, tmp_path, *more)])
        values.append(json.loads((tmp_path / name / "results.json").read_text())["value"])
    assert values[1] < values[0]


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


def test_the_library_loads_what_the_command_line_trained(name, fitted):
    saved = torch.load(fitted(name) / "checkpoints" / "best.ckpt", weights_only=True)
    module, cls = saved["hyper_parameters"]["_class_path"].rsplit(".", 1)
    cls = getattr(__import__(module, fromlist=[cls]), cls)
    model = cls.load_from_checkpoint(fitted(name) / "checkpoints" / "best.ckpt", weights_only=True)
    assert all(torch.equal(v, saved["state_dict"][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_with_the_very_weights(name, workers, fitted, tmp_path, processes):
    """SIGKILL at random moments, taken up until it ends; the moments differ from run to run on purpose."""
    options = [*arguments(name, tmp_path, f"--data.num_workers={workers}"), "--ckpt_path=last"]
    for longest in (1.0, 3.0, 4.0, 5.0, None):  # seconds; nothing ends within the first
        process = processes.Process(target=child, args=(["fit", *options],))
        process.start()
        process.join(longest and random.uniform(0.5, longest))
        if process.exitcode is not None:
            break
        with suppress(ProcessLookupError):  # on a busy machine it may not have begun its own group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    assert process.exitcode == 0
    for checkpoint in ("last.ckpt", "best.ckpt"):
        assert same(tmp_path / name / "checkpoints" / checkpoint, fitted(name) / "checkpoints" / checkpoint)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_former_one(name, fitted, tmp_path, processes):
    options = [*arguments(name, tmp_path), "--ckpt_path=last"]
    last = tmp_path / name / "checkpoints" / "last.ckpt"
    steps = []
    for sabotage in (4, 2, 3):  # the best one, the last one after it, another last one
        process = processes.Process(target=child, args=(["fit", *options], sabotage))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps.append(torch.load(last, weights_only=True)["global_step"])
    assert steps == sorted(steps)
    main(["fit", *options])
    assert same(last, fitted(name) / "checkpoints" / "last.ckpt")


def test_ctrl_c_stops_with_a_last_checkpoint_and_resumes(name, fitted, tmp_path, processes):
    options = [*arguments(name, tmp_path, "--data.num_workers=1"), "--ckpt_path=last"]
    last = tmp_path / name / "checkpoints" / "last.ckpt"
    process = processes.Process(target=child, args=(["fit", *options],))
    process.start()
    while not last.exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert 0 < torch.load(last, weights_only=True)["global_step"] < 8
    main(["fit", *options])
    assert same(last, fitted(name) / "checkpoints" / "last.ckpt")


def test_two_ranks_equal_one_of_twice_the_batch(name, tmp_path):
    """Two processes (gloo), stopped in mid-horizon and taken up, against one that was not stopped.

    In float64, where "to rounding" is sharp: Adam makes much of the rounding of a gradient that is nearly zero.
    """
    common = ["--trainer.precision=64-true"]
    main(["fit", *arguments(name, tmp_path / "one", *common, "--data.batch_size=4")])
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu", "--data.batch_size=2"]
    command = [sys.executable, str(ROOT / "run.py"), "fit", *arguments(name, tmp_path / "two", *common, *ddp)]
    last = tmp_path / "two" / name / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (last.exists() and torch.load(last, weights_only=True)["global_step"] >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--ckpt_path=last"], check=True, capture_output=True, timeout=240)
    one, two = (json.loads((tmp_path / run / name / "results.json").read_text()) for run in ("one", "two"))
    assert two["processes"] == 2
    assert two["value"] == pytest.approx(one["value"], rel=1e-9)
    one, two = (torch.load(tmp_path / run / name / "checkpoints" / "last.ckpt") for run in ("one", "two"))
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-8, atol=1e-11)


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


def test_the_paper_overlay_insists_on_the_papers_data(name, tmp_path, capsys):
    if name in DRAWN:
        pytest.skip("its data are drawn")
    overlay = ROOT / "configs" / "paper" / f"{name}.yaml"
    options = ["fit", *arguments(name, tmp_path), f"--config={overlay}", "--data.download=false"]
    with pytest.raises(SystemExit) as stop:
        main(options)
    message = str(stop.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert str(tmp_path / "no-data") in message


def test_a_checkpoint_of_another_experiment_is_refused(name, tmp_path):
    stranger = tmp_path / "stranger.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "global_step": 1}, stranger)
    for verb in ("fit", "test"):
        with pytest.raises(SystemExit, match="from another experiment or of other sizes"):
            main([verb, *arguments(name, tmp_path), f"--ckpt_path={stranger}"])
    assert not (tmp_path / name).exists()
