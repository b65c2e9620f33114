"""Mean and concatenation metrics that propagate NaN, where torchmetrics drops it: divergence stays visible.

Both compute in ``PRECISE``, float64 where there is one: so the result does not depend on how samples are split into
batches and processes.
"""

import torch
from torchmetrics import CatMetric, MeanMetric

PRECISE = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs have no float64


class _Precise:
    # torchmetrics casts what it is given to this dtype, and falls back to float32 when a metric is moved to a device.
    dtype = PRECISE


class Mean(_Precise, MeanMetric):
    """A weighted mean; NaN if any value is NaN."""

    def __init__(self) -> None:
        super().__init__(nan_strategy=float("nan"))
        self.set_dtype(PRECISE)


class Values(_Precise, CatMetric):
    """All values, concatenated."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")
        self.set_dtype(PRECISE)
