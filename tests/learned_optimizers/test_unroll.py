import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_meta.learned_optimizers import unroll as module
from lightning_meta.learned_optimizers.layers import LearnedRule
from lightning_meta.learned_optimizers.problems import MLP, Classification, ConvNet, Quadratics
from lightning_meta.learned_optimizers.unroll import (
    first_order_loss,
    imitation_loss,
    loss_and_gradient,
    optimize,
    second_order_loss,
    unroll,
)
from lightning_meta.running.segments import Segment

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ORDERS = pytest.mark.parametrize("second", [False, True], ids=["first order", "second order"])


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=numbers(seed), dtype=torch.float64)


def quadratics(start=0, stop=4, B=3, n=5, scaled=False):
    scale = (0.5 * randn(B, n, seed=4)).exp() if scaled else None
    segment = Segment(0, start, stop, True)
    return Quadratics(0.3 * randn(B, n, n, seed=1), randn(B, n, seed=2), randn(B, n, seed=3), scale, segment)


def classification(network, size, start=0, stop=3, B=2, channels=3, scaled=False):
    """Minibatches of 6 images."""
    images = torch.randint(256, (20, channels, size, size), generator=numbers(), dtype=torch.uint8)
    indices = torch.randint(20, (B, 60, 6), generator=numbers(1))[:, start : stop + 1]
    n = sum(p.numel() for p in network.parameters())
    scale = (0.5 * randn(B, n, seed=4)).exp() if scaled else None
    segment = Segment(0, start, stop, True)
    return Classification(network, images, torch.arange(20) % 3, indices, 0.5 * randn(B, n), scale, segment)


def mlp(**options):
    return classification(MLP(4, [3], 3, "sigmoid"), 2, channels=1, **options)


def convnet(**options):
    return classification(ConvNet(8, 2, 3), 8, **options)


PROBLEMS = {"quadratics": quadratics, "MLP": mlp, "ConvNet": convnet}


def rule_of(**options):
    torch.manual_seed(0)
    rule = LearnedRule(**{"hidden_size": 4, "output_scale": 0.3} | options).double()
    for network in rule.networks.values():
        network.output.weight.data *= 10  # steps that matter
    return rule


def middle(rule, problems):
    """A state as in mid-trajectory."""
    start = rule.start(len(problems.start), problems.shapes)
    return {name: [(0.3 * randn(*h.shape, seed=5), randn(*c.shape, seed=6)) for h, c in s] for name, s in start.items()}


def literal(rule, problems, state, log=False, second=False, late=0):
    """The outer loss, whose graph leads through the updates and, for the second order, through the gradients."""
    theta, total = problems.start.clone().requires_grad_(), 0
    for t in range(problems.segment.start, problems.segment.stop + 1):
        losses = problems.loss(theta if problems.scale is None else problems.scale * theta, t)
        for loss in losses:
            total = total + (t / 10) ** late * (loss.log() if log else loss) / len(losses)
        (gradient,) = torch.autograd.grad(losses.sum(), theta, create_graph=True)
        updates, state = rule((gradient if second else gradient.detach())[None], state, problems.shapes)
        theta = theta + updates[0]
    return total


def outer_loss(rule, problems, state, log=False, second=False, late=0):
    segment = problems.segment
    weights = (torch.arange(segment.start, segment.stop + 1).double()[:, None] / 10) ** late
    run = unroll(rule, problems, problems.start, state, segment.start, segment.stop)
    if second:
        return second_order_loss(rule, problems, run, problems.start, state, log, weights)
    return first_order_loss(rule, run, state, problems.shapes, log, weights)


def with_gradients(rule, loss):
    return [loss, *torch.autograd.grad(loss, list(rule.parameters()))]


def check(rule, problems, state=None, **how):
    state = state or rule.start(len(problems.start), problems.shapes)
    got = with_gradients(rule, outer_loss(rule, problems, state, **how))
    torch.testing.assert_close(got, with_gradients(rule, literal(rule, problems, state, **how)), **EXACT)
    assert all(gradient.abs().max() > 1e-9 for gradient in got[1:]), "every weight learns"


@ORDERS
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_outer_gradient_is_autograd_through_a_loop(name, log, second):
    check(rule_of(separate_convolutions=name == "ConvNet"), PROBLEMS[name](), log=log, second=second)


@ORDERS
@pytest.mark.parametrize("log", [False, True])
def test_late_losses_may_count_for_more(log, second):
    check(rule_of(), quadratics(), log=log, second=second, late=2)
    check(rule_of(), quadratics(start=3, stop=5), log=log, second=second, late=0.5)


@ORDERS
@pytest.mark.parametrize("name", PROBLEMS)
def test_outer_gradient_in_other_units_and_from_mid_trajectory(name, second):
    problems = PROBLEMS[name](start=20, stop=22, scaled=True)
    rule = rule_of()
    check(rule, problems, middle(rule, problems), second=second)


