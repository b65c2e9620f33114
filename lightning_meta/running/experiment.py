"""The base class of all experiments: what ``MetaSchedule`` and the callbacks expect of a model."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_meta.running.measures import Measure, half_interval


class Experiment(LightningModule):
    """A LightningModule that an experiment trains and tests.

    Attributes:
        measure: What the test judges the model by; its metric is logged in the test.
        further_measures: Further measures of the test.
        carry: What the next segment of an inner problem starts from; None: the beginning. ``MetaSchedule`` detaches it
            between segments, drops it at the end of a horizon, and saves it in checkpoints.
    """

    measure: Measure
    further_measures: Sequence[Measure] = ()
    carry: Any = None

    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Draw pictures of a validation batch for TensorBoard: uint8 (3, H, W) by name."""
        raise NotImplementedError

    def log_mean(self, name: str, values: Tensor) -> None:
        """Log the mean of the samples' values (N,) and, as ``NAME/interval``, half its 95 % confidence interval."""
        self.log(name, values.mean())
        if len(values) > 1:
            self.log(f"{name}/interval", half_interval(values))
