import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_meta import catalogue, cli
from lightning_meta.cli import main
from lightning_meta.drawing.files import write_gif
from lightning_meta.dynamic_filters.moving_mnist_data import moving_digits, trajectory
from lightning_meta.dynamic_filters.video import VideoPrediction
from lightning_meta.sources.seeding import generator
from tests.conftest import CONFIGS, ROOT, arguments


@pytest.fixture(scope="module")
def trained(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(fitted("dfn_mnist"), folder / "dfn_mnist")
    return folder


def fingerprints(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def refused(folder: Path, verb: str, *more: str) -> str:
    """The one line that a mistake gets; nothing that was there has changed."""
    before = fingerprints(folder)
    with pytest.raises(SystemExit) as stop:
        main([verb, *arguments("dfn_mnist", folder, *more)])
    after = fingerprints(folder)
    assert {path: after.get(path) for path in before} == before
    assert isinstance(stop.value.code, str), "the message, with which Python exits with code 1"
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


def write_mnist(root: Path, images: int = 12) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = np.array([0x803, images, 28, 28], ">i4").tobytes()
        pixels = np.random.default_rng(0).integers(0, 256, images * 784, np.uint8).tobytes()
        (raw / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels))
        header = np.array([0x801, images], ">i4").tobytes()
        (raw / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(images)))
    return raw / "train-images-idx3-ubyte.gz"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, flip, shorten, into_folder])
def test_a_damaged_data_file_is_named(tmp_path, damage):
    path = write_mnist(tmp_path / "data")
    damage(path)
    assert path.name in refused(tmp_path, "fit", f"--data.root={tmp_path / 'data'}")


def test_a_file_where_the_data_folder_should_be(tmp_path):
    (tmp_path / "data").write_text("not a folder")
    for source in ("paper", "auto"):
        message = refused(tmp_path, "fit", f"--data.root={tmp_path / 'data'}", f"--data.source={source}")
        assert str(tmp_path / "data") in message


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(tmp_path, "fit", f"--trainer.logger.init_args.save_dir={tmp_path / 'file'}")
    assert "/proc" in refused(tmp_path, "fit", "--trainer.logger.init_args.save_dir=/proc/runs")


