"""A layer with predicted filters, forward and backward: one exemplar at a time, and with the whole kernel predicted.

The last layer of a learnet, its head, predicts the filters from m features of an exemplar. A whole kernel has
f * f * in * out numbers, a factorised one f * f * d. The head has m + 1 weights for each of them, so both are measured
with their heads. Times and memory include the gradients of all weights.
"""

import argparse
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import parse, peak_bytes, report, seconds
from lightning_meta.learnets.layers import FactorisedConv2d


class Setting(NamedTuple):
    """B pictures and as many exemplars with m features each; channels, side of the filters and of the pictures."""

    name: str
    B: int
    inputs: int
    outputs: int
    f: int
    H: int
    m: int


SETTINGS = [
    Setting("Omniglot", 32, 16, 64, 5, 12, 64 * 4 * 4),
    Setting("tracking", 8, 48, 128, 5, 29, 64 * 6 * 6),  # pupil and learnet B
]


def one_at_a_time(layer: FactorisedConv2d, x: Tensor, filters: Tensor) -> Tensor:
    return torch.cat([layer(x[i : i + 1], filters[i : i + 1]) for i in range(len(x))])


def full_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """(B, out, H', W') for x (B, in, H, W) and kernels (B, out, in, f, f)."""
    y = F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1), groups=len(x))
    return y[0].unflatten(0, kernels.shape[:2])


def measure(setting: Setting, options: argparse.Namespace) -> list[dict[str, str | float]]:
    name, B, inputs, outputs, f, H, m = setting
    device = torch.device(options.device)
    torch.manual_seed(0)
    layer = FactorisedConv2d(inputs, outputs, f).to(device)
    kernel_shape = (outputs, inputs, f, f)
    factors, whole = math.prod(layer.filter_shape), math.prod(kernel_shape)
    head, full_head = (nn.Linear(m, values, device=device) for values in (factors, whole))
    x = torch.randn(B, inputs, H, H, device=device, requires_grad=True)
    z = torch.randn(B, m, device=device, requires_grad=True)
    filters = (torch.randn(B, *layer.filter_shape, device=device) / f).requires_grad_()
    grad_y = torch.randn(B, outputs, H - f + 1, H - f + 1, device=device)
    weights = list(layer.parameters())
    forms = {  # what, form: (the output, what it is differentiated by, predicted values, the head)
        ("layer", "ours"): (lambda: layer(x, filters), [x, filters, *weights], factors, None),
        ("layer", "one exemplar at a time"): (
            lambda: one_at_a_time(layer, x, filters),
            [x, filters, *weights],
            factors,
            None,
        ),
        ("head + layer", "ours"): (
            lambda: layer(x, head(z).view(B, *layer.filter_shape)),
            [x, z, *weights, *head.parameters()],
            factors,
            head,
        ),
        ("head + layer", "whole kernel"): (
            lambda: full_convolution(x, full_head(z).view(B, *kernel_shape)),
            [x, z, *full_head.parameters()],
            whole,
            full_head,
        ),
    }
    steps = {form: lambda y=y, by=by: torch.autograd.grad(y(), by, grad_y) for form, (y, by, _, _) in forms.items()}
    peaks = {form: peak_bytes(step, options.device) for form, step in steps.items()}  # warms up, too
    times = {form: [] for form in steps}
    for _ in range(options.repeats):  # interleaved, so that a busy moment hits all of them
        for form, step in steps.items():
            times[form].append(seconds(step, options.device))
    return [
        {
            "setting": f"{name}: {B}x{inputs}x{H}x{H} to {outputs}, {f}x{f}",
            "what": what,
            "form": form,
            "ms": 1e3 * min(times[what, form]),
            "x ours": min(times[what, form]) / min(times[what, "ours"]),
            "peak MiB": peaks[what, form] / 2**20,
            "predicted values": f"{values:,}",
            "head's parameters": f"{sum(p.numel() for p in its_head.parameters()):,}" if its_head else "",
        }
        for (what, form), (_, _, values, its_head) in forms.items()
    ]


def main(arguments: list[str]) -> None:
    options = parse("learnet_layer", __doc__, arguments)
    report("learnet_layer", [row for setting in SETTINGS for row in measure(setting, options)], options)
