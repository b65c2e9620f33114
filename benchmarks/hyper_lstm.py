"""A HyperLSTM over a sequence, forward and backward, against torch.nn.LSTM of as many units and a step written plainly.

Inputs are dense vectors that need gradients, as those of a second layer or an embedding do: 256 and 50 numbers. Where
labml-nn is installed (requirements.txt), its HyperLSTM, which always has layer norm, is measured too.
"""

import argparse
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import parse, peak_bytes, report, seconds
from lightning_meta.hypernetworks.layers import HyperLSTM, HyperLSTMCell


class Setting(NamedTuple):
    """B samples, T steps; inputs, units, units of the small LSTM, numbers of an embedding."""

    name: str
    B: int
    T: int
    inputs: int
    hidden: int
    hyper: int
    embedding: int


SETTINGS = [Setting("256 units", 32, 50, 256, 256, 64, 16), Setting("Penn Treebank", 128, 100, 50, 1000, 128, 4)]


def step_by_step(cell: HyperLSTMCell, x: Tensor) -> Tensor:
    """Outputs (T, B, H) for x (T, B, I), equation by equation, with autograd's own gradients."""

    def norm(gate: Tensor, k: int, prefix: str = "") -> Tensor:
        if not cell.layer_norm:
            return gate
        gain, bias = getattr(cell, f"{prefix}norm_weight")[k], getattr(cell, f"{prefix}norm_bias")[k]
        return F.layer_norm(gate, gain.shape, gain, bias, 1e-3)

    def units(gates: list[Tensor], c: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
        i, f, g, o = (norm(gate, k, prefix) for k, gate in enumerate(gates))
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(norm(c, 4, prefix)), c

    h, hyper_h = cell.start(x.shape[1]).split([cell.hidden_size, cell.hyper_size], -1)
    c, hyper_c = h, hyper_h
    outputs = []
    for x_t in x.unbind(0):
        gates = F.linear(torch.cat([h, x_t], -1), cell.hyper_weight_ih, cell.hyper_bias)
        gates = gates + F.linear(hyper_h, cell.hyper_weight_hh)
        hyper_h, hyper_c = units(gates.chunk(4, -1), hyper_c, "hyper_")
        gates = []
        for k, (by_h, by_x) in enumerate(
            zip(F.linear(h, cell.weight_hh).chunk(4, -1), F.linear(x_t, cell.weight_ih).chunk(4, -1), strict=True)
        ):
            biases = (*cell.embed_bias[:, k], None)
            z = [F.linear(hyper_h, cell.embed_weight[j, k], biases[j]) for j in range(3)]
            d_h, d_x, b = (F.linear(z[j], cell.scale_weight[j, k]) for j in range(3))
            gates.append(d_h * by_h + d_x * by_x + b + cell.bias.chunk(4)[k])
        h, c = units(gates, c)
        outputs.append(h)
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
    for _ in range(options.repeats):  # interleaved, so that a busy moment hits all of them
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
