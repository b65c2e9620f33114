"""How a learning rate falls from outer step to outer step."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def by_step(optimizer: Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for a rate that is multiplied by ``factor(step)``."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def cosine(step: int, steps: int) -> float:
    """Half a cosine, from 1 at step 0 to 0 at the last of ``steps`` and after it."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))
