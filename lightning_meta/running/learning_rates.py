"""How a learning rate falls from outer step to outer step: factors of ``model.lr``."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Factor = Callable[[int], float]


def by_step(optimizer: Optimizer, factor: Factor) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for a rate that is multiplied by ``factor(step)``."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def constant(step: int) -> float:
    """As it is."""
    return 1.0


def cosine(steps: int) -> Factor:
    """Half a cosine, from 1 at step 0 to 0 at the last of ``steps`` and after it."""
    return lambda step: 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))


def exponential(final: float, steps: int) -> Factor:
    """By the same ratio at every step, to ``final`` at the last of ``steps`` and after it."""
    return lambda step: final ** min(1, step / steps)


def halved(every: int) -> Factor:
    """By half, every so many steps."""
    return lambda step: 0.5 ** (step // every)


def piecewise(lr: float, stages: list[tuple[int, float]]) -> Factor:
    """Rates of a rising list of (first step, rate), as parts of ``lr``, which holds before the first of them."""
    return lambda step: next((rate for start, rate in reversed(stages) if start <= step), lr) / lr