@ORDERS
@pytest.mark.parametrize("options", [{"p": None}, {"averaging_cells": 2}, {"averaging_cells": 4, "num_layers": 1}])
def test_outer_gradient_of_other_rules(options, second):
    check(rule_of(**options), quadratics(scaled=True), second=second)
    check(rule_of(separate_convolutions=True, **options), convnet(stop=2), second=second)


@pytest.mark.parametrize("tile", [1, 4, 7, 15])
def test_tiles_change_nothing(monkeypatch, tile):
    problems, rule = quadratics(), rule_of()
    state = middle(rule, problems)
    updates, gradients = randn(3, 3, 5), randn(3, 3, 5, seed=1)
    whole = with_gradients(rule, imitation_loss(rule, gradients, updates, state, problems.shapes)[0])
    monkeypatch.setitem(module.TILE, "cpu", tile)
    check(rule, problems, state)
    check(rule_of(averaging_cells=2), problems)
    monkeypatch.setitem(module.TILE, "cpu", 40 * tile)
    check(rule_of(separate_convolutions=True), convnet(stop=2))
    monkeypatch.setitem(module.TILE, "cpu", tile)
    again = with_gradients(rule, imitation_loss(rule, gradients, updates, state, problems.shapes)[0])
    torch.testing.assert_close(again, whole, **EXACT)


@pytest.mark.parametrize("log", [False, True])
def test_second_order_is_finite_differences_of_the_outer_loss(log):
    problems, rule, eps = quadratics(), rule_of(p=None), 1e-6
    state = middle(rule, problems)
    first, second = (with_gradients(rule, outer_loss(rule, problems, state, log, order))[1:] for order in (False, True))
    for parameter, gradient, other in zip(rule.parameters(), second, first, strict=True):
        flat, k = parameter.data.view(-1), int(gradient.abs().argmax())
        values = []
        for step in (eps, -eps):
            flat[k] += step
            run = unroll(rule, problems, problems.start, state, 0, 4)
            values.append((run.losses.log() if log else run.losses).sum(0).mean())
            flat[k] -= step
        assert (values[0] - values[1]).item() / (2 * eps) == pytest.approx(gradient.view(-1)[k].item(), rel=1e-5)
        assert (gradient - other).norm() > 1e-3 * gradient.norm()


@ORDERS
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_problem_that_is_not_finite_is_dropped(bad, log, second):
    problems, rule = quadratics(), rule_of()
    state, healthy = middle(rule, problems), torch.tensor([True, False, True])
    start = problems.start.clone()
    start[1, 2] = bad  # 1e200: the square of that is infinite
    got = with_gradients(rule, outer_loss(rule, problems._replace(start=start), state, log, second))
    rows = {"all": [tuple(v.view(3, 5, -1)[healthy].flatten(0, 1) for v in layer) for layer in state["all"]]}
    wanted = with_gradients(rule, literal(rule, problems.select(healthy), rows, log, second))
    torch.testing.assert_close(got, [value * 2 / 3 for value in wanted], **EXACT)


@ORDERS
def test_a_problem_with_finite_losses_and_infinite_gradients_is_dropped(second):
    problems, rule = quadratics(B=2, stop=1), rule_of(output_scale=0.0)
    W, y, start = problems.W.clone(), problems.y.clone(), problems.start.clone()
    W[1], y[1], start[1] = torch.eye(5).double() * 1e200, -1e150, 0  # the gradient is 2 W' (W theta - y)
    spoilt = problems._replace(W=W, y=y, start=start)
    assert spoilt.loss(start, 0).isfinite().all()
    got = with_gradients(rule, outer_loss(rule, spoilt, rule.start(2, problems.shapes), second=second))
    good = problems.select(torch.tensor([True, False]))
    wanted = with_gradients(rule, literal(rule, good, rule.start(1, problems.shapes), second=second))
    torch.testing.assert_close(got, [value / 2 for value in wanted], **EXACT)


def test_a_multiple_of_the_loss_has_the_multiple_gradient():
    problems, rule = convnet(stop=2), rule_of(separate_convolutions=True)
    loss = outer_loss(rule, problems, rule.start(2, problems.shapes))
    one, three = with_gradients(rule, loss), with_gradients(rule, 3 * loss)
    torch.testing.assert_close(three, [3 * value for value in one], **EXACT)


@ORDERS
def test_a_problem_whose_state_is_not_finite_is_dropped(second):
    problems, rule = quadratics(), rule_of(averaging_cells=2)
    state = rule.start(3, problems.shapes)
    spoilt = {"all": [tuple(v.index_fill(0, torch.arange(5, 10), math.nan) for v in layer) for layer in state["all"]]}
    got = with_gradients(rule, outer_loss(rule, problems, spoilt, second=second))
    good = torch.tensor([True, False, True])
    wanted = with_gradients(rule, literal(rule, problems.select(good), rule.start(2, problems.shapes), second=second))
    torch.testing.assert_close(got, [value * 2 / 3 for value in wanted], **EXACT)


@ORDERS
@pytest.mark.parametrize("log", [False, True])
def test_with_all_problems_dropped_nothing_is_learnt(log, second):
    problems, rule = quadratics(), rule_of()
    problems = problems._replace(y=problems.y * math.nan)
    loss, *gradients = with_gradients(rule, outer_loss(rule, problems, rule.start(3, problems.shapes), log, second))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@ORDERS
