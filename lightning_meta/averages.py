"""Mean and concatenation metrics that propagate NaN, where torchmetrics drops it: divergence stays visible.

Both compute in float64, so that the result does not depend on how samples are split into batches and processes.
"""

import torch
from torchmetrics import CatMetric, MeanMetric


class _Float64:
    # torchmetrics casts what it is given to this dtype, and falls back to float32 when a metric is moved to a device.
    dtype = torch.float64


class Mean(_Float64, MeanMetric):
    """A weighted mean; NaN as soon as one value is."""

    def __init__(self) -> None:
        super().__init__(nan_strategy=float("nan"))
        self.set_dtype(torch.float64)


class Values(_Float64, CatMetric):
    """All values, one after another."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")
        self.set_dtype(torch.float64)
