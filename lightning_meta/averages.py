"""How values are gathered over batches and processes: as torchmetrics does, but those that are not numbers stay in.

Left out, as they are by default there, they would hide that a model has diverged.
"""

from torchmetrics import CatMetric, MeanMetric


class Mean(MeanMetric):
    """A weighted mean; not a number as soon as one value is none."""

    def __init__(self) -> None:
        super().__init__(nan_strategy=float("nan"))


class Values(CatMetric):
    """All values, one after another."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")