def test_a_loss_below_the_smallest_has_no_logarithmic_gradient(second):
    problems, rule = quadratics(B=1), rule_of(output_scale=1e-14, p=None)
    problems = problems._replace(start=torch.linalg.solve(problems.W, problems.y))
    assert problems.loss(problems.start, 0).item() < module.TINY
    loss, *gradients = with_gradients(
        rule, outer_loss(rule, problems, rule.start(1, problems.shapes), log=True, second=second)
    )
    assert loss.item() == pytest.approx(5 * math.log(module.TINY))
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("separate", [False, True])
def test_imitation_is_half_the_squared_difference(separate):
    problems, rule = convnet(), rule_of(separate_convolutions=separate)
    state, n = middle(rule, problems), problems.start.shape[1]
    gradients, updates = randn(3, 2, n), 0.1 * randn(3, 2, n, seed=1)
    loss, after = imitation_loss(rule, gradients, updates, state, problems.shapes)
    wanted, walking = 0, state
    for gradient, update in zip(gradients, updates, strict=True):
        own, walking = rule(gradient[None], walking, problems.shapes)
        for b in range(2):
            wanted = wanted + 0.5 * sum((own[0, b, i] - update[b, i]) ** 2 for i in range(n)) / n / 2
    torch.testing.assert_close(with_gradients(rule, loss), with_gradients(rule, wanted), **EXACT)
    torch.testing.assert_close(after, walking)
    assert not any(v.requires_grad for layers in after.values() for layer in layers for v in layer)


def flatten(state):
    return [v for layers in state.values() for layer in layers for v in layer]


@pytest.mark.parametrize("name", PROBLEMS)
def test_chunks_one_after_another_are_one_long_run(name):
    make, rule = PROBLEMS[name], rule_of(separate_convolutions=True)
    whole = make(start=0, stop=5)
    start = rule.start(len(whole.start), whole.shapes)
    long = unroll(rule, whole, whole.start, start, 0, 5)
    one = unroll(rule, make(start=0, stop=2), whole.start, start, 0, 2)
    two = unroll(rule, make(start=2, stop=5), one.theta, one.state, 2, 5)
    assert torch.equal(torch.cat([one.losses, two.losses[1:]]), long.losses)
    assert torch.equal(torch.cat([one.gradients[:-1], two.gradients]), long.gradients)
    assert torch.equal(one.losses[-1], two.losses[0])
    assert torch.equal(two.theta, long.theta)
    assert all(map(torch.equal, flatten(two.state), flatten(long.state)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_optimizing_is_unrolling_from_the_start(name):
    problems, rule = PROBLEMS[name](stop=3, scaled=True), rule_of()
    run = unroll(rule, problems, problems.start, rule.start(len(problems.start), problems.shapes), 0, 3)
    losses, theta = optimize(rule, problems, 3)
    assert torch.equal(losses, run.losses)
    assert torch.equal(theta, run.theta)


def test_no_graph_is_kept():
    problems, rule = mlp(), rule_of()
    run = unroll(rule, problems, problems.start, rule.start(2, problems.shapes), 0, 3)
    for value in (run.losses, run.gradients, run.theta, *flatten(run.state), *optimize(rule, problems, 3)):
        assert value.grad_fn is None
        assert not value.requires_grad
    again = unroll(rule, problems, problems.start, rule.start(2, problems.shapes), 0, 3, graph=True)
    assert again.losses.requires_grad
    torch.testing.assert_close(again.losses, run.losses)


def test_gradients_in_other_units():
    problems = quadratics(scaled=True)
    losses, gradients = loss_and_gradient(problems, problems.start, 0)
    plain = problems._replace(scale=None, start=problems.start * problems.scale)
    wanted, unscaled = loss_and_gradient(plain, plain.start, 0)
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(gradients, problems.scale * unscaled)


class Square(NamedTuple):
    """x^2 in one variable, from 1: the smallest problem of the authors' repository, whose test this is."""

    start: Tensor
    segment: Segment
    scale: None = None
    shapes: tuple = ((1,),)

    def loss(self, theta, t):
        return theta.square().sum(-1)


def test_it_learns_to_minimise_a_square():
    torch.manual_seed(0)
    rule = LearnedRule(p=None, output_scale=1.0)
    adam = torch.optim.Adam(rule.parameters(), 1e-2)
    best = math.inf
    for _ in range(400):
        theta, state = torch.ones(1, 1), rule.start(1, [(1,)])
        for chunk in range(5):
            problems = Square(torch.ones(1, 1), Segment(0, 20 * chunk, 20 * chunk + 20, chunk == 4))
            run = unroll(rule, problems, theta, state, *problems.segment[1:3])
            adam.zero_grad()
            first_order_loss(rule, run, state, problems.shapes).backward()
            adam.step()
            theta, state = run.theta, run.state
        best = min(best, optimize(rule, problems, 100)[0][-1].item())
        if best < 1e-5:
            break
    assert best < 1e-5
