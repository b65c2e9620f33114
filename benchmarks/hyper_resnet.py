"""A training step of a residual network with generated kernels, against a step of the plain network.

The generator makes all kernels in one call, or each layer's kernel in a call of its own. The loss has the paper's L2
penalty on the kernels.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import parse, peak_bytes, report, seconds
from lightning_meta.hypernetworks.networks import WideResNet, l2

BATCH = 128
NETWORKS = {"40-1": (40, 1), "40-2": (40, 2)}  # depth, width


class LayerByLayer(WideResNet):
    """The same network, in which every layer asks the generator for its own kernel."""

    def kernels(self) -> list[Tensor]:
        return [layer.weight for layer in self.convolutions]


FORMS = {"plain": (WideResNet, False), "hyper": (WideResNet, True), "hyper, layer by layer": (LayerByLayer, True)}


def measure(name: str, depth: int, width: int, batch: int, options: argparse.Namespace) -> list[dict[str, str | float]]:
    x = torch.randn(batch, 3, 32, 32, device=options.device)
    labels = torch.arange(batch, device=options.device) % 10
    networks, functions = {}, {}
    for form, (make, hyper) in FORMS.items():
        torch.manual_seed(0)
        networks[form] = network = make(hyper, depth, width).to(options.device)
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)

        def step(network=network, optimizer=optimizer) -> None:
            logits, kernels = network(x)
            loss = F.cross_entropy(logits, labels) + 5e-4 * l2(kernels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        functions[form] = step
    for function in functions.values():
        function()  # makes the optimizer's state
    peaks = {form: peak_bytes(function, options.device) for form, function in functions.items()}
    times = {form: [] for form in functions}
    for _ in range(options.repeats):  # interleaved, so that a busy moment hits all of them
        for form, function in functions.items():
            times[form].append(seconds(function, options.device))
    return [
        {
            "setting": f"{name}, batch {batch}",
            "form": form,
            "ms": 1e3 * min(times[form]),
            "x plain": min(times[form]) / min(times["plain"]),
            "peak MiB": peaks[form] / 2**20,
            "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        }
        for form, network in networks.items()
    ]


def main(arguments: list[str]) -> None:
    options = parse("hyper_resnet", __doc__, arguments)
    rows = [row for name, sizes in NETWORKS.items() for row in measure(name, *sizes, BATCH, options)]
    report("hyper_resnet", rows, options)
