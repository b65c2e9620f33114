"""Runs to be disturbed: in processes of their own, held against one that nothing disturbed."""

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_meta.cli import main
from lightning_meta.running.schedule import MetaSchedule
from tests.conftest import arguments

Sabotage = Callable[[], None]  # called in the process before it runs


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that training changes: weights, and the optimizer's state."""
    saved = torch.load(checkpoint, weights_only=True)
    state = {f"{i}.{k}": v for i, s in saved["optimizer_states"][0]["state"].items() for k, v in s.items()}
    return saved["state_dict"] | state


def same(one: Path, other: Path) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Run:
    """``fit`` of a tiny experiment, or its continuation, in a process of its own, one of several if it has a rank."""

    def __init__(
        self,
        processes,
        name: str,
        folder: Path,
        *more: str,
        sabotage: Sabotage | None = None,
        rank: int = 0,
        environment: dict[str, str] | None = None,
    ):
        self.checkpoints = folder / name / "checkpoints"
        self.log = folder / f"log{rank}"
        self.log.unlink(missing_ok=True)
        options = [*arguments(name, folder, *more), "--ckpt_path=last"]
        given = (["fit", *options], self.log, sabotage, rank, environment or {})
        self.process = processes.Process(target=_child, args=given)
        self.process.start()

    def send(self, signum: int) -> None:
        """A signal to the whole group, as the terminal sends Ctrl-C."""
        with suppress(ProcessLookupError):  # on a busy machine it may not have begun its own group yet
            os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.kill()
        self.process.join()

    def end(self, timeout: float = 240) -> int:
        """Waits for its end; gives the exit code."""
        self.process.join(timeout)
        running = self.process.exitcode is None
        self.kill()  # its workers, too, where it was killed
        if running:
            raise AssertionError(f"still running after {timeout} s:\n{self.log.read_text()}")
        return self.process.exitcode

    def message(self) -> str:
        """The one line that it leaves when it cannot go on."""
        text = self.log.read_text()
        assert "Traceback" not in text, text
        assert "Exception ignored" not in text, text
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        return line

    def workers(self) -> list[int]:
        """Its children."""
        pid = self.process.pid
        with suppress(FileNotFoundError):  # it has ended
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []


def two_ranks(processes, name: str, folder: Path, *more: str, sabotage: Sabotage | None = None) -> list[int]:
    """Runs on two devices of this machine, as if Lightning had started both processes; gives their exit codes."""
    both = [{"LOCAL_RANK": str(rank), "NODE_RANK": "0"} for rank in range(2)]
    return _all_ranks(both, processes, name, folder, "--trainer.devices=2", *more, sabotage=sabotage)


def two_nodes(processes, name: str, folder: Path, *more: str, sabotage: Sabotage | None = None) -> list[int]:
    """Runs on two nodes of one device, as if torchrun had started them; gives their exit codes."""
    one_device = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "tests"}
    both = [{**one_device, "RANK": str(rank), "GROUP_RANK": str(rank)} for rank in range(2)]
    more = "--trainer.num_nodes=2", "--trainer.devices=1", *more
    return _all_ranks(both, processes, name, folder, *more, sabotage=sabotage)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _all_ranks(
    environments: list[dict[str, str]], processes, name: str, folder: Path, *more: str, sabotage: Sabotage | None
) -> list[int]:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(environments))}
    runs = [
        Run(processes, name, folder, *more, sabotage=sabotage, rank=rank, environment=common | environment)
        for rank, environment in enumerate(environments)
    ]
    return [run.end() for run in runs]


def _child(argv: list[str], log: Path, sabotage: Sabotage | None, rank: int, environment: dict[str, str]) -> None:
    os.setsid()  # a group of its own, with the loader's workers
    multiprocessing.set_start_method("fork", force=True)  # for those workers, as in a run from the command line
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started by
    torch.set_num_threads(1)
    os.environ |= environment
    rank_zero_only.rank = rank  # Lightning sets it when it is imported, and that was before the environment
    sys.argv = ["run.py"]
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - as long as the process
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    if sabotage is not None:
        sabotage()
    main(argv)


def at_save(number: int, act: Callable) -> None:
    """``act(checkpoint, file)`` goes before the so-many-th writing of a checkpoint."""
    save, count = torch.save, iter(range(1, 1000))

    def sabotaged_save(checkpoint, file):
        if next(count) == number:
            act(checkpoint, file)
        save(checkpoint, file)

    torch.save = sabotaged_save


def at_hook(hook: str, number: int, act: Callable) -> None:
    """``act()`` when Lightning calls this hook of a callback for the so-many-th time."""
    former, count = getattr(MetaSchedule, hook), iter(range(1, 1000))

    def sabotaged_hook(*args, **kwargs):
        if next(count) == number:
            act()
        former(*args, **kwargs)

    setattr(MetaSchedule, hook, sabotaged_hook)


def half_save(checkpoint, file) -> None:
    file.write(b"half a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def no_room(size: int, *_) -> None:
    """From now on no file grows beyond ``size`` bytes: the kernel refuses, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_board(folder: Path) -> None:
    """The disk of TensorBoard's file is full."""
    (events,) = folder.glob("events*")
    events.rename(events.with_name("former"))
    events.symlink_to("/dev/full")


def kill_a_worker() -> None:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def signal_to_all(signum: int) -> None:
    """To the loader's workers, too, and from elsewhere: they obey the main process."""
    command = [sys.executable, "-c", f"import os; os.killpg({os.getpid()}, {int(signum)})"]
    subprocess.run(command, start_new_session=True, check=True)


def signals(*signums: int) -> None:
    for signum in signums:
        os.kill(os.getpid(), signum)
