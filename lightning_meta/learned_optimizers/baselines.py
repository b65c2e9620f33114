"""Hand-made optimizers to compare the learned one with, each at the best learning rate of a grid.

Shapes: B inner problems of n coordinates each.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_meta.learned_optimizers.unroll import Problems, loss_and_gradient

# The paper's four, with the defaults of Torch7's optim, and SGD with momentum.
RULES = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "NAG": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "RMSprop": partial(torch.optim.RMSprop, alpha=0.99, eps=1e-8),
    "Adam": partial(torch.optim.Adam, betas=(0.9, 0.999), eps=1e-8),
}


def descend(rule: str, rate: float, problems: Problems, steps: int) -> tuple[Tensor, Tensor]:
    """Minimise with a hand-made rule from the problems' start.

    Each rule treats every coordinate on its own, so one tensor can hold all B problems.

    Args:
        rule: A key of ``RULES``.
        rate: Learning rate.
        problems: The problems to minimise.
        steps: Number of steps.

    Returns:
        Losses (steps + 1, B) and the last theta (B, n).

    >>> import torch
    >>> from lightning_meta.learned_optimizers.problems import Quadratics
    >>> from lightning_meta.running.segments import Segment
    >>> problems = Quadratics(torch.eye(2)[None], torch.ones(1, 2), torch.zeros(1, 2), None, Segment(0, 0, 5, True))
    >>> descend("SGD", 0.25, problems, steps=2)
    (tensor([[2.0000],
            [0.5000],
            [0.1250]]), tensor([[0.7500, 0.7500]]))
    """
    theta, losses = problems.start.clone(), []
    optimizer = RULES[rule]([theta], lr=rate)
    for t in range(steps + 1):
        loss, theta.grad = loss_and_gradient(problems, theta, t)
        losses.append(loss)
        if t < steps:
            optimizer.step()
    return torch.stack(losses), theta


def best_rate(rule: str, rates: Sequence[float], problems: Problems, steps: int) -> float:
    """Return the rate with the lowest mean loss after ``steps`` steps, the paper's criterion (section 3)."""
    finals = {rate: descend(rule, rate, problems, steps)[0][-1].mean().item() for rate in rates}
    return min(rates, key=lambda rate: finals[rate] if math.isfinite(finals[rate]) else math.inf)
