"""An outer step of a learned optimizer, against the same one problem and one parameter at a time with nn.LSTMCell."""

import argparse

import torch
from torch import Tensor, nn

from benchmarks.report import parse, peak_bytes, report, seconds
from lightning_meta.learned_optimizers.layers import LearnedRule, log_sign
from lightning_meta.learned_optimizers.problems import MLP, Classification, Quadratics
from lightning_meta.learned_optimizers.unroll import Problems, first_order_loss, unroll
from lightning_meta.running.segments import Segment

SETTINGS = [("MNIST's MLP", 1, 20), ("MNIST's MLP", 1, 5), ("MNIST's MLP", 1, 100), ("quadratics", 128, 20)]


def make(setting: str, problems: int, steps: int, device: str) -> tuple[LearnedRule, Problems]:
    """A rule and problems of the paper's sizes, made-up images."""
    random = torch.Generator().manual_seed(0)
    segment = Segment(0, 0, steps, last=False)
    if setting == "quadratics":
        W, y = torch.randn(problems, 10, 10, generator=random), torch.randn(problems, 10, generator=random)
        start = 0.01 * torch.randn(problems, 10, generator=random)
        return LearnedRule(p=None, output_scale=1.0).to(device), Quadratics(
            W.to(device), y.to(device), start.to(device), None, segment
        )
    images = torch.randint(256, (10_000, 1, 28, 28), dtype=torch.uint8, generator=random)
    labels = torch.randint(10, (10_000,), generator=random)
    indices = torch.randint(10_000, (problems, steps + 1, 128), generator=random)
    start = 0.01 * torch.randn(problems, 15_910, generator=random)
    tensors = (tensor.to(device) for tensor in (images, labels, indices, start))
    return LearnedRule().to(device), Classification(MLP(784, [20], 10, "sigmoid"), *tensors, None, segment)


def ours(rule: LearnedRule, problems: Problems) -> Tensor:
    rule.zero_grad()
    state = rule.start(len(problems.start), problems.shapes)
    run = unroll(rule, problems, problems.start, state, 0, problems.segment.stop)
    loss = first_order_loss(rule, run, state, problems.shapes)
    loss.backward()
    return loss


def one_at_a_time(rule: LearnedRule, problems: Problems, retain: bool) -> Tensor:
    """The obvious way: each problem alone, each parameter through nn.LSTMCell, autograd through it all.

    With ``retain`` the inner gradients come from a backward pass through everything so far, as in the public
    reproductions; else from the problem alone.
    """
    rule.zero_grad()
    (network,) = rule.networks.values()
    inputs, hidden = network.layers[0].input_size, network.hidden_size
    cells = [nn.LSTMCell(size, hidden, device=problems.start.device) for size in (inputs, hidden)]
    for cell, layer in zip(cells, network.layers, strict=True):
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    total = 0.0
    for b in range(len(problems.start)):
        problem = problems.select(torch.arange(len(problems.start), device=problems.start.device) == b)
        sizes = [torch.Size(shape).numel() for shape in problem.shapes]
        theta = list(problem.start[0].split(sizes))
        theta = [part.detach().requires_grad_() for part in theta]
        states = [[(part.new_zeros(len(part), hidden),) * 2 for _ in cells] for part in theta]
        losses = 0.0
        for t in range(problem.segment.stop + 1):
            if retain:
                for part in theta:
                    part.retain_grad()
                loss = problem.loss(torch.cat(theta)[None], t).sum()
                loss.backward(retain_graph=True)
                gradients = [part.grad.clone() for part in theta]
            else:
                leaves = [part.detach().requires_grad_() for part in theta]
                gradients = torch.autograd.grad(problem.loss(torch.cat(leaves)[None], t).sum(), leaves)
                loss = problem.loss(torch.cat(theta)[None], t).sum()
            losses = losses + loss
            if t == problem.segment.stop:
                break
            moved = []
            for part, gradient, state in zip(theta, gradients, states, strict=True):
                x = gradient[:, None] if network.p is None else log_sign(gradient, network.p)
                for i, cell in enumerate(cells):
                    state[i] = cell(x, state[i])
                    x = state[i][0]
                moved.append(part + network.output_scale * network.output(x)[:, 0])
            theta = moved
        for cell in cells:
            cell.zero_grad()  # what the inner backward passes left there
        losses.backward()
        total += losses.item() / len(problems.start)
    return torch.tensor(total)


FORMS = {
    "ours": ours,
    "one at a time": lambda rule, problems: one_at_a_time(rule, problems, retain=False),
    "one at a time, graph retained": lambda rule, problems: one_at_a_time(rule, problems, retain=True),
}


def measure(setting: tuple[str, int, int], options: argparse.Namespace) -> list[dict[str, str | float]]:
    rule, problems = make(*setting, options.device)
    times, losses, peaks, device = {}, {}, {}, options.device
    for form, step in FORMS.items():
        if form != "ours" and setting[2] > 20:
            continue  # more memory than most machines have
        slow = form != "ours"
        losses[form] = step(rule, problems).item()
        if setting[1] == 1:  # of 128 problems one at a time the profiler would keep too many events
            peaks[form] = peak_bytes(lambda step=step: step(rule, problems), device)
        repeats = 1 if slow and setting[1] > 1 else 2 if slow else options.repeats
        times[form] = min(seconds(lambda step=step: step(rule, problems), device) for _ in range(repeats))
    return [
        {
            "setting": f"{setting[1]} x {setting[0]}, unroll {setting[2]}",
            "form": form,
            "ms a problem": 1e3 * times[form] / setting[1],
            "x ours": times[form] / times["ours"],
            "steps a second": 1 / times[form],
            "peak MiB": peaks[form] / 2**20 if form in peaks else "",
            "loss": losses[form],
        }
        for form in times
    ]


def main(arguments: list[str]) -> None:
    options = parse("meta_step", __doc__, arguments)
    report("meta_step", [row for setting in SETTINGS for row in measure(setting, options)], options)
