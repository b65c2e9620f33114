import inspect
import re
from importlib import import_module

import pytest
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_meta.cli import main
from lightning_meta.learnets.tracking_data import TrackingDataModule
from lightning_meta.running.options import Integers, OptionParser, one_line
from tests.conftest import ROOT, arguments

LISTS = {"Numbers": [1.0, 2.0, 3.0], "Integers": [1, 2, 3]}


def options():
    """Every option of a model, of data or of the schedule whose annotation mentions a list: class, name, annotation."""
    for path in sorted((ROOT / "lightning_meta").rglob("*.py")):
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for kind in vars(module).values():
            ours = inspect.isclass(kind) and kind.__module__ == module.__name__ and "__init__" in vars(kind)
            if ours and issubclass(kind, (LightningModule, LightningDataModule, Callback)):
                for name, parameter in inspect.signature(kind.__init__).parameters.items():
                    annotation = str(parameter.annotation)
                    if "list" in annotation or "tuple" in annotation or any(word in annotation for word in LISTS):
                        yield kind, name, annotation


def parser():
    parser = OptionParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser


def parsed(value):
    return parser().parse_args([f"--data={TrackingDataModule.__module__}.TrackingDataModule", f"--data.box={value}"])


def test_every_list_of_numbers_is_read_without_brackets():
    found = list(options())
    assert len(found) > 10
    flat = 0
    for kind, name, annotation in found:
        assert not re.search(r"(?<!list\[)(list|tuple)\[(int|float)", annotation), f"{kind}.{name}: use Numbers"
        for word, expected in LISTS.items():
            if word in annotation:
                flat += 1
                parser = OptionParser()
                parser.add_class_arguments(kind, "it")
                key = ".SGD" if annotation.startswith("dict") else ""
                for text in ("1,2,3", " 1, 2 ,3", "[1, 2, 3]"):
                    value = parser.parse_args([f"--it.{name}{key}={text}"])["it"][name]
                    value = value["SGD"] if key else value
                    assert value == expected
                    assert [type(number) for number in value] == [type(number) for number in expected]
    assert flat > 5


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("10,20,30,40", [10, 20, 30, 40]),
        ("10, 20, 30, 40", [10, 20, 30, 40]),
        ("[10,20,30,40]", [10, 20, 30, 40]),
        ("-1.5,2e1", [-1.5, 20]),
        ("45", [45]),
        ("null", None),
    ],
)
def test_a_box_in_every_form(text, numbers):
    config = parsed(text)
    assert config.data.init_args.box == numbers
    written = yaml.safe_load(parser().dump(config))
    assert written["data"]["init_args"].get("box") == numbers  # null is left out
    assert parser().parse_object(written).data.init_args.box == numbers
    assert parser().instantiate_classes(config).data.hparams.box == numbers


@pytest.mark.parametrize(
    "text", ["10,20,thirty,40", "[10,20,thirty]", "[10,20", "10,,20", "10,nan", "1e999,1", "here", "true", "{}"]
)
def test_a_wrong_list_is_one_line_that_says_what_is_wanted(text, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(text)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.box: ")
    assert text.strip("[]") in line
    assert "is not a list of numbers: separate them by commas, as in 10,20,30" in line


def test_whole_numbers(capsys):
    parser = OptionParser()
    parser.add_argument("--labels", type=Integers)
    assert parser.parse_args(["--labels=3,1"]).labels == [3, 1]
    for wrong in ("3,1.5", "[3, 1.5]", "[3, true]"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--labels={wrong}"])
        assert "not a list of whole numbers" in capsys.readouterr().err


def test_an_experiment_takes_a_list_without_brackets(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *arguments("learnet_tracking", tmp_path, "--data.box=10, 20,30,40", "--print_config")])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["box"] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--data.batch_size=many", "data.batch_size: Expected a int. Got value: many"),
        ("--data.nosuch=1", "data: Option 'nosuch' is not accepted"),
        ("--data.video=[1]", "data.video: Expected a str; Given value: [1]"),
        ("--nosuch=1", "unrecognized arguments: --nosuch=1"),
    ],
)
def test_other_wrong_options_are_one_line(option, line, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([f"--data={TrackingDataModule.__module__}.TrackingDataModule", option])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_message_of_another_form_keeps_its_words():
    assert one_line('Parser key "config": File does not exist: a.yaml') == "config: File does not exist: a.yaml"
    assert one_line('Parser key "config":\n  Errors:\n') == 'Parser key "config": Errors:'
    assert one_line("expected\n  one argument") == "expected one argument"
