"""The learned optimizer of Andrychowicz et al. 2016: a small recurrent network that writes every parameter's update.

Shapes: B inner problems of n coordinates (parameters) each; N coordinates in one call; T inner steps; H hidden units.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = list[tuple[Tensor, Tensor]]  # (h, c) of each LSTM layer, (N, H): one state a coordinate


def log_sign(gradients: Tensor, p: float = 10.0) -> Tensor:
    r"""Gradients as a network can read them, whatever their size (appendix A).

    .. math:: x \mapsto (\log|x| / p, \mathrm{sgn}\,x) \text{ where } |x| \ge e^{-p}, \text{ else } (-1, e^p x)

    Args:
        gradients: Any shape.
        p: How small a gradient may be before it counts as none.

    Returns:
        The same shape and a last dimension of 2.
    """
    size = gradients.abs().clamp(min=math.exp(-p)).log() / p
    return torch.stack([size, (math.exp(p) * gradients).clamp(-1, 1)], -1)


class UpdateNetwork(nn.Module):
    r"""The coordinatewise network m (section 2.1, figure 3): one set of weights, one state for each coordinate.

    .. math:: (g_t, h_{t+1}) = m(\nabla_t, h_t; \phi)

    Two LSTM layers and a linear output read one coordinate's gradients and write its updates. With 20 units it has
    5,301 weights. Differs from the paper: torch's LSTM has two bias vectors a layer where one would do (5,141).
    The paper does not say how the output starts; here with a tenth of torch's weights and no bias, since a bias would
    push every parameter the same way at each step.

    Args:
        hidden_size: Units of each layer (paper: 20).
        num_layers: LSTM layers (paper: 2).
        p: Of ``log_sign``; None feeds the gradient as it is (paper: 10; None for the quadratics).
        output_scale: Factor on the output (paper: 0.1 on MNIST, 1 elsewhere).
        averaging_cells: The first so many units of each layer put out their mean over all coordinates of a problem:
            the global averaging cells of the LSTM+GAC (appendix D).
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
        """The state of coordinates that have not moved: zeros."""
        zeros = self.output.weight.new_zeros(coordinates, self.hidden_size)
        return [(zeros, zeros) for _ in self.layers]

    def forward(self, gradients: Tensor, state: State, problems: int = 1) -> tuple[Tensor, State]:
        """Updates for a sequence of gradients.

        Args:
            gradients: (T, N), the coordinates of one problem after those of another.
            state: Before the first of them.
            problems: How many problems the coordinates belong to, all of one size; read by the averaging cells.

        Returns:
            Updates (T, N); the state after the last.
        """
        if self.averaging_cells and len(gradients) > 1:  # each step needs the averages of the one before
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
    """The optimizer of a whole network: one ``UpdateNetwork``, or one for convolution kernels and one for the rest.

    Two networks are the paper's choice for CIFAR-10 (section 3.3), whose convolutional and fully connected parameters
    have gradients of different kinds. A kernel is a parameter of four dimensions.

    Args:
        separate_convolutions: Whether kernels have a network of their own.
        options: Of ``UpdateNetwork``, for each network.
    """

    networks: Any  # an nn.ModuleDict of UpdateNetwork

    def __init__(self, separate_convolutions: bool = False, **options: Any):
        super().__init__()
        names = ("kernels", "others") if separate_convolutions else ("all",)
        self.networks = nn.ModuleDict({name: UpdateNetwork(**options) for name in names})

    def name_of(self, shape: Sequence[int]) -> str:
        """Which network a parameter of this shape belongs to."""
        return "all" if "all" in self.networks else "kernels" if len(shape) == 4 else "others"

    def split(self, values: Tensor, shapes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """(T, B, n), n the coordinates of parameters of these ``shapes``, to (T, B*k) for each network."""
        if "all" in self.networks:
            return {"all": values.flatten(1)}
        parts: dict[str, tuple[Tensor, ...]] = dict.fromkeys(map(self.name_of, shapes), ())
        for part, shape in zip(values.split([math.prod(s) for s in shapes], -1), shapes, strict=True):
            parts[self.name_of(shape)] += (part,)
        return {name: torch.cat(part, -1).flatten(1) for name, part in parts.items()}

    def join(self, parts: dict[str, Tensor], problems: int, shapes: Sequence[Sequence[int]]) -> Tensor:
        """The inverse of ``split``."""
        if "all" in parts:
            return parts["all"].unflatten(1, (problems, -1))
        sizes = {name: [math.prod(s) for s in shapes if self.name_of(s) == name] for name in parts}
        rows = {n: iter(p.unflatten(1, (problems, -1)).split(sizes[n], -1)) for n, p in parts.items()}
        return torch.cat([next(rows[self.name_of(shape)]) for shape in shapes], -1)

    def start(self, problems: int, shapes: Sequence[Sequence[int]]) -> dict[str, State]:
        """The state before the first step of ``problems`` problems with parameters of these shapes."""
        counts = dict.fromkeys(map(self.name_of, shapes), 0)
        for shape in shapes:
            counts[self.name_of(shape)] += math.prod(shape) * problems
        return {name: self.networks[name].start(count) for name, count in counts.items()}

    def forward(
        self, gradients: Tensor, state: dict[str, State], shapes: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[str, State]]:
        """Updates (T, B, n) for gradients (T, B, n), and the state after the last; see ``UpdateNetwork``."""
        problems = gradients.shape[1]
        updates, after = {}, {}
        for name, part in self.split(gradients, shapes).items():
            updates[name], after[name] = self.networks[name](part, state[name], problems)
        return self.join(updates, problems, shapes), after
