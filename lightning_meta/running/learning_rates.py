"""Schedules of the learning rate: factors of ``model.lr`` by outer step."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Factor = Callable[[int], float]


def by_step(optimizer: Optimizer, factor: Factor) -> dict[str, Any]:
    """Return what ``configure_optimizers`` returns if ``factor(step)`` multiplies the learning rate at each step."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def constant(step: int) -> float:
    """Return 1: the rate stays as it is."""
    return 1.0


def cosine(steps: int) -> Factor:
    """Return half a cosine, from 1 at step 0 to 0 at step ``steps`` and after it.

    >>> [round(cosine(100)(step), 2) for step in (0, 50, 100, 200)]
    [1.0, 0.5, 0.0, 0.0]
    """
    return lambda step: 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))


def exponential(final: float, steps: int) -> Factor:
    """Return an exponential decay, from 1 at step 0 to ``final`` at step ``steps`` and after it."""
    return lambda step: final ** min(1, step / steps)


def halved(every: int) -> Factor:
    """Return a factor that is halved after every ``every`` steps."""
    return lambda step: 0.5 ** (step // every)


def piecewise(lr: float, stages: list[tuple[int, float]]) -> Factor:
    """Return the factors that give the rates of ``stages``, a rising list of (first step, rate); before it, ``lr``."""
    return lambda step: next((rate for start, rate in reversed(stages) if start <= step), lr) / lr
