"""The page that tells how to add a paper: its files, made from it, are under the contract of all experiments."""

import re
import subprocess
import sys

import pytest
import torch

import lightning_meta
from lightning_meta.cli import main
from tests import conftest, test_experiments
from tests.conftest import ROOT, arguments

NAME = "film_waves"
PAGE = (ROOT / "docs" / "fifth_paper.md").read_text()
FILES = dict(re.findall(r"^`([\w/]+\.(?:py|yaml))`\n\n```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files in a folder of their own, known as if they lay in this one."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(lightning_meta, "__path__", [*lightning_meta.__path__, str(tmp_path / "lightning_meta")])
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    conftest.DRAWN.add(NAME)
    yield tmp_path
    conftest.DRAWN.remove(NAME)
    for module in [module for module in sys.modules if module.startswith("lightning_meta.film")]:
        del sys.modules[module]


def test_the_page_has_every_file_and_their_style_is_ours(added):
    assert set(FILES) == {
        *(f"lightning_meta/film/{name}.py" for name in ("layers", "data", "waves")),
        *(f"{folder}/{NAME}.yaml" for folder in ("configs", "configs/paper", "tests/tiny")),
    }
    ours = ["--config", str(ROOT / "pyproject.toml"), "--config", "lint.isort.known-first-party=['lightning_meta']"]
    for verb in (["check"], ["format", "--check"]):
        command = ["ruff", *verb, *ours, "--no-cache", str(added)]
        run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_it_meets_the_contract(added, fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp
    test_experiments.test_fit_leaves_a_record_that_says_what_it_is(NAME, fitted)
    test_experiments.test_tensorboard_has_scalars_and_pictures_of_every_validation(NAME, fitted)
    test_experiments.test_forty_tiny_steps_are_better_than_one(NAME, folder("learns"))
    for verb in ("validate", "test", "predict"):
        test_experiments.test_every_verb_runs_from_a_checkpoint(NAME, verb, fitted, folder(verb))
    test_experiments.test_the_library_loads_what_the_command_line_trained(NAME, fitted)
    test_experiments.test_a_checkpoint_of_another_experiment_is_refused(NAME, folder("refused"))


def test_it_resumes_to_the_very_weights(added, fitted, tmp_path):
    main(["fit", *arguments(NAME, tmp_path, "--trainer.max_steps=3")])
    main(["fit", *arguments(NAME, tmp_path, "--ckpt_path=last")])
    one, two = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (fitted(NAME), tmp_path / NAME)
    )
    assert one["global_step"] == two["global_step"] == 8
    assert all(torch.equal(weight, two["state_dict"][name]) for name, weight in one["state_dict"].items())


def test_the_papers_overlay_lies_over_it(added, tmp_path):
    overlay = f"--config={added / 'configs' / 'paper' / NAME}.yaml"
    main(
        [
            "fit",
            *arguments(NAME, tmp_path),
            overlay,
            f"--trainer.logger.init_args.save_dir={tmp_path}",
            "--trainer.max_steps=1",
        ]
    )
    assert (tmp_path / NAME / "results.json").exists()
