import math

import pytest
import torch

from lightning_meta.running.metrics import Mean, Values


def test_what_is_not_a_number_is_not_left_out():
    mean, values = Mean(), Values()
    mean.update(1.0, weight=3)
    mean.update(torch.tensor([2.0, 4.0]))
    assert mean.compute().item() == pytest.approx((3 + 2 + 4) / 5)
    mean.update(torch.tensor([1.0, math.nan]))
    assert mean.compute().isnan()
    values.update(torch.tensor([1.0, math.nan]))
    values.update(torch.tensor([2.0]))
    assert torch.equal(values.compute().isnan(), torch.tensor([False, True, False]))


def test_moving_a_metric_to_a_device_does_not_make_it_float32():
    third = torch.tensor(1 / 3, dtype=torch.float64)
    for metric in (Mean().to("cpu"), Values().to("cpu")):
        metric.update(third)
        assert metric.compute().item() == 1 / 3
