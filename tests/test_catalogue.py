import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_meta import catalogue
from lightning_meta.cli import main
from lightning_meta.dynamic_filters.steerable import SteerableFilters
from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.optimizer import read_rule
from lightning_meta.running.measures import amounts
from lightning_meta.storage import weights
from lightning_meta.storage.checkpoints import read_checkpoint
from lightning_meta.storage.weights import shipped
from tests.conftest import CONFIGS, ROOT, arguments


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def contents(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def refused(function, *args):
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def stopped(verb, folder, *more):
    with pytest.raises(SystemExit) as stop:
        main([verb, *arguments("dfn_steerable", folder, *more)])
    message = str(stop.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def shared(fitted, tmp_path_factory):
    """A run's folder, and the weights that were made of it."""
    run, path = fitted("dfn_steerable"), tmp_path_factory.mktemp("shared") / "mine.safetensors"
    main(["catalogue", str(run), str(path), "eight steps."])
    return run, path


@pytest.mark.parametrize("name", shipped())
def test_what_comes_with_the_package(name):
    path = shipped()[name]
    assert path.stat().st_size < 2_500_000  # the learnet has 600,896 weights
    tensors, metadata = contents(path)
    notes = json.loads(metadata["notes"])
    assert metadata["fingerprint"] == weights._fingerprint(notes, tensors)
    assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32, torch.int64}
    text = path.with_suffix(".md").read_text()
    assert notes["data"].rsplit("; ", 1)[0] in text
    assert f"{notes['steps']:,} " in text or f"{notes['steps']} " in text
    assert f"--ckpt_path {name}" in text
    assert re.search(r"configs/(\w+)\.yaml", text)[1] in CONFIGS
    model = catalogue.load(name)
    assert not any(module.training for module in model.modules())
    state = model.state_dict()
    assert state.keys() == read_checkpoint(path)["state_dict"].keys()
    assert all(torch.equal(state[key], value) for key, value in read_checkpoint(path)["state_dict"].items())


def test_names():
    files = list((ROOT / "lightning_meta").glob("*/weights/*"))
    assert sorted(file.name for file in files) == sorted(
        f"{n}{end}" for n in shipped() for end in (".md", ".safetensors")
    )
    assert "no weights hyper_mnits: give dfn_highway, dfn_mnist, " in refused(catalogue.load, "hyper_mnits")
    assert "check the path" in refused(catalogue.load, "none.safetensors")
    assert "is not a learned optimizer" in refused(read_rule, shipped()["hyper_mnist"])


def test_the_list(capsys):
    main(["catalogue"])
    assert capsys.readouterr().out.split() == catalogue.names()
    with pytest.raises(SystemExit) as stop:
        main(["catalogue", "--help"])
    assert stop.value.code == 0
    assert "NAME.safetensors" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["catalogue", "runs/dfn_mnist"])
    assert stop.value.code == 2
    assert "name the file to write" in capsys.readouterr().err


def test_reading_imports_no_lightning():
    code = "import sys; from lightning_meta.learned_optimizers.optimizer import read_rule; read_rule('l2l_mnist')"
    code += "; assert not {'lightning', 'lightning.pytorch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_test_by_path_gives_the_runs_own_values(shared, tmp_path):
    run, path = shared
    main(["test", *arguments("dfn_steerable", tmp_path, f"--ckpt_path={path}")])
    own, ours = (json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "dfn_steerable"))
    for field in ("value", "interval", "baselines", "further", "steps", "seconds", "model", "samples"):
        assert ours[field] == own[field], field
    assert own["steps"] > 0


def test_a_model_by_name_predicts(tmp_path):
    main(["predict", *arguments("dfn_steerable", tmp_path, "--ckpt_path=dfn_steerable")])
    lines = (tmp_path / "dfn_steerable" / "predictions" / "filter_0.txt").read_text().split()
    taps = catalogue.load("dfn_steerable").generator(torch.zeros(1))[0].flatten().tolist()
    assert [float(tap) for tap in lines] == pytest.approx(taps, abs=1e-5)


def test_loading_gives_the_checkpoints_model(shared):
    run, path = shared
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    models = [catalogue.load(weights) for weights in (path, str(path), run / "checkpoints" / "best.ckpt")]
    assert torch.equal(torch.rand(1), expected)
    images, angles = torch.rand(4, 1, 12, 12), torch.tensor([0.0, 1.0, 2.0, 6.0])
    outputs = [model(images, angles) for model in models]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert outputs[0].abs().max() > 0
    assert len({str(model.hparams) for model in models}) == 1


