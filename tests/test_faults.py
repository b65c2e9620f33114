"""What may happen to a run: it says what is wrong in one line, and, taken up, ends as if nothing had happened.

``python -m pytest tests/test_faults.py -m campaign --campaign 50`` tries so many faults, drawn over all experiments.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from lightning_meta.cli import main, refuse_strategy
from lightning_meta.errors import InputError
from lightning_meta.running.machine import commit, cpu_name
from lightning_meta.storage.atomic import atomic_write
from tests.conftest import CONFIGS, arguments
from tests.runs import (
    Run,
    at_hook,
    at_save,
    full_board,
    half_save,
    kill_a_worker,
    no_room,
    same,
    signal_to_all,
    signals,
)

SAVES = 9  # of a tiny run, at the least: one of each step, and one that is the best
QUICK = ("hyper_enwik8", "dfn_steerable")  # a state that is carried, and pictures


class Case:
    """A run like ``reference`` to be disturbed, at a moment that ``draw`` chooses.

    Each fault asserts how the disturbed run ends, ``taken_up`` that nothing of it remains.
    """

    def __init__(self, processes, reference: Path, folder: Path, draw: random.Random):
        self.name, self.reference, self.folder, self.draw = reference.name, reference, folder, draw
        self.processes = processes
        self.run_folder = folder / self.name
        self.last = self.run_folder / "checkpoints" / "last.ckpt"
        self.size = (reference / "checkpoints" / "last.ckpt").stat().st_size

    def run(self, *more: str, sabotage=None) -> Run:
        return Run(self.processes, self.name, self.folder, *more, sabotage=sabotage)

    def begun(self, *more: str) -> Run:
        """A run of which a random time has passed."""
        run = self.run(*more)
        while not run.log.exists():
            time.sleep(0.01)
        run.process.join(self.draw.uniform(0, 3))
        return run

    def killed(self) -> None:
        self.begun(f"--data.num_workers={self.draw.choice((0, 2))}").kill()

    def killed_while_a_checkpoint_is_written(self) -> None:
        run = self.run(sabotage=partial(at_save, self.draw.randint(1, SAVES), half_save))
        assert run.end() == -signal.SIGKILL

    def no_room_for_a_checkpoint(self, number: int | None = None) -> None:
        number = number or self.draw.randint(1, SAVES)
        full = partial(no_room, self.draw.randint(self.size // 2, self.size - 1))
        run = self.run(sabotage=partial(at_save, number, full))
        assert run.end() == 1
        assert "free the disk" in run.message()
        assert not list(self.last.parent.glob("*.part"))
        assert self.last.exists() == (number > 1)
        if self.last.exists():
            torch.load(self.last, weights_only=True)

    def no_room_for_the_first_checkpoint(self) -> None:
        self.no_room_for_a_checkpoint(1)

    def no_room_for_the_record(self) -> None:
        self.run_folder.mkdir()
        record = self.run_folder / "results.json"
        record.with_name("results.json.part").symlink_to("/dev/full")
        run = self.run()
        assert run.end() == 1
        assert "results.json" in run.message()
        assert "free the disk" in run.message()
        assert not record.exists()

    def no_room_for_tensorboard(self) -> None:
        full = partial(
            at_hook, "on_train_batch_start", self.draw.randint(1, 8), partial(full_board, self.last.parents[1])
        )
        run = self.run(sabotage=full)
        assert run.end() == 1
        assert "free the disk" in run.message()
        for link in self.run_folder.glob("events*"):
            link.unlink()

    def killed_in_a_step(self) -> None:
        kill = partial(at_hook, "on_train_batch_start", self.draw.randint(2, 8), partial(signals, signal.SIGKILL))
        assert self.run(f"--data.num_workers={self.draw.choice((0, 2))}", sabotage=kill).end() == -signal.SIGKILL

    def killed_while_it_validates(self) -> None:
        kill = partial(at_hook, "on_validation_batch_start", 1, partial(signals, signal.SIGKILL))
        assert self.run(sabotage=kill).end() == -signal.SIGKILL
        assert torch.load(self.last, weights_only=True)["global_step"] == 3

    def worker_killed(self) -> None:
        run = self.run("--data.num_workers=2", sabotage=partial(at_hook, "on_train_batch_start", 3, kill_a_worker))
        assert run.end() == 1
        assert "--data.num_workers" in run.message()

    def worker_killed_at_a_random_moment(self) -> None:
        run = self.run("--data.num_workers=2")
        while run.process.is_alive() and not run.workers():
            time.sleep(0.001)
        time.sleep(self.draw.uniform(0, 0.5))
        if workers := run.workers():
            os.kill(self.draw.choice(workers), signal.SIGKILL)
        if run.end():
            assert run.process.exitcode == 1
            assert "--data.num_workers" in run.message()

    def ctrl_c(self) -> None:
        run = self.begun(f"--data.num_workers={self.draw.choice((0, 2))}")
        run.send(signal.SIGINT)
        if run.end():
            self.stopped(run)

    def ctrl_c_with_its_workers(self) -> None:
        sabotage = partial(at_hook, "on_train_batch_start", 3, partial(signal_to_all, signal.SIGINT))
        self.stopped(self.run("--data.num_workers=1", sabotage=sabotage))
        assert torch.load(self.last, weights_only=True)["global_step"] == 3

    def stopped(self, run: Run, code: int = 128 + signal.SIGINT) -> None:
        assert run.end() == code, run.log.read_text()
        assert "Traceback" not in run.log.read_text(), run.log.read_text()

    def signalled(self, hook: str, steps: int, *signums: int, code: int = 128 + signal.SIGINT) -> Run:
        """Signals at a random one of so many calls of a hook."""
        sabotage = partial(at_hook, hook, self.draw.randint(1, steps), partial(signals, *signums))
        run = self.run(sabotage=sabotage)
        self.stopped(run, code)
        return run

    def ctrl_c_before_the_first_step(self) -> None:
        self.signalled("setup", 1, signal.SIGINT)
        assert not self.last.exists()

    def ctrl_c_in_the_first_step(self) -> None:
        self.signalled("on_train_batch_start", 1, signal.SIGINT)
        assert torch.load(self.last, weights_only=True)["global_step"] == 1

    def ctrl_c_while_it_validates(self) -> None:
        self.signalled("on_validation_batch_start", 2, signal.SIGINT)
        assert torch.load(self.last, weights_only=True)["global_step"] >= 4

    def ctrl_c_while_it_tests(self) -> None:
        self.signalled("on_test_batch_start", 1, signal.SIGINT)
        assert torch.load(self.last, weights_only=True)["global_step"] == 8

    def ctrl_c_twice(self) -> None:
        self.signalled("on_train_batch_start", 8, signal.SIGINT, signal.SIGINT)

    def terminated(self) -> None:
        run = self.signalled("on_train_batch_start", 8, signal.SIGTERM, code=128 + signal.SIGTERM)
        assert "resume with" in run.log.read_text()

    def terminated_with_its_workers(self) -> None:
        number = self.draw.randint(3, 8)  # by then all workers have begun
        sabotage = partial(at_hook, "on_train_batch_start", number, partial(signal_to_all, signal.SIGTERM))
        self.stopped(self.run("--data.num_workers=2", sabotage=sabotage), 128 + signal.SIGTERM)
        assert torch.load(self.last, weights_only=True)["global_step"] == number

    def terminated_while_it_tests(self) -> None:
        self.signalled("on_test_batch_start", 1, signal.SIGTERM, code=128 + signal.SIGTERM)

    def taken_up(self, *more: str) -> None:
        """The run goes on, and ends as the one that nothing disturbed."""
        run = self.run(*more)
        assert run.end() == 0, run.log.read_text()
        for checkpoint in ("last.ckpt", "best.ckpt"):
            assert same(self.last.with_name(checkpoint), self.reference / "checkpoints" / checkpoint)
        ours, theirs = (
            json.loads((run / "results.json").read_text()) for run in (self.last.parents[1], self.reference)
        )
        assert ours["value"] == theirs["value"]


AT_RANDOM_MOMENTS = {
    "SIGKILL at a random moment": Case.killed,
    "a data loader's worker killed at a random moment": Case.worker_killed_at_a_random_moment,
    "Ctrl-C at a random moment": Case.ctrl_c,
}
FAULTS = {
    "SIGKILL in a step": Case.killed_in_a_step,
    "SIGKILL while it validates": Case.killed_while_it_validates,
    "SIGKILL while a checkpoint is written": Case.killed_while_a_checkpoint_is_written,
    "no room for the first checkpoint": Case.no_room_for_the_first_checkpoint,
    "no room for some checkpoint": Case.no_room_for_a_checkpoint,
    "no room for results.json": Case.no_room_for_the_record,
    "no room for TensorBoard's file": Case.no_room_for_tensorboard,
    "a data loader's worker killed": Case.worker_killed,
    "Ctrl-C to all processes": Case.ctrl_c_with_its_workers,
    "Ctrl-C before the first step": Case.ctrl_c_before_the_first_step,
    "Ctrl-C in the first step": Case.ctrl_c_in_the_first_step,
    "Ctrl-C while it validates": Case.ctrl_c_while_it_validates,
    "Ctrl-C while it tests": Case.ctrl_c_while_it_tests,
    "Ctrl-C twice": Case.ctrl_c_twice,
    "SIGTERM in a step": Case.terminated,
    "SIGTERM to all processes": Case.terminated_with_its_workers,
    "SIGTERM while it tests": Case.terminated_while_it_tests,
}


@pytest.fixture
def case(name, fitted, tmp_path, processes, request):
    return Case(processes, fitted(name), tmp_path, random.Random(request.node.name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_run_ends_with_the_very_weights(name, case):
    """Killed in mid-horizon, half of the experiments with data loader's workers."""
    workers = f"--data.num_workers={2 * (CONFIGS.index(name) % 2)}"
    kill = partial(at_hook, "on_train_batch_start", 3, partial(signals, signal.SIGKILL))
    assert case.run(workers, sabotage=kill).end() == -signal.SIGKILL
    assert torch.load(case.last, weights_only=True)["global_step"] == 2
    case.taken_up(workers)


