"""A training step of the video predictor: bfloat16 and channels_last against float32, and what they do to the loss."""

import argparse

import torch

from benchmarks.report import parse, report, seconds
from lightning_meta.dynamic_filters.video import FramePredictor, cross_entropy

WIDTHS = (16, 32)  # of the default run and of the paper
FORMS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32, channels_last": (torch.float32, torch.channels_last),
    "bfloat16": (torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels_last": (torch.bfloat16, torch.channels_last),
}


def measure(width: int, options: argparse.Namespace) -> list[dict[str, str | float]]:
    frames = torch.rand(16, 20, 1, 64, 64, generator=torch.Generator().manual_seed(0)).to(options.device)
    steps, losses = {}, {}
    for form, (dtype, layout) in FORMS.items():
        torch.manual_seed(0)
        network = FramePredictor(width=width).to(options.device, memory_format=layout)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)

        def step(network=network, optimizer=optimizer, dtype=dtype, form=form) -> None:
            with torch.autocast(options.device, dtype, enabled=dtype is not torch.float32):
                predictions, _, _ = network(frames, 0, 19, 10)
                loss = cross_entropy(predictions, frames[:, 10:]).mean()
            optimizer.zero_grad()
            (loss / 4096).backward()
            optimizer.step()
            losses[form] = loss.item()

        step()
        steps[form] = step
    times = {form: [] for form in FORMS}
    for _ in range(options.repeats):
        for form, step in steps.items():
            times[form].append(seconds(step, options.device))
    slowest = min(times["float32"])
    return [
        {
            "width": str(width),
            "form": form,
            "s a step": min(times[form]),
            "x faster than float32": slowest / min(times[form]),
            "loss after these steps": losses[form],
        }
        for form in FORMS
    ]


def main(arguments: list[str]) -> None:
    options = parse("training_step", __doc__, arguments)
    report("training_step", [row for width in WIDTHS for row in measure(width, options)], options)
