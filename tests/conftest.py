import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny operations on two busy cores are far slower with two threads

import pytest
import torch
from filelock import FileLock

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.storage.names import CLASSES

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "defaults")
DRAWN = {"l2l_quadratic"}  # whose data are drawn: nothing can be missing, nothing stands in


def pytest_addoption(parser):
    parser.addoption("--campaign", type=int, default=50, help="how many random faults test_campaign tries")
    parser.addoption("--campaign-seed", type=int, help="draws the same faults again")
    parser.addoption("--campaign-record", type=Path, help="writes what was tried and held to this file")


def pytest_xdist_auto_num_workers(config):
    """A worker for each core, at most four; for chosen files or names one process, which starts sooner."""
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    return 0 if chosen else min(os.cpu_count(), 4)


def pytest_make_parametrize_id(config, val, argname):
    """Bytes are named by their argument: packed ones hold the time, and all workers must have the same names."""
    return argname if isinstance(val, bytes) else None


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


def some(names: Sequence[str], mark: pytest.MarkDecorator) -> list:
    """All experiments as parameters, those that are not in ``names`` with a mark."""
    return [name if name in names else pytest.param(name, marks=mark) for name in CONFIGS]


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
def once(tmp_path_factory):
    """Calls ``make(folder)`` once for all workers; gives the folder, which no test may change."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in it

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def fitted(once):
    """Fits each experiment once; gives its run folder."""

    def make(folder: Path, name: str) -> None:
        with nullcontext() if name in DRAWN else pytest.warns(UserWarning, match="stand-in"):
            main(["fit", *arguments(name, folder)])

    return lambda name: once(f"fitted_{name}", partial(make, name=name)) / name


@pytest.fixture(scope="session")
def fitted_in_float64(once):
    """The same in float64 and with batches of four, for two processes to equal; there "to rounding" is sharp."""

    def make(folder: Path, name: str) -> None:
        main(["fit", *arguments(name, folder, "--trainer.precision=64-true", "--data.batch_size=4")])

    return lambda name: once(f"float64_{name}", partial(make, name=name)) / name


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have imported the application already and nothing else."""
    context = multiprocessing.get_context("forkserver")
    modules = {f"lightning_meta.{module}" for module in CLASSES.values()}
    context.set_forkserver_preload(["lightning_meta.cli", "torch.utils.tensorboard", *sorted(modules)])
    return context
