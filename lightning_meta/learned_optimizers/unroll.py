r"""Inner optimization with a learned rule, and the outer losses that train the rule.

Shapes: B inner problems of n coordinates each; T inner steps; N coordinates in one call.

In each step the rule maps the gradient :math:`\nabla_t = \nabla_\theta f(\theta_t)` to an update :math:`g_t`, and
:math:`\theta_{t+1} = \theta_t + g_t` (Andrychowicz et al. 2016, section 2). The rule is trained on the weighted sum of
the losses of the trajectory, :math:`L(\phi) = \sum_t w_t f(\theta_t)`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_meta.learned_optimizers.layers import LearnedRule, State, UpdateNetwork
from lightning_meta.running.segments import Segment

HUGE = 1e12  # a problem with larger losses or gradients has diverged, even if they are still finite
TINY = 1e-20  # losses are clamped to this before the logarithm
TILE = {"cpu": 640, "cuda": 1 << 16}  # coordinates that are replayed at once; the states of 640 fit into a CPU cache


class Problems(Protocol):
    """B inner problems with parameters of the same shapes."""

    segment: Segment
    start: Tensor  # theta_0, (B, n)
    scale: Tensor | None  # (B, n): the rule minimises f(scale * theta); None: f itself

    @property
    def shapes(self) -> Sequence[Sequence[int]]:
        """Shapes of the parameters whose flattened concatenation is theta."""

    def loss(self, theta: Tensor, t: int) -> Tensor:
        """Return the losses (B,) at theta (B, n) on the data of step t."""

    def select(self, which: Tensor) -> "Problems":
        """Return the problems for which ``which`` (B,), bool, is true."""


class Trajectory(NamedTuple):
    """Steps ``start <= t < stop`` of B problems."""

    losses: Tensor  # (T + 1, B), at theta_start to theta_stop
    gradients: Tensor  # (T + 1, B, n)
    theta: Tensor  # theta_stop, (B, n)
    state: dict[str, State]  # the rule's, after the last step

    @property
    def finite(self) -> Tensor:
        """Whether all losses and gradients of a problem are below ``HUGE`` and not NaN, (B,), bool."""
        return (self.losses.abs() < HUGE).all(0) & (self.gradients.abs() < HUGE).all(2).all(0)


def loss_and_gradient(problems: Problems, theta: Tensor, t: int, graph: bool = False) -> tuple[Tensor, Tensor]:
    """Return losses (B,) and gradients (B, n) at theta (B, n); ``graph`` keeps their graph for second derivatives."""
    with torch.enable_grad():
        theta = theta if graph else theta.detach().requires_grad_()
        losses = problems.loss(theta if problems.scale is None else theta * problems.scale, t)
        (gradient,) = torch.autograd.grad(losses.sum(), theta, create_graph=graph)
    return (losses if graph else losses.detach()), gradient


def unroll(
    rule: LearnedRule,
    problems: Problems,
    theta: Tensor,
    state: dict[str, State],
    start: int,
    stop: int,
    graph: bool = False,
) -> Trajectory:
    """Run the rule for steps ``start <= t < stop``.

    Args:
        rule: The rule that computes the updates.
        problems: The problems to minimise.
        theta: Parameters before step ``start``, (B, n).
        state: State of the rule before step ``start``.
        start: First step.
        stop: One past the last step. The loss at ``stop`` is part of the trajectory, so that the last update counts.
        graph: Keep the graph through rule and problems; the first-order loss does not need it.
    """
    losses, gradients = [], []
    with torch.set_grad_enabled(graph):
        theta = theta.detach().requires_grad_() if graph else theta
        for t in range(start, stop + 1):
            loss, gradient = loss_and_gradient(problems, theta, t, graph)
            losses.append(loss)
            gradients.append(gradient)
            if t < stop:
                update, state = rule(gradient[None], state, problems.shapes)
                theta = theta + update[0]
    return Trajectory(torch.stack(losses), torch.stack(gradients), theta, state)


def first_order_loss(
    rule: LearnedRule,
    run: Trajectory,
    state: dict[str, State],
    shapes: Sequence[Sequence[int]],
    log: bool = False,
    weights: Tensor | float = 1.0,
) -> Tensor:
    r"""Compute the outer loss, differentiable with the gradients nabla_t taken as constant.

    This is the paper's simplification (section 2.1, the dashed edges of figure 2). Only the update network has to be
    differentiated then: with :math:`\theta_t = \theta_0 + \sum_{s<t} g_s`,

    .. math:: dL/d\phi = \sum_s G_s \cdot dg_s/d\phi, \quad G_s = \sum_{t>s} w_t \nabla_t

    and the g_s are the outputs of an LSTM for a sequence of known inputs. The backward pass runs the LSTM over them
    again, one tile of coordinates at a time. So only the gradients of all coordinates are in memory at once, not the
    LSTM's activations.

    Args:
        rule: The rule that produced the trajectory.
        run: Trajectory from ``unroll``. The losses of a problem that has diverged count as zero.
        state: State of the rule at the start of the trajectory.
        shapes: Shapes of the problems' parameters.
        log: Sum the logarithms of the losses instead of the losses.
        weights: w_t, (T + 1, 1).

    Returns:
        Scalar: sum over time, mean over all problems.

    >>> import torch
    >>> from lightning_meta.learned_optimizers.problems import Quadratics
    >>> from lightning_meta.running.segments import Segment
    >>> problems = Quadratics(torch.eye(2)[None], torch.ones(1, 2), torch.zeros(1, 2), None, Segment(0, 0, 5, True))
    >>> rule = LearnedRule()
    >>> state = rule.start(1, problems.shapes)
    >>> run = unroll(rule, problems, problems.start, state, start=0, stop=5)
    >>> loss = first_order_loss(rule, run, state, problems.shapes)
    >>> torch.allclose(loss, run.losses.sum())
    True
    >>> loss.backward()  # gradients for the weights of the rule
    """
    finite = run.finite
    losses = torch.where(finite, run.losses, 1.0)
    gradients = torch.where(finite[:, None], run.gradients, 0.0)
    values, slopes = _terms(losses, log)
    slopes = weights * slopes * finite / len(finite)
    after = (slopes[..., None] * gradients).flip(0).cumsum(0).flip(0)[1:]  # G_s: sum over the steps after s
    loss = (weights * values * finite).sum() / len(finite)
    state = {name: [(h.nan_to_num(0, 0, 0), c.nan_to_num(0, 0, 0)) for h, c in s] for name, s in state.items()}
    return _replay(rule, loss, gradients[:-1], after, state, shapes, _dot)


def second_order_loss(
    rule: LearnedRule,
    problems: Problems,
    run: Trajectory,
    theta: Tensor,
    state: dict[str, State],
    log: bool = False,
    weights: Tensor | float = 1.0,
) -> Tensor:
    r"""Compute the outer loss, differentiable with the second derivatives of the problems too.

    This is back-propagation through time, one step after another. Let :math:`\lambda_t` be the derivative of the outer
    loss with respect to theta_t. Since the rule's output at step s depends on nabla_s,

    .. math:: \lambda_s = \lambda_{s+1} + w_s \nabla_s + H_s \, (\partial L / \partial \nabla_s)

    where a Hessian-vector product stands for the Hessian H_s. Of the graph, only the states before each step are kept:
    2 L H numbers for each coordinate and step.

    Args:
        rule: The rule that produced the trajectory.
        problems: The problems that were minimised.
        run: Trajectory from ``unroll``. The losses of a problem that has diverged count as zero.
        theta: Parameters at the start of the trajectory, (B, n).
        state: State of the rule at the start of the trajectory.
        log: Sum the logarithms of the losses instead of the losses.
        weights: w_t, (T + 1, 1).

    Returns:
        Scalar: sum over time, mean over all problems.
    """
    finite, start = run.finite, problems.segment.start
    parameters = list(rule.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    if not finite.any():
        return _KnownGradient.apply(run.losses.new_zeros(()), totals, *parameters)
    problems, theta = problems.select(finite), theta[finite]
    losses, gradients = run.losses[:, finite], run.gradients[:, finite]
    before = [{name: [tuple(_rows(x, finite) for x in layer) for layer in layers] for name, layers in state.items()}]
    thetas = [theta]
    with torch.no_grad():
        for gradient in gradients[:-1]:
            update, after = rule(gradient[None], before[-1], problems.shapes)
            before.append(after)
            thetas.append(thetas[-1] + update[0])
    values, slopes = _terms(losses, log)
    direct = (weights * slopes / len(finite))[..., None] * gradients  # derivatives of the loss terms, each at its theta
    slope, into_state = direct[-1], None  # derivatives with respect to theta and to the rule's state after the step
    for s in reversed(range(len(gradients) - 1)):
        inputs = [gradients[s], *(x for layers in before[s].values() for layer in layers for x in layer)]
        inputs = [x.detach().requires_grad_() for x in inputs]
        rest = iter(inputs[1:])
        with torch.enable_grad():
            states = {name: [(next(rest), next(rest)) for _ in layers] for name, layers in before[s].items()}
            update, after = rule(inputs[0][None], states, problems.shapes)
            outputs = [update[0], *(x for layers in after.values() for layer in layers for x in layer)]
        along = [slope, *(into_state or map(torch.zeros_like, outputs[1:]))]
        through, *grads = torch.autograd.grad(outputs, [*inputs, *parameters], along)
        into_state, grads = grads[: len(inputs) - 1], grads[len(inputs) - 1 :]
        for total, grad in zip(totals, grads, strict=True):
            total += grad
        if s:  # theta_0 does not depend on the rule
            at = thetas[s].detach().requires_grad_()
            _, gradient = loss_and_gradient(problems, at, start + s, graph=True)
            slope = slope + direct[s] + torch.autograd.grad(gradient, at, through)[0]
    return _KnownGradient.apply((weights * values).sum() / len(finite), totals, *parameters)


def _terms(losses: Tensor, log: bool) -> tuple[Tensor, Tensor]:
    """Return the losses or their logarithms, and the derivatives of these with respect to the losses."""
    if log:
        return losses.clamp(min=TINY).log(), (losses >= TINY) / losses.clamp(min=TINY)
    return losses, torch.ones_like(losses)


class _KnownGradient(torch.autograd.Function):
    """Return a loss whose derivatives with respect to the parameters are already known."""

    @staticmethod
    def forward(ctx, loss, derivatives, *parameters):
        ctx.derivatives = derivatives
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, *(grad_output * derivative for derivative in ctx.derivatives)


def _rows(x: Tensor, which: Tensor) -> Tensor:
    return x.unflatten(0, (len(which), -1))[which].flatten(0, 1)


def imitation_loss(
    rule: LearnedRule, gradients: Tensor, updates: Tensor, state: dict[str, State], shapes: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, State]]:
    """Compute the distance of the rule's updates from a teacher's, on the teacher's trajectory (Chen et al. 2020).

    Args:
        rule: The rule to train.
        gradients: Gradients on the teacher's trajectory, (T, B, n).
        updates: Updates of the teacher, (T, B, n).
        state: State of the rule before the first step.
        shapes: Shapes of the problems' parameters.

    Returns:
        Half the squared difference, mean over coordinates and problems and sum over steps; the state of the rule
        after the last step.
    """
    scale = 1 / updates[0].numel()
    with torch.no_grad():
        own, after = rule(gradients, state, shapes)
        loss = _squared(own, updates) / updates[0].numel()
    return _replay(rule, loss, gradients, updates, state, shapes, _squared, scale), after


def optimize(rule: LearnedRule, problems: Problems, steps: int) -> tuple[Tensor, Tensor]:
    """Minimise with the rule from the problems' start; return losses (steps + 1, B) and the last theta (B, n).

    >>> import torch
    >>> from lightning_meta.learned_optimizers.problems import Quadratics
    >>> from lightning_meta.running.segments import Segment
    >>> problems = Quadratics(torch.eye(2)[None], torch.ones(1, 2), torch.zeros(1, 2), None, Segment(0, 0, 5, True))
    >>> losses, theta = optimize(LearnedRule(), problems, steps=5)
    >>> losses.shape, theta.shape
    (torch.Size([6, 1]), torch.Size([1, 2]))
    """
    theta, state, losses = problems.start, rule.start(len(problems.start), problems.shapes), []
    with torch.no_grad():
        for t in range(steps + 1):
            loss, gradient = loss_and_gradient(problems, theta, t)
            losses.append(loss)
            if t < steps:
                update, state = rule(gradient[None], state, problems.shapes)
                theta = theta + update[0]
    return torch.stack(losses), theta


def _dot(updates: Tensor, direction: Tensor) -> Tensor:
    return (updates * direction).sum()


def _squared(updates: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (updates - targets).square().sum()


def _replay(
    rule: LearnedRule,
    loss: Tensor,
    inputs: Tensor,
    targets: Tensor,
    state: dict[str, State],
    shapes: Sequence[Sequence[int]],
    cost: Callable[[Tensor, Tensor], Tensor],
    scale: float = 1.0,
) -> Tensor:
    """Return ``loss`` with the gradient of scale * cost(rule's updates for the inputs, targets)."""
    targets = rule.split(targets, shapes)
    for name, part in rule.split(inputs, shapes).items():
        network = rule.networks[name]
        loss = _Replay.apply(
            loss, network, part, targets[name], state[name], inputs.shape[1], cost, scale, *network.parameters()
        )
    return loss


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, network, inputs, targets, state, problems, cost, scale, *parameters):
        ctx.arguments = network, inputs, targets, state, problems, cost, scale
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output):
        network, inputs, targets, state, problems, cost, scale = ctx.arguments
        network: UpdateNetwork
        parameters = list(network.parameters())
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        coordinates = inputs.shape[1]
        # averaging cells need all coordinates at once
        tile = coordinates if network.averaging_cells else TILE.get(inputs.device.type, 1 << 16)
        for i in range(0, coordinates, tile):
            part = [(h[i : i + tile], c[i : i + tile]) for h, c in state]
            with torch.enable_grad():
                updates, _ = network(inputs[:, i : i + tile].contiguous(), part, problems)
                gradients = torch.autograd.grad(cost(updates, targets[:, i : i + tile]), parameters)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        return grad_output, *[None] * 7, *(scale * grad_output * total for total in totals)
