"""Measures of an experiment: their values in records and tables, and confidence intervals."""

from typing import Any, NamedTuple

from scipy.special import stdtrit
from torch import Tensor


class Measure(NamedTuple):
    """A measure by which a test judges a model and its baselines; lower is better for the first measure.

    A further measure that the test did not log, because there was no truth to compare with, is left out of the record.
    If the test logs ``NAME/interval`` beside a metric ``NAME``, it is half the width of the 95 % confidence interval.
    """

    name: str
    unit: str
    metric: str  # the name under which the test logs the model's value
    baselines: dict[str, str]  # by the baseline's name, the name under which the test logs its value


def half_interval(values: Tensor) -> Tensor:
    """Half the width of the 95 % confidence interval of a mean, by Student's t.

    Args:
        values: (N,), N > 1, one value for each independent sample.

    >>> import torch
    >>> half_interval(torch.tensor([1.0, 2.0, 3.0]))
    tensor(2.4841)
    """
    return float(stdtrit(len(values) - 1, 0.975)) * values.std() / len(values) ** 0.5


def recorded(measure: Measure, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """Return a measure's part of the record: its values among the logged ``metrics``."""
    names = measure.baselines.items()
    values = {
        "measure": measure.name,
        "unit": measure.unit,
        "value": metrics[measure.metric].item(),
        "baselines": {name: metrics[metric].item() for name, metric in names},
    }
    if f"{measure.metric}/interval" in metrics:
        values["interval"] = metrics[f"{measure.metric}/interval"].item()
        values["baseline_intervals"] = {name: metrics[f"{metric}/interval"].item() for name, metric in names}
    return values


def amounts(values: dict[str, Any]) -> list[str]:
    """Format the values of a model and its baselines for a table: four digits, and half the 95 % interval if known.

    >>> amounts({"value": 0.12345, "interval": 0.01, "baselines": {"chance": 90.0}})
    ['0.1235 ± 0.01', '90']
    """
    numbers = [values["value"], *values["baselines"].values()]
    intervals = values.get("baseline_intervals", {})
    halves = [values.get("interval"), *map(intervals.get, values["baselines"])]
    texts = [f"{number:.1f}" if 1000 <= abs(number) < 100_000 else f"{number:.4g}" for number in numbers]
    return [text if half is None else f"{text} ± {half:.2g}" for text, half in zip(texts, halves, strict=True)]