@pytest.mark.parametrize("name", QUICK)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_former_one(name, case):
    steps = []
    for number in (4, 2, 3):  # the best one, the last one after it, another last one
        assert case.run(sabotage=partial(at_save, number, half_save)).end() == -signal.SIGKILL
        steps.append(torch.load(case.last, weights_only=True)["global_step"])
    assert steps == sorted(steps)
    case.taken_up()


@pytest.mark.parametrize(("fault", "name"), [(fault, QUICK[i % 2]) for i, fault in enumerate(FAULTS)])
def test_a_fault_is_told_in_one_line_and_the_run_is_taken_up(fault, name, case):
    FAULTS[fault](case)
    case.taken_up()


def test_processes_of_a_run_may_write_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: int((tmp_path / "rank").read_text()))
    parts = []
    with ExitStack() as stack:
        for rank in "012":
            (tmp_path / "rank").write_text(rank)
            parts.append(stack.enter_context(atomic_write(tmp_path / "file")))
            parts[-1].write_text(rank)
    assert len(set(parts)) == 3
    assert (tmp_path / "file").read_text() == "0"  # the last to end
    assert sorted(os.listdir(tmp_path)) == ["file", "rank"]


REFUSED = {
    "--trainer.strategy=fsdp": "use --trainer.strategy ddp",
    "--trainer.strategy=deepspeed_stage_2": "use --trainer.strategy ddp",
    "--trainer.strategy=ddp_spawn": "use --trainer.strategy ddp",
    "--trainer.strategy.class_path=lightning.pytorch.strategies.FSDPStrategy": "use --trainer.strategy ddp",
    "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy": "use --trainer.strategy ddp",
    "--trainer.precision=16-true": "use bf16-mixed",
    "--trainer.precision=bf16-true": "use bf16-mixed",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(option, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments(QUICK[0], tmp_path, option)])
    assert stop.value.code.startswith("error: trainer.")
    assert REFUSED[option] in stop.value.code
    assert "\n" not in stop.value.code
    assert not list(tmp_path.iterdir())