def test_a_loss_that_is_not_a_number(tmp_path):
    message = refused(tmp_path, "fit", "--model.lr=1e30")
    assert "lower --model.lr" in message
    last = torch.load(tmp_path / "dfn_mnist" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_without_a_checkpoint_nothing_but_fit_runs(tmp_path, verb):
    assert "train first" in refused(tmp_path, verb)
    assert "no checkpoint" in refused(tmp_path, verb, f"--ckpt_path={tmp_path / 'none.ckpt'}")


def test_a_checkpoint_of_other_sizes(trained):
    message = refused(trained, "test", "--model.width=6")
    assert "(24,) there" not in message
    assert "of other sizes: predictor.decoder.0.0.bias is (8,) there and (12,) in this configuration" in message


@pytest.mark.parametrize("part", ["optimizer_states", "lr_schedulers", "schedule"])
def test_weights_without_the_trainings_state_are_not_gone_on_with(trained, tmp_path, part):
    checkpoint = torch.load(trained / "dfn_mnist" / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({key: value for key, value in checkpoint.items() if key != part}, tmp_path / "part.ckpt")
    assert "has no training state" in refused(trained, "fit", f"--ckpt_path={tmp_path / 'part.ckpt'}")


def test_a_damaged_checkpoint(trained, tmp_path):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((trained / "dfn_mnist" / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    for verb in ("fit", "test"):
        assert "damaged" in refused(trained, verb, f"--ckpt_path={broken}")


def test_clips_that_cannot_be_used(trained, tmp_path):
    write_gif(tmp_path / "wide.gif", torch.randint(0, 256, (12, 64, 80), dtype=torch.uint8))
    write_gif(tmp_path / "short.gif", torch.randint(0, 256, (4, 64, 64), dtype=torch.uint8))
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0 ftypisom" + bytes(100))
    assert "80x64 pixels, the model is for 64x64" in refused(trained, "predict", f"--data.clip={tmp_path / 'wide.gif'}")
    assert "gives 4 frames" in refused(trained, "predict", f"--data.clip={tmp_path / 'short.gif'}")
    assert "broken.mp4" in refused(trained, "predict", f"--data.clip={tmp_path / 'broken.mp4'}")
    assert "none.gif" in refused(trained, "predict", f"--data.clip={tmp_path / 'none.gif'}")


@pytest.mark.parametrize("frames", [10, 13, 40])
@pytest.mark.parametrize("kind", ["gif", "mp4", "folder"])
def test_a_clip_of_the_users_own(trained, tmp_path, kind, frames):
    """Of 10 frames there is no truth to show, of 13 there are three, and what goes beyond 20 is not used."""
    shutil.copytree(trained / "dfn_mnist", tmp_path / "dfn_mnist")
    clip = torch.from_numpy(moving_digits([np.full((28, 28), 200, np.uint8)], [trajectory(frames, generator(0))]))
    path = tmp_path / f"clip.{kind}"
    if kind == "gif":
        write_gif(path, clip)
    elif kind == "mp4":
        write_mp4(path, clip)
    else:
        path.mkdir()
        for t, frame in enumerate(clip):
            Image.fromarray(frame.numpy()).save(path / f"{t}.png")
    main(["predict", *arguments("dfn_mnist", tmp_path, f"--data.clip={path}")])
    written = tmp_path / "dfn_mnist" / "predictions"
    assert sorted(p.name for p in written.iterdir()) == ["000_animation.gif", "000_flow.png", "000_frames.png"]
    heights = Image.open(written / "000_frames.png").height
    assert heights < 330 if frames == 10 else heights > 330, "two rows of frames, or three"
    assert Image.open(written / "000_animation.gif").n_frames <= 20


def write_mp4(path: Path, clip: torch.Tensor) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in clip:
            picture = av.VideoFrame.from_ndarray(frame.numpy(), format="gray")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_gradients_exist_in_every_verb(trained, tmp_path, monkeypatch, verb):
    """Under Lightning's default, inference mode, torch.func.grad gives zeros and says nothing."""
    shutil.copytree(trained / "dfn_mnist", tmp_path / "dfn_mnist")
    gradients = []
    forward = VideoPrediction.forward

    def adapting_forward(self, *args):
        gradients.append(torch.func.grad(torch.Tensor.square)(torch.tensor(3.0)).item())
        return forward(self, *args)

    monkeypatch.setattr(VideoPrediction, "forward", adapting_forward)
    main([verb, *arguments("dfn_mnist", tmp_path)])
    assert set(gradients) == {6.0}


def test_a_schedule_that_predicts_nothing(tmp_path):
    assert "at least 10" in refused(tmp_path, "fit", "--schedule.unroll=5")


def test_a_run_without_a_folder(tmp_path):
    assert "a run needs a folder" in refused(tmp_path, "fit", "--trainer.logger=false")


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *arguments("dfn_mnist", tmp_path, "--trainer.fast_dev_run=2")])
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_exist_end_with_code_2(tmp_path, capsys):
    for wrong in ("--model.init_args.widht=3", "--data.source=here", "--trainer.max_steps=x"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments("dfn_mnist", tmp_path, wrong)])
        assert stop.value.code == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("error: ")
        assert wrong.split("=")[0].split(".")[-1].strip("-") in error
    assert not list(tmp_path.iterdir())


def test_a_mistake_has_no_traceback_and_exit_code_1(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "test", *arguments("dfn_mnist", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: no ")


def test_a_new_run_moves_the_former_one_aside(tmp_path, capsys):
    steps = ["--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    for _ in range(3):
        main(["fit", *arguments("dfn_mnist", tmp_path, *steps)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dfn_mnist", "dfn_mnist.1", "dfn_mnist.2"]
    assert (tmp_path / "dfn_mnist.1" / "checkpoints" / "last.ckpt").exists()
    assert f"moved to {tmp_path / 'dfn_mnist.2'}" in capsys.readouterr().out


def test_resuming_stays_in_its_folder_and_trains_longer(tmp_path):
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    main(["fit", *arguments("dfn_mnist", tmp_path, *steps)])
    main(["fit", *arguments("dfn_mnist", tmp_path, *steps), "--ckpt_path=last", "--trainer.max_steps=4"])
    assert [p.name for p in tmp_path.iterdir()] == ["dfn_mnist"]
    checkpoints = tmp_path / "dfn_mnist" / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 4


def test_the_commands_it_ends_with_run(tmp_path, capsys):
    main(["fit", *arguments("dfn_mnist", tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1")])
    printed = capsys.readouterr().out
    assert "copy the last frame" in printed
    for line in ("predictions", "train longer"):
        command = next(text for text in printed.splitlines() if text.startswith(line)).split("python run.py ")[1]
        main(command.split())
    assert list((tmp_path / "dfn_mnist" / "predictions").glob("*.gif"))
    assert torch.load(tmp_path / "dfn_mnist" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_max_time_stops_training(tmp_path):
    more = ["--trainer.max_time={milliseconds: 1}", "--trainer.max_steps=100000"]
    main(["fit", *arguments("hyper_mnist", tmp_path, *more)])
    record = json.loads((tmp_path / "hyper_mnist" / "results.json").read_text())
    assert record["steps"] == 1


@pytest.mark.parametrize("seed", ["true", "false", "many"])
def test_a_seed_is_a_number(tmp_path, seed, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments("dfn_mnist", tmp_path, f"--seed_everything={seed}")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: seed_everything: Expected a int. Got value: ")


def test_output_that_cannot_be_encoded_does_not_end_a_command(fitted, tmp_path):
    shutil.copytree(fitted("hyper_mnist"), tmp_path / "hyper_mnist")  # its table has intervals, written with ±
    command = [sys.executable, str(ROOT / "run.py"), "test", *arguments("hyper_mnist", tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert b" ? " in done.stdout


def test_the_record_is_written_before_anything_is_printed(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "dfn_mnist", tmp_path / "dfn_mnist")
    (tmp_path / "dfn_mnist" / "results.json").unlink()

    def fails(*_):
        raise OSError("no terminal")

    monkeypatch.setattr("lightning_meta.running.callbacks.Console.print", fails)
    with pytest.raises(SystemExit, match="error: no terminal"):
        main(["test", *arguments("dfn_mnist", tmp_path)])
    assert (tmp_path / "dfn_mnist" / "results.json").exists()


def test_precision_follows_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for avx, amx, precision in ((True, False, "bf16-mixed"), (False, True, "bf16-mixed"), (False, False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert cli.fast_precision("auto") == cli.fast_precision("cpu") == precision


def test_random_checkpoint_hyperparameters_do_not_override_the_command_line(trained, tmp_path):
    """Lightning's CLI would let the checkpoint win; this holds the private method that we replace in place."""
    path = trained / "dfn_mnist" / "checkpoints" / "last.ckpt"
    more = ["--trainer.max_steps=10", "--model.lr=0.7", f"--ckpt_path={path}"]
    main(["fit", *arguments("dfn_mnist", tmp_path, *more)])
    saved = torch.load(tmp_path / "dfn_mnist" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["lr"] == 0.7


def helped(capsys, *options: str) -> str:
    with suppress(SystemExit):
        main(list(options))
    return capsys.readouterr().out


def test_help_lists_the_commands_and_the_experiments(capsys):
    for text in (helped(capsys), helped(capsys, "--help")):
        listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
        assert listed[:5] == ["fit", "validate", "test", "predict", "catalogue"]
        assert set(CONFIGS) < set(listed)
    assert "  results " in subprocess.run([sys.executable, ROOT / "run.py"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_help_shows_an_experiments_own_options_first(name, capsys):
    text = helped(capsys, "fit", "--config", name, "--help")
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    places = [text.index(f"\n{part}, {config[part]['class_path']}: ") for part in ("model", "data")]
    places += [text.index(f"\n{part}, ") for part in ("schedule", "trainer")]
    assert places == sorted(places)
    shown = entries(text)
    for part in ("model", "data"):
        for option, value in config[part].get("init_args", {}).items():
            assert f"--{part}.{option}" in shown
            if value is None or isinstance(value, bool | int | float | str):
                value = "null" if value is None else value
                assert shown[f"--{part}.{option}"].endswith(f", default: {value})")


def entries(text: str) -> dict[str, str]:
    """What a help text says of each option."""
    parts = re.split(r"\n  (?=--)", text.split("\n\noptions:")[0])
    return {part.split(maxsplit=1)[0].rstrip(","): " ".join(part.split("\n\n")[0].split()) for part in parts}


def test_help_shows_the_values_of_the_command_line(capsys):
    text = helped(capsys, "test", "--help", "--config", "dfn_mnist", "--model.width=7", "--trainer.max_steps", "123")
    assert entries(text)["--model.width"].endswith("default: 7)")
    assert "default: 123)" in " ".join(text.partition("--trainer.max_steps ")[2].split())[:600]


def test_help_without_an_experiment(capsys):
    text = helped(capsys, "predict", "-h")
    assert "Give --config to see" in text
    assert "--schedule.horizon" in text
    assert "--model.width" not in text


def test_a_packaged_configuration_is_found_by_name_from_any_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [option for option in arguments("dfn_mnist", trained) if "/configs/" not in option]
    main(["validate", "-c", "dfn_mnist", "--config=paper/dfn_mnist", *options, "--data.source=stand-in"])
    assert "neither" not in refused(trained, "fit", "--config=dfn_mnits")
    assert "no packaged configuration: dfn_highway, dfn_mnist, " in refused(trained, "fit", "--config=dfn_mnits")
    (tmp_path / "dfn_mnist").write_text("model: {class_path: nothing}")  # a file goes before a name
    with pytest.raises(SystemExit) as stop:
        main(["validate", "-c", "dfn_mnist", *options])
    assert stop.value.code == 2


def test_an_unknown_command_is_named():
    with pytest.raises(SystemExit, match=r"error: there is no command fitt: choose one of fit, .*, catalogue"):
        main(["fitt"])


def test_classes_are_named_by_their_short_names(trained, tmp_path):
    """In what is written; what is read may have a path that a class has or once had."""
    run = trained / "dfn_mnist"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["model"]["class_path"], saved["data"]["class_path"]) == ("VideoPrediction", "MovingMNISTDataModule")
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["_class_path"] == "VideoPrediction"
    assert checkpoint["datamodule_hyper_parameters"]["_class_path"] == "MovingMNISTDataModule"
    shutil.copytree(run, tmp_path / "dfn_mnist")
    options = arguments("dfn_mnist", tmp_path)
    main(["validate", *options, "--model=VideoPrediction", "--data", "lightning_meta.a_former_place.MovingMNIST"])
    checkpoint["hyper_parameters"]["_class_path"] = "lightning_meta.a_former_place.VideoPrediction"
    torch.save(checkpoint, tmp_path / "former.ckpt")
    saved["model"]["class_path"] = "lightning_meta.a_former_place.VideoPrediction"
    (tmp_path / "former.yaml").write_text(yaml.safe_dump(saved))
    main(["test", "--config", str(tmp_path / "former.yaml"), *options[1:], f"--ckpt_path={tmp_path / 'former.ckpt'}"])
    records = [json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "dfn_mnist")]
    assert records[0]["value"] == records[1]["value"]
    one, two = (catalogue.load(path) for path in (run / "checkpoints" / "best.ckpt", tmp_path / "former.ckpt"))
    assert type(one) is type(two) is VideoPrediction
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
