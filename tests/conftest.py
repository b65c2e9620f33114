import multiprocessing
import os
import sys
from contextlib import nullcontext
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny operations on two busy cores are far slower with two threads

import pytest
import torch

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.names import CLASSES

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "defaults")
DRAWN = {"l2l_quadratic"}  # whose data are drawn: nothing can be missing, nothing stands in


def pytest_addoption(parser):
    parser.addoption("--campaign", type=int, help="this many random faults, and what takes long over every experiment")
    parser.addoption("--campaign-seed", type=int, help="draws the same faults again")
    parser.addoption("--campaign-record", type=Path, help="writes what was tried and held to this file")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["run.py"])  # Lightning's CLI warns about pytest's arguments


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets."""
    if "LIGHTNING_META_DATA" not in os.environ:
        pytest.skip("LIGHTNING_META_DATA does not name a folder of real data")
    return Path(os.environ["LIGHTNING_META_DATA"])


def arguments(name: str, folder: Path, *more: str) -> list[str]:
    """Options that make an experiment tiny and put everything it writes below ``folder``."""
    return [
        f"--config={ROOT / 'configs' / name}.yaml",
        f"--config={ROOT / 'tests' / 'tiny' / name}.yaml",
        f"--trainer.logger.init_args.save_dir={folder}",
        *([] if name in DRAWN else [f"--data.root={folder / 'no-data'}"]),
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *more,
    ]


def refused(call, *words) -> None:
    """A call ends with one line that has these words."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have imported the application already and nothing else."""
    context = multiprocessing.get_context("forkserver")
    modules = {f"lightning_meta.{module}" for module in CLASSES.values()}
    context.set_forkserver_preload(["lightning_meta.cli", "torch.utils.tensorboard", *sorted(modules)])
    return context
