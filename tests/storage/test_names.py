import importlib

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins.io import CheckpointIO

from lightning_meta.errors import InputError
from lightning_meta.storage import names
from tests.conftest import CONFIGS, ROOT


@pytest.mark.parametrize("name", names.CLASSES)
def test_a_class_is_where_the_table_says(name):
    module, _, found = names.full_path(name).rpartition(".")
    kind = getattr(importlib.import_module(module), found)
    assert issubclass(kind, LightningModule | LightningDataModule | CheckpointIO)
    assert kind.__module__ == module


def test_every_configuration_names_classes_of_the_table():
    for path in [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "paper").glob("*.yaml")]:
        for part in ("model", "data"):
            kind = yaml.safe_load(path.read_text()).get(part, {}).get("class_path")
            assert kind is None or kind in names.CLASSES, path


def test_other_classes_keep_their_paths():
    for path in ("Text.Other", "my.package.VideoPrediction", "lightning.pytorch.LightningModule", "os.system", ""):
        assert names.full_path(path) == names.short_name(path) == path


def test_only_class_paths_are_renamed():
    content = {
        "class_path": "TextDataModule",
        "init_args": {"text": "Text", "more": [{"class_path": "MNISTDataModule"}, "MNIST", None]},
    }
    full = names.rename_classes(content, names.full_path)
    assert full["class_path"] == "lightning_meta.hypernetworks.text_data.TextDataModule"
    assert full["init_args"]["text"] == "Text"
    assert full["init_args"]["more"][0]["class_path"].endswith(".classification_data.MNISTDataModule")
    assert full["init_args"]["more"][1:] == ["MNIST", None]
    assert names.rename_classes(full, names.short_name) == content


def test_experiments_are_the_configurations():
    assert list(names.experiments()) == CONFIGS


def test_arguments_are_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    configs = ROOT / "configs"
    for given, expected in {
        ("fit", "--config", "dfn_mnist"): ["fit", "--config", f"{configs / 'dfn_mnist.yaml'}"],
        ("-c", "paper/dfn_mnist.yaml"): ["-c", f"{configs / 'paper' / 'dfn_mnist.yaml'}"],
        ("--config=mine.yaml", "--data.text", "Text"): ["--config=mine.yaml", "--data.text", "Text"],
        ("--config={trainer: {max_steps: 3}}",): ["--config={trainer: {max_steps: 3}}"],
        ("--data=Text",): ["--data=lightning_meta.hypernetworks.text_data.TextDataModule"],
        ("--model.class_path", "Handwriting"): [
            "--model.class_path",
            "lightning_meta.hypernetworks.handwriting.Handwriting",
        ],
        ("--model.help",): ["--model.help"],
    }.items():
        assert list(names.expand(list(given))) == expected
    with pytest.raises(InputError, match="no such file, and no packaged configuration: dfn_highway, "):
        list(names.expand(["--config=mine"]))