def test_ddp_with_arguments_of_its_own_is_not_refused():
    for start, fine in (("popen", True), ("spawn", False)):
        options = Namespace(find_unused_parameters=True, start_method=start)
        with nullcontext() if fine else pytest.raises(InputError, match=r"use --trainer\.strategy ddp"):
            refuse_strategy(Namespace(class_path="lightning.pytorch.strategies.DDPStrategy", init_args=options))


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_campaign(request, fitted, tmp_path, processes, capsys):
    """So many different pairs of a fault and an experiment, in an order that the seed draws."""
    number, record = (request.config.getoption(option) for option in ("--campaign", "--campaign-record"))
    seed = request.config.getoption("--campaign-seed")
    seed = random.randrange(10**6) if seed is None else seed
    faults = FAULTS | AT_RANDOM_MOMENTS
    pairs = [(fault, name) for fault in faults for name in CONFIGS]
    random.Random(seed).shuffle(pairs)
    tried, held, failures = Counter(), Counter(), []
    for i, (fault, name) in enumerate(islice(cycle(pairs), number)):
        case = Case(processes, fitted(name), tmp_path / str(i), random.Random(f"{seed} {i}"))
        case.folder.mkdir()
        tried[fault] += 1
        try:
            faults[fault](case)
            case.taken_up()
            held[fault] += 1
            shutil.rmtree(case.folder)
        except (AssertionError, OSError, RuntimeError) as error:
            failures.append(f"{i}: {fault}, {name}: {error}")
        rows = [{"fault": fault, "tried": tried[fault], "held": held[fault]} for fault in faults if tried[fault]]
        if record:  # what is known so far: one may stop it
            content = {"seed": seed, "commit": commit(), "machine": cpu_name(), "rows": rows}
            record.write_text(json.dumps(content, indent=2) + "\n")
    with capsys.disabled():
        print(f"\nseed {seed}: {number} faults\n{'fault':50}{'tried':>6}{'held':>6}")
        for row in rows:
            print(f"{row['fault']:50}{row['tried']:6}{row['held']:6}")
    assert not failures, "\n\n".join(failures)
