"""The learned optimizer of Andrychowicz et al. 2016: a small recurrent network that computes every parameter's update.

Shapes: B inner problems of n coordinates (parameters) each; N coordinates in one call; T inner steps; H hidden units.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = list[tuple[Tensor, Tensor]]  # (h, c) of each LSTM layer, (N, H): one state for each coordinate


def log_sign(gradients: Tensor, p: float = 10.0) -> Tensor:
    r"""Split gradients into logarithm and sign, so that a network can read all magnitudes (appendix A).

    .. math:: x \mapsto (\log|x| / p, \mathrm{sgn}\,x) \text{ if } |x| \ge e^{-p}, \text{ else } (-1, e^p x)

    Args:
        gradients: (...), any shape.
        p: Gradients below e^-p count as small.

    Returns:
        (..., 2).

    >>> import torch
    >>> log_sign(torch.tensor([1.0, -1.0, 0.0]))
    tensor([[ 0.,  1.],
            [ 0., -1.],
            [-1.,  0.]])
    """
    size = gradients.abs().clamp(min=math.exp(-p)).log() / p
    return torch.stack([size, (math.exp(p) * gradients).clamp(-1, 1)], -1)


class UpdateNetwork(nn.Module):
    r"""The coordinatewise network m (section 2.1, figure 3): one set of weights, one state for each coordinate.

    .. math:: (g_t, h_{t+1}) = m(\nabla_t, h_t; \phi)

    LSTM layers and a linear output map one coordinate's gradients to its updates. With two layers of 20 units the
    network has 5,301 weights. Differs from the paper: torch's LSTM has two bias vectors in each layer; with one it
    would have 5,141. The paper does not say how the output is initialised: here its weights are a tenth of torch's
    usual ones and its bias is zero, since a bias would push every parameter in the same direction at each step.

    Args:
        hidden_size: Units of each layer (paper: 20).
        num_layers: Number of LSTM layers (paper: 2).
        p: Parameter of ``log_sign`` (paper: 10). None feeds the gradient as it is (paper: for the quadratics).
        output_scale: Factor on the output (paper: 0.1 on MNIST, 1 elsewhere).
        averaging_cells: Number of units in each layer whose output is replaced by its mean over all coordinates of a
            problem: the global averaging cells of the LSTM+GAC (appendix D).

    >>> import torch
    >>> network = UpdateNetwork()
    >>> updates, state = network(torch.randn(5, 3), network.start(3))  # 5 steps, 3 coordinates
    >>> updates.shape, len(state), state[0][0].shape
    (torch.Size([5, 3]), 2, torch.Size([3, 20]))
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        p: float | None = 10.0,
        output_scale: float = 0.1,
        averaging_cells: int = 0,
    ):
        super().__init__()
        self.hidden_size, self.p, self.output_scale = hidden_size, p, output_scale
        self.averaging_cells = averaging_cells
        inputs = 1 if p is None else 2
        self.layers = nn.ModuleList(nn.LSTM(hidden_size if i else inputs, hidden_size) for i in range(num_layers))
        self.output = nn.Linear(hidden_size, 1)
        self.output.weight.data *= 0.1
        nn.init.zeros_(self.output.bias)

    def start(self, coordinates: int) -> State:
        """Return the state before the first step: zeros."""
        zeros = self.output.weight.new_zeros(coordinates, self.hidden_size)
        return [(zeros, zeros) for _ in self.layers]

    def forward(self, gradients: Tensor, state: State, problems: int = 1) -> tuple[Tensor, State]:
        """Compute updates for a sequence of gradients.

        Args:
            gradients: (T, N): the coordinates of the first problem, then those of the second, and so on.
            state: State before the first step.
            problems: Number of problems that the coordinates belong to, all of one size; only averaging cells use it.

        Returns:
            Updates (T, N); the state after the last step.
        """
        if self.averaging_cells and len(gradients) > 1:  # each step needs the averages of the previous one
            updates = []
            for gradient in gradients.split(1):
                update, state = self(gradient, state, problems)
                updates.append(update)
            return torch.cat(updates), state
        x = gradients[..., None] if self.p is None else log_sign(gradients, self.p)
        after = []
        for layer, (h, c) in zip(self.layers, state, strict=True):
            x, (h, c) = layer(x, (h[None], c[None]))
            if self.averaging_cells:
                x = h = self._average(h, problems)
            after.append((h[0], c[0]))
        return self.output_scale * self.output(x)[..., 0], after

    def _average(self, h: Tensor, problems: int) -> Tensor:
        h = h.unflatten(1, (problems, -1))
        averaged, own = h.split([self.averaging_cells, self.hidden_size - self.averaging_cells], -1)
        return torch.cat([averaged.mean(2, keepdim=True).expand_as(averaged), own], -1).flatten(1, 2)


