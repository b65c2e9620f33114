"""What an experiment is measured by, and how its values are recorded and shown."""

from typing import Any, NamedTuple

from scipy.special import stdtrit
from torch import Tensor


class Measure(NamedTuple):
    """What an experiment is judged by: a module's attribute ``measure``, and those in ``further_measures``, if any.

    Further measures that a test did not log (for want of a truth to compare with) are left out of its record.
    ``metric`` and the values of ``baselines`` are names that the test logs. Where it logs ``NAME/interval`` too, that
    is half the width of the 95 % interval of ``NAME``.
    """

    name: str
    unit: str
    metric: str
    baselines: dict[str, str]


def half_interval(values: Tensor) -> Tensor:
    """Half the width of the 95 % confidence interval of a mean, by Student's t.

    Args:
        values: (N,), N > 1, one value for each independent sample.

    >>> half_interval(torch.tensor([1.0, 2.0, 3.0]))
    tensor(2.4841)
    """
    return float(stdtrit(len(values) - 1, 0.975)) * values.std() / len(values) ** 0.5


def recorded(measure: Measure, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """A measure's part of the record."""
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
    """A measure's value and those of its baselines for a table: four digits, and half the 95 % interval if known."""
    numbers = [values["value"], *values["baselines"].values()]
    intervals = values.get("baseline_intervals", {})
    halves = [values.get("interval"), *map(intervals.get, values["baselines"])]
    texts = [f"{number:.1f}" if 1000 <= abs(number) < 100_000 else f"{number:.4g}" for number in numbers]
    return [text if half is None else f"{text} ± {half:.2g}" for text, half in zip(texts, halves, strict=True)]
