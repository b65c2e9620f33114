"""The device, the processor and the commit that a result was computed with."""

import platform
import subprocess
from pathlib import Path

import torch
from lightning.pytorch import Trainer


def device_name(trainer: Trainer) -> str:
    """Return the name of the device, for a person to read."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {cpu_name()}"


def cpu_name() -> str:
    """Return the processor's name, or its architecture if the system does not tell the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Return the commit of this checkout, with ``+`` if files have changed since; None outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    try:  # an installed package may lie in somebody else's repository, which does not track this file
        head = git("rev-parse", "--short=12", "HEAD") if git("ls-files", Path(__file__).name) else None
    except FileNotFoundError:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if head else None
