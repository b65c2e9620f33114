import pytest

from lightning_meta.running.learning_rates import constant, cosine, exponential, halved, piecewise


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (constant, {0: 1, 10**6: 1}),
        (cosine(100), {0: 1, 25: 0.8535534, 50: 0.5, 100: 0, 150: 0}),
        (exponential(1e-4, 100), {0: 1, 25: 0.1, 50: 0.01, 100: 1e-4, 150: 1e-4}),
        (halved(4000), {0: 1, 3999: 1, 4000: 0.5, 8000: 0.25}),
        (piecewise(0.1, [(10, 0.02), (20, 0.004)]), {0: 1, 9: 1, 10: 0.2, 19: 0.2, 20: 0.04, 10**6: 0.04}),
    ],
)
def test_factors(factor, expected):
    assert {step: factor(step) for step in expected} == pytest.approx(expected)
