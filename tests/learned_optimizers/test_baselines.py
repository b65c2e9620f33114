import math

import pytest
import torch

from lightning_meta.learned_optimizers.baselines import RULES, best_rate, descend
from lightning_meta.learned_optimizers.problems import MLP, Classification, Quadratics
from lightning_meta.running.segments import Segment

OPTIONS = {
    "SGD": (torch.optim.SGD, {"momentum": 0, "nesterov": False}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0, "nesterov": False}),
    "NAG": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-8, "momentum": 0, "centered": False}),
    "Adam": (torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}),
}
STEPS = 5


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratics():
    W, y, start = randn(3, 4, 4, seed=1), randn(3, 4, seed=2), randn(3, 4, seed=3)
    return Quadratics(W, y, start, None, Segment(0, 0, STEPS, True))


def mlp():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, 1, 2, 2), generator=random, dtype=torch.uint8)
    indices = torch.randint(10, (3, STEPS + 1, 4), generator=random)
    network = MLP(4, [3], 2, "sigmoid")
    start = randn(3, sum(p.numel() for p in network.parameters()))
    return Classification(network, images, torch.arange(10) % 2, indices, start, None, Segment(0, 0, STEPS, True))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("make", [quadratics, mlp])
@pytest.mark.parametrize("rule", OPTIONS)
def test_problems_are_minimised_as_if_each_were_alone(rule, make, scaled):
    problems = make()
    if scaled:
        problems = problems._replace(scale=(0.5 * randn(*problems.start.shape, seed=4)).exp())
    before = problems.start.clone()
    losses, theta = descend(rule, 0.03, problems, STEPS)
    assert losses.shape == (STEPS + 1, 3)
    assert torch.equal(problems.start, before)
    kind, options = OPTIONS[rule]
    for b in range(3):
        one = problems.select(torch.arange(3) == b)
        x = torch.nn.Parameter(one.start.clone())
        optimizer = kind([x], lr=0.03, **options)
        for t in range(STEPS + 1):
            loss = one.loss(x if one.scale is None else x * one.scale, t).sum()
            torch.testing.assert_close(losses[t, b], loss.detach(), rtol=1e-12, atol=1e-12)
            if t < STEPS:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(theta[b], x.detach()[0], rtol=1e-12, atol=1e-12)


def test_every_rule_is_documented_here():
    assert set(RULES) == set(OPTIONS)


def test_momentum_and_nag_by_hand():
    """Sutskever's form as Torch7 and torch write it: v = 0.9 v + g; theta -= rate v, or rate (g + 0.9 v)."""
    problems = quadratics()
    for rule, ahead in (("momentum", False), ("NAG", True)):
        theta, v = problems.start.clone(), 0
        for _ in range(STEPS):
            g = 2 * torch.einsum("bij,bi->bj", problems.W, torch.einsum("bij,bj->bi", problems.W, theta) - problems.y)
            v = 0.9 * v + g
            theta = theta - 0.02 * (g + 0.9 * v if ahead else v)
        torch.testing.assert_close(descend(rule, 0.02, problems, STEPS)[1], theta)


GRID = [1e-3, 0.01, 0.03, 0.1, 1.0, 1e200]


@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("grid", [GRID, GRID[::-1], GRID[:2]])
def test_the_best_rate_has_the_lowest_mean_last_loss(rule, grid):
    problems = quadratics()
    finals = [descend(rule, rate, problems, STEPS)[0][-1].mean().item() for rate in grid]
    best = min((final, rate) for final, rate in zip(finals, grid, strict=True) if math.isfinite(final))
    assert best_rate(rule, grid, problems, STEPS) == best[1]


def test_a_rate_that_diverges_is_never_the_best():
    problems = quadratics()
    for rate in (1e300, 1e160):
        assert not descend("SGD", rate, problems, STEPS)[0][-1].mean().isfinite()
        for grid in ([rate, 100.0], [100.0, rate]):
            assert best_rate("SGD", grid, problems, STEPS) == 100
    # one problem in three is enough
    steep = problems._replace(W=problems.W * torch.tensor([1, 1e100, 1], dtype=torch.float64)[:, None, None])
    assert not descend("SGD", 0.01, steep, STEPS)[0][-1].mean().isfinite()
    assert best_rate("SGD", [0.01, 0.0], steep, STEPS) == 0
