"""The options, the clock and the record of all benchmarks."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lightning_meta.cli import prepare_processor
from lightning_meta.running.machine import commit, cpu_name


def parse(name: str, description: str, arguments: list[str]) -> argparse.Namespace:
    """A benchmark's options; sets the number of threads."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the rows there, such as results/benchmarks/NAME.json")
    options = parser.parse_args(arguments)
    prepare_processor()
    torch.set_num_threads(options.threads)
    return options


def seconds(function: Callable[[], object], device: str) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most bytes alive at once beyond what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    living = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        living += event.nbytes()
        peak = max(peak, living)
    return peak


def report(name: str, rows: list[dict[str, str | float]], options: argparse.Namespace) -> None:
    """Prints the rows and keeps them where ``--json`` says."""
    cuda = options.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{options.threads} threads of {cpu_name()}"
    table = Table(*rows[0], title=f"{name}: {device}")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.2f}" for value in row.values()))
    Console(width=120).print(table)
    if options.json:
        record = {"name": name, "device": device, "torch": torch.__version__, "commit": commit(), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
