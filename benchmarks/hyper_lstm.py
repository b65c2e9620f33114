"""HyperLSTM on a sequence, forward and backward, against torch.nn.LSTM with as many units and the eager step.

Inputs are dense vectors (256 and 50 numbers) that need gradients, like those of a second layer or from an embedding. If
labml-nn is installed (requirements.txt), its HyperLSTM, which always has layer norm, is measured too.
"""

import argparse
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.report import parse, peak_bytes, report, seconds
from lightning_meta.hypernetworks.layers import HyperLSTM, HyperLSTMCell


class Setting(NamedTuple):
    """Sizes: B samples, T steps, inputs, units, units of the small LSTM, numbers of an embedding."""

    name: str
    B: int
    T: int
    inputs: int
    hidden: int
    hyper: int
    embedding: int


SETTINGS = [Setting("256 units", 32, 50, 256, 256, 64, 16), Setting("Penn Treebank", 128, 100, 50, 1000, 128, 4)]


def step_by_step(cell: HyperLSTMCell, x: Tensor) -> Tensor:
    """Run the cell's equations, with autograd's own gradients: x (T, B, I) to outputs (T, B, H)."""
    state, outputs = (cell.start(x.shape[1]),) * 2, []
    for x_t in x:
        state = cell.step(x_t, state)
        outputs.append(state[0][:, : cell.hidden_size])
    return torch.stack(outputs)


def measure(setting: Setting, options: argparse.Namespace) -> list[dict[str, str | float]]:
    name, B, T, inputs, hidden, hyper, embedding = setting
    torch.manual_seed(0)
    x = torch.randn(T, B, inputs, device=options.device, requires_grad=True)
    grad = torch.randn(T, B, hidden, device=options.device)
    lstm = nn.LSTM(inputs, hidden).to(options.device)
    plain, normed = (
        HyperLSTM(inputs, hidden, hyper_size=hyper, embedding_size=embedding, layer_norm=layer_norm).to(options.device)
        for layer_norm in (False, True)
    )
    forms = {
        "torch.nn.LSTM": (lstm, lambda: lstm(x)[0]),
        "HyperLSTM": (plain, lambda: plain(x)[0]),
        "HyperLSTM, layer norm": (normed, lambda: normed(x)[0]),
        "step by step": (plain, lambda: step_by_step(plain.cells[0], x)),
        "step by step, layer norm": (normed, lambda: step_by_step(normed.cells[0], x)),
    }
    if importlib.util.find_spec("labml_nn"):
        from labml_nn.hypernetworks.hyper_lstm import HyperLSTM as Theirs

        theirs = Theirs(inputs, hidden, hyper, embedding, 1).to(options.device)
        forms["labml-nn, layer norm"] = theirs, lambda: theirs(x)[0]
    functions = {
        form: lambda layer=layer, run=run: torch.autograd.grad(run(), (x, *layer.parameters()), grad)
        for form, (layer, run) in forms.items()
    }
    peaks = {form: peak_bytes(function, options.device) for form, function in functions.items()}  # warms up, too
    times = {form: [] for form in functions}
    for _ in range(options.repeats):  # interleaved, so that a busy moment affects all of them
        for form, function in functions.items():
            times[form].append(seconds(function, options.device))
    return [
        {
            "setting": name,
            "form": form,
            "ms": 1e3 * min(times[form]),
            "x torch.nn.LSTM": min(times[form]) / min(times["torch.nn.LSTM"]),
            "peak MiB": peaks[form] / 2**20,
            "parameters": f"{sum(p.numel() for p in layer.parameters()):,}",
        }
        for form, (layer, _) in forms.items()
    ]


def main(arguments: list[str]) -> None:
    options = parse("hyper_lstm", __doc__, arguments)
    rows = [row for setting in SETTINGS for row in measure(setting, options)]
    report("hyper_lstm", rows, options)