class LearnedRule(nn.Module):
    """Compute the updates of all parameters of a model.

    One ``UpdateNetwork`` serves all parameters, or one serves convolution kernels and another the rest. The paper uses
    two for CIFAR-10 (section 3.3). A kernel is a parameter of four dimensions.

    Args:
        separate_convolutions: Whether kernels have a network of their own.
        options: Arguments of ``UpdateNetwork``, for each network.

    >>> import torch
    >>> rule, shapes = LearnedRule(), [(4, 3), (4,)]  # the shapes of a linear layer's parameters
    >>> updates, state = rule(torch.randn(5, 2, 16), rule.start(2, shapes), shapes)  # 5 steps, 2 problems
    >>> updates.shape
    torch.Size([5, 2, 16])
    """

    networks: Any  # an nn.ModuleDict of UpdateNetwork

    def __init__(self, separate_convolutions: bool = False, **options: Any):
        super().__init__()
        names = ("kernels", "others") if separate_convolutions else ("all",)
        self.networks = nn.ModuleDict({name: UpdateNetwork(**options) for name in names})

    def name_of(self, shape: Sequence[int]) -> str:
        """Return the name of the network that serves parameters of this shape."""
        return "all" if "all" in self.networks else "kernels" if len(shape) == 4 else "others"

    def split(self, values: Tensor, shapes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Split (T, B, n), the coordinates of parameters of these ``shapes``, into (T, B*k) for each network."""
        if "all" in self.networks:
            return {"all": values.flatten(1)}
        parts: dict[str, tuple[Tensor, ...]] = dict.fromkeys(map(self.name_of, shapes), ())
        for part, shape in zip(values.split([math.prod(s) for s in shapes], -1), shapes, strict=True):
            parts[self.name_of(shape)] += (part,)
        return {name: torch.cat(part, -1).flatten(1) for name, part in parts.items()}

    def join(self, parts: dict[str, Tensor], problems: int, shapes: Sequence[Sequence[int]]) -> Tensor:
        """Invert ``split``."""
        if "all" in parts:
            return parts["all"].unflatten(1, (problems, -1))
        sizes = {name: [math.prod(s) for s in shapes if self.name_of(s) == name] for name in parts}
        rows = {n: iter(p.unflatten(1, (problems, -1)).split(sizes[n], -1)) for n, p in parts.items()}
        return torch.cat([next(rows[self.name_of(shape)]) for shape in shapes], -1)

    def start(self, problems: int, shapes: Sequence[Sequence[int]]) -> dict[str, State]:
        """Return the state before the first step of ``problems`` problems with parameters of these shapes."""
        counts = dict.fromkeys(map(self.name_of, shapes), 0)
        for shape in shapes:
            counts[self.name_of(shape)] += math.prod(shape) * problems
        return {name: self.networks[name].start(count) for name, count in counts.items()}

    def forward(
        self, gradients: Tensor, state: dict[str, State], shapes: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[str, State]]:
        """Compute updates (T, B, n) for gradients (T, B, n), and the state after the last step."""
        problems = gradients.shape[1]
        updates, after = {}, {}
        for name, part in self.split(gradients, shapes).items():
            updates[name], after[name] = self.networks[name](part, state[name], problems)
        return self.join(updates, problems, shapes), after