def test_the_card(shared):
    run, path = shared
    text, record = path.with_suffix(".md").read_text(), json.loads((run / "results.json").read_text())
    assert text.startswith("# mine\n")
    value, *baselines = amounts(record)
    for part in ("eight steps.", 'load("mine.safetensors")', record["data"], f"| {value} |", *baselines):
        assert part in text
    assert "- **Terms of the data:** china.jpg and flower.jpg come with scikit-learn" in text
    assert sorted(os.listdir(path.parent)) == ["mine.md", "mine.safetensors"]


def test_weights_alone_are_not_gone_on_with(shared, tmp_path):
    assert "has no training state" in stopped("fit", tmp_path, f"--ckpt_path={shared[1]}")
    assert "has no training state" in stopped("fit", tmp_path, "--ckpt_path=dfn_steerable")
    assert "no weights steerable: give" in stopped("test", tmp_path, "--ckpt_path=steerable")
    assert not (tmp_path / "dfn_steerable").exists()


def test_other_weights_say_what_they_need(shared, tmp_path):
    message = stopped("test", tmp_path, "--ckpt_path=hyper_mnist")
    assert "give the --config of PictureClassification" in message
    options = arguments("hyper_ptb", tmp_path, "--ckpt_path=hyper_ptb", "--model.hidden_size=8", "--model.lr=0.5")
    with pytest.raises(SystemExit, match=r"it was trained with .*--model.hidden_size=256 .*--model.lr=0.004"):
        main(["test", *options])


def test_only_a_run_with_the_record_of_its_checkpoint_is_shared(shared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shared[0], run)
    path, record = tmp_path / "new.safetensors", json.loads((run / "results.json").read_text())
    for change, complaint in [
        ({"steps": 10**6}, "its steps is 1000000 and should be"),
        ({"seconds": -1}, "its seconds is -1"),
        ({"model": {}}, "its model is {}"),
        ({"data": None}, "no record of a test"),
    ]:
        (run / "results.json").write_text(json.dumps(record | change))
        assert complaint in refused(catalogue.share, run, path)
    (run / "results.json").write_text("{")
    assert "no record of a test" in refused(catalogue.share, run, path)
    (run / "results.json").unlink()
    assert "no record of a test" in refused(catalogue.share, run, path)
    assert "ends in .safetensors" in refused(catalogue.share, shared[0], tmp_path / "new.pt")
    assert "cannot write" in refused(catalogue.share, shared[0], tmp_path / "none" / "new.safetensors")
    assert "no checkpoint" in refused(catalogue.share, tmp_path / "none", path)
    assert os.listdir(tmp_path) == ["run"]


def test_shared_weights_are_stored_once_and_more_than_weights_is_kept(tmp_path):
    weight, half = torch.randn(100, 100).double(), torch.randn(3).half()
    checkpoint = {
        "state_dict": {
            "a": weight,
            "b": weight,
            "c": weight[:1],
            "n": torch.tensor(7),
            "h": half,
            "none": torch.ones(0),
        },
        "pieces": torch.arange(9, dtype=torch.uint8),
        "optimizer_states": [{"state": weight}],
        "global_step": 3,
        "hyper_parameters": {"_class_path": "lightning_meta.some.Module", "pair": (1, 2), "_more": 1},
        "callbacks": {"Timer": {"time_elapsed": {"train": 4.4}}},
    }
    record = {"steps": 3, "seconds": 4, "model": {"pair": [1, 2]}, "data": "some; more", "seed": 0, "commit": None}
    path = tmp_path / "some.safetensors"
    weights.write(path, checkpoint, record)
    assert path.stat().st_size < 45_000
    read = weights.read(path)
    state = read["state_dict"]
    assert state.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(state[name], value.float()) for name, value in checkpoint["state_dict"].items())
    assert state["n"].dtype == torch.int64
    assert torch.equal(read["pieces"], checkpoint["pieces"])
    assert read["hyper_parameters"] == {"_class_path": "lightning_meta.some.Module", "pair": [1, 2]}
    assert "optimizer_states" not in read


def test_weights_name_their_class_by_its_short_name_or_by_a_former_path(shared, tmp_path):
    tensors, metadata = contents(shared[1])
    notes = json.loads(metadata["notes"])
    assert notes["class_path"] == "SteerableFilters"
    notes["class_path"] = "lightning_meta.a_former_place.SteerableFilters"
    path = tmp_path / "former.safetensors"
    save_file(tensors, path, {"notes": json.dumps(notes), "fingerprint": weights._fingerprint(notes, tensors)})
    assert type(catalogue.load(path)) is type(catalogue.load(shared[1])) is SteerableFilters


def test_damaged_files(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, bad = shared[1].read_bytes(), tmp_path / "bad.safetensors"
    flipped = bytearray(content)
    flipped[-1] ^= 1
    said = content.replace(b'\\"steps\\": ', b'\\"steps\\":1')
    assert said != content
    evil = pickle.dumps(Evil())
    for damaged in (content[:-9], content[:40], b"", b"hello" * 9, bytes(flipped), said, evil):
        bad.write_bytes(damaged)
        for read in (catalogue.load, read_checkpoint):
            assert "bad.safetensors is" in refused(read, bad)
        assert "damaged" in refused(catalogue.load, bad)
    torch.save({"state_dict": Evil(), "global_step": 1}, bad)
    assert "damaged" in refused(catalogue.load, bad)
    assert "damaged" in stopped("test", tmp_path, f"--ckpt_path={bad}")
    assert os.listdir(tmp_path) == ["bad.safetensors"]


FIRST = "generator.layers.0.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w, n: w.pop(FIRST), "Missing key"),
        (lambda w, n: w.update(more=torch.ones(1)), "Unexpected key"),
        (lambda w, n: w.update({FIRST: torch.ones(3, 1)}), "size mismatch for generator.layers.0.weight"),
        (lambda w, n: w[FIRST].fill_(float("nan")), f"{FIRST} has values that are not finite"),
        (lambda w, n: w[FIRST].fill_(float("inf")), "not finite"),
        (lambda w, n: w.update({FIRST: w[FIRST].bfloat16()}), "damaged"),
        (lambda w, n: n.pop("steps"), "KeyError: 'steps'"),
        (lambda w, n: n.update(steps="8"), "its steps is '8'"),
        (lambda w, n: n.update(steps=-8), "its steps are -8"),
        (lambda w, n: n.update(seconds=None), "its seconds is None"),
        (lambda w, n: n.update(shared={"a": "b"}), "KeyError: 'b'"),
        (lambda w, n: n.update(shared={"a": ["b"]}), "TypeError"),
        (lambda w, n: n.update(hyper_parameters=[]), "its hyper_parameters is []"),
        (lambda w, n: n["hyper_parameters"].update(depth=3), "unexpected keyword argument 'depth'"),
        (lambda w, n: n.update(class_path="os.system"), "os.system is not a LightningModule of this package"),
        (lambda w, n: n.update(class_path="eval"), "eval is not a LightningModule of this package"),
        (
            lambda w, n: n.update(class_path="lightning.pytorch.LightningModule"),
            "is not a LightningModule of this package",
        ),
        (lambda w, n: n.update(class_path="lightning_meta.catalogue.load"), "is not a LightningModule of this package"),
        (
            lambda w, n: n.update(class_path="lightning_meta.catalogue.LightningModule"),
            "is not a LightningModule of this",
        ),
        (lambda w, n: n.update(class_path="lightning_meta.none.Module"), "No module named"),
        (lambda w, n: n.update(class_path="lightning_meta.catalogue.None"), "has no attribute"),
    ],
)
def test_files_of_something_else(shared, tmp_path, change, complaint):
    path = tmp_path / "other.safetensors"
    tensors, metadata = contents(shared[1])
    notes = json.loads(metadata["notes"])
    change(tensors, notes)
    sums = tensors if complaint != "damaged" else {}  # numpy knows no bfloat16
    save_file(tensors, path, {"notes": json.dumps(notes), "fingerprint": weights._fingerprint(notes, sums)})
    assert complaint in refused(catalogue.load, path)


def test_sizes_take_no_memory_before_they_are_compared(tmp_path):
    path = tmp_path / "large.safetensors"
    tensors, metadata = contents(shipped()["hyper_handwriting"])
    notes = json.loads(metadata["notes"])
    notes["hyper_parameters"]["hidden_size"] = 10**7  # 1.6 PB
    save_file(tensors, path, {"notes": json.dumps(notes), "fingerprint": weights._fingerprint(notes, tensors)})
    assert "does not fit the model that it names" in refused(catalogue.load, path)
