r"""Layers of Ha, Dai and Le 2016, "HyperNetworks": a smaller network generates the weights of a larger one.

Static (section 3.1): convolutions whose kernels are generated from small learned embeddings. Dynamic (section 3.2):
recurrent layers whose weights a smaller recurrent network rescales at every step.

Letters: B samples, T steps, I inputs, H hidden units, S units of the small network (``hyper_size``), Z numbers of an
embedding (``embedding_size``), Y gates: 4 in an LSTM, in PyTorch's order (input, forget, cell, output), 1 in an RNN.
N is the number of rows of a packed sequence: T * B if all sequences have T steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_meta.hypernetworks.ops.hyper_lstm import EPSILON, hyper_lstm
from lightning_meta.nn.transforms import is_transformed

_INITS = ("paper", "broken-symmetry")


class _HyperCell(nn.Module):
    """Weights of a cell and of the small network that rescales them, and their initial values (section A.2.3)."""

    gates: int  # Y

    def __init__(
        self, input_size: int, hidden_size: int, hyper_size: int = 128, embedding_size: int = 4, init: str = "paper"
    ):
        super().__init__()
        sizes = {"input": input_size, "hidden": hidden_size, "hyper": hyper_size, "embedding": embedding_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"expected {name}_size of at least 1, got {size}: choose a positive number")
        if init not in _INITS:
            raise ValueError(f"expected init of {' or '.join(_INITS)}, got {init!r}: choose one of these")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.hyper_size, self.embedding_size, self.init = hyper_size, embedding_size, init
        Y, H, S, Z = self.gates, hidden_size, hyper_size, embedding_size
        self.weight_ih = nn.Parameter(torch.empty(Y * H, input_size))
        self.weight_hh = nn.Parameter(torch.empty(Y * H, H))
        self.bias = nn.Parameter(torch.empty(Y * H))  # b_0
        self.hyper_weight_ih = nn.Parameter(torch.empty(Y * S, H + input_size))  # reads (h, x)
        self.hyper_weight_hh = nn.Parameter(torch.empty(Y * S, S))
        self.hyper_bias = nn.Parameter(torch.empty(Y * S))
        self.embed_weight = nn.Parameter(torch.empty(3, Y, Z, S))  # to z_h, z_x, z_b
        self.embed_bias = nn.Parameter(torch.empty(2, Y, Z))  # of z_h, z_x
        self.scale_weight = nn.Parameter(torch.empty(3, Y, H, Z))  # to d_h, d_x, b
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all weights anew."""
        for weight in (self.weight_ih, self.weight_hh, self.hyper_weight_ih, self.hyper_weight_hh):
            for gate in weight.chunk(self.gates):
                nn.init.orthogonal_(gate)
        for bias in (self.bias, self.hyper_bias):
            nn.init.zeros_(bias)
        nn.init.zeros_(self.embed_weight[:2])
        nn.init.normal_(self.embed_weight[2], std=0.01)
        nn.init.ones_(self.embed_bias)
        mean = 0.1 / self.embedding_size
        scale = self.scale_weight[:2].fill_(mean)
        if self.init == "broken-symmetry":
            noise = mean * torch.randn_like(scale)
            scale += noise - noise.mean(-1, keepdim=True)
        nn.init.zeros_(self.scale_weight[2])

    def scales(self, hyper_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what the small network generates: the scales d_h and d_x and the bias b of each gate.

        Args:
            hyper_h: Output of the small network, (..., S).

        Returns:
            d_h, d_x and b, each (..., Y, H).
        """
        z_h, z_x, z_b = torch.einsum("kyzs,...s->k...yz", self.embed_weight, hyper_h)
        z_h, z_x = z_h + self.embed_bias[0], z_x + self.embed_bias[1]
        d_h = torch.einsum("yhz,...yz->...yh", self.scale_weight[0], z_h)
        d_x = torch.einsum("yhz,...yz->...yh", self.scale_weight[1], z_x)
        b = torch.einsum("yhz,...yz->...yh", self.scale_weight[2], z_b)
        return d_h, d_x, b + self.bias.view(self.gates, self.hidden_size)

    def start(self, batch: int) -> Tensor:
        """Return the state before the first step: zeros (B, H + S)."""
        return self.bias.new_zeros(batch, self.state_size)

    @property
    def state_size(self) -> int:
        """H + S."""
        return self.hidden_size + self.hyper_size

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, hyper_size={self.hyper_size}, "
            f"embedding_size={self.embedding_size}, init={self.init!r}"
        )

    def _project(self, x: Tensor) -> Tensor:
        """Multiply x (N, I) by the input weights of both networks, W_x and What_x, at once: (N, YH + YS)."""
        return F.linear(x, torch.cat([self.weight_ih, self.hyper_weight_ih[:, self.hidden_size :]]))

    def _weight_h(self) -> Tensor:
        """Join the matrices that h is multiplied by in both networks, (YH + YS, H)."""
        return torch.cat([self.weight_hh, self.hyper_weight_ih[:, : self.hidden_size]])


class HyperLSTMCell(_HyperCell):
    r"""LSTM cell in which a smaller LSTM rescales the rows of all weights at every step (Ha et al. 2016, 3.2 and A.2).

    For each gate y in i, f, g, o, with hats for the small LSTM:

    .. math::
        \hat x_t &= (h_{t-1}, x_t) \\
        \hat y &= LN(\hat W_h^y \hat h_{t-1} + \hat W_x^y \hat x_t + \hat b^y) \\
        \hat c_t &= \sigma(\hat f) \hat c_{t-1} + \sigma(\hat i) \mathrm{Dropout}(\tanh(\hat g)), \quad
        \hat h_t = \sigma(\hat o) \tanh(LN(\hat c_t)) \\
        z_h^y &= W_{hh}^y \hat h_t + b_{hh}^y, \quad z_x^y = W_{hx}^y \hat h_t + b_{hx}^y, \quad
        z_b^y = W_{hb}^y \hat h_t \\
        d_h^y &= W_{hz}^y z_h^y, \quad d_x^y = W_{xz}^y z_x^y, \quad b^y = W_{bz}^y z_b^y + b_0^y \\
        y &= LN(d_h^y \odot W_h^y h_{t-1} + d_x^y \odot W_x^y x_t + b^y) \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \mathrm{Dropout}(\tanh(g)), \quad h_t = \sigma(o) \tanh(LN(c_t))

    ``step`` computes them one by one. ``sequence`` gives the same numbers faster; its custom operator
    computes first derivatives only. Under torch.func transforms and forward-mode automatic differentiation the cell
    therefore uses ``step``.

    The state is a pair (h, c), as in PyTorch; each is (B, H + S), the main LSTM's H numbers first. Both forget gates
    get 1 added after layer norm (the authors' code).

    Differs from the paper: z is computed from the small LSTM's new output, as in the text and in the authors' code.
    With ``embed_previous`` it is computed from the previous output, as in the printed equations.

    Args:
        input_size: I.
        hidden_size: H.
        hyper_size: S.
        embedding_size: Z, the size of each of the 12 embeddings.
        layer_norm: Use layer norm (LN) in both networks. Otherwise LN is the identity.
        recurrent_dropout: Probability that tanh(g) of a unit is dropped at a step, in training.
        hyper_recurrent_dropout: The same in the small LSTM (used by the paper's largest model).
        init: ``"paper"``, with which all Z components of an embedding stay equal throughout training, or
            ``"broken-symmetry"``, which adds noise between them and leaves the initial d_h and d_x at 0.1.
        embed_previous: Compute z from the small LSTM's previous output.
        eager: Always use ``step``, so that gradients can be differentiated again (``create_graph=True``).

    Raises:
        ValueError: If an option is out of range.

    >>> import torch
    >>> cell = HyperLSTMCell(5, 8, hyper_size=4)
    >>> h, c = cell(torch.randn(3, 5))
    >>> h.shape, c.shape
    (torch.Size([3, 12]), torch.Size([3, 12]))
    """

    gates = 4
    norm_weight: Any  # nn.Parameter, or None without layer norm; so are the other three
    norm_bias: Any
    hyper_norm_weight: Any
    hyper_norm_bias: Any

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int = 128,
        embedding_size: int = 4,
        layer_norm: bool = True,
        recurrent_dropout: float = 0.0,
        hyper_recurrent_dropout: float = 0.0,
        init: str = "paper",
        embed_previous: bool = False,
        eager: bool = False,
    ):
        super().__init__(input_size, hidden_size, hyper_size, embedding_size, init)
        self.recurrent_dropout = _probability("recurrent_dropout", recurrent_dropout)
        self.hyper_recurrent_dropout = _probability("hyper_recurrent_dropout", hyper_recurrent_dropout)
        self.layer_norm, self.embed_previous, self.eager = layer_norm, embed_previous, eager
        for name, size in (("norm", hidden_size), ("hyper_norm", hyper_size)):  # of the four gates and of c
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(5, size)) if layer_norm else None)
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(5, size)) if layer_norm else None)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            x: (B, I).
            state: (h, c), each (B, H + S). Default: zeros.

        Returns:
            The next (h, c). The cell's output is ``h[:, :hidden_size]``.
        """
        _, state = self.sequence(x, [len(x)], state or (self.start(len(x)),) * 2)
        return state

    def step(
        self, x: Tensor, state: Sequence[Tensor], mask: Tensor | None = None, hyper_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step, equation by equation, in operations that PyTorch can differentiate in every mode.

        Args:
            x: (B, I).
            state: (h, c), each (B, H + S).
            mask: Dropout's factors of tanh(g), (B, H): 0 or 1 / (1 - p). Default: no dropout.
            hyper_mask: The same for the small LSTM, (B, S).

        Returns:
            The next (h, c).
        """
        H, S = self.hidden_size, self.hyper_size
        (h, hyper_h), (c, hyper_c) = (part.split([H, S], -1) for part in state)
        hyper_x = torch.cat([h, x], -1)
        hyper_y = F.linear(hyper_h, self.hyper_weight_hh) + F.linear(hyper_x, self.hyper_weight_ih, self.hyper_bias)
        new_hyper_h, new_hyper_c = _lstm_update(
            hyper_y.unflatten(-1, (4, S)), hyper_c, self.hyper_norm_weight, self.hyper_norm_bias, hyper_mask
        )
        d_h, d_x, b = self.scales(hyper_h if self.embed_previous else new_hyper_h)
        W_h, W_x = self.weight_hh.unflatten(0, (4, H)), self.weight_ih.unflatten(0, (4, H))
        y = d_h * torch.einsum("yhi,bi->byh", W_h, h) + d_x * torch.einsum("yhi,bi->byh", W_x, x) + b
        new_h, new_c = _lstm_update(y, c, self.norm_weight, self.norm_bias, mask)
        return torch.cat([new_h, new_hyper_h], -1), torch.cat([new_c, new_hyper_c], -1)

    def sequence(
        self, x: Tensor, batch_sizes: list[int], state: Sequence[Tensor], reverse: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run all steps with the fast operator, or with ``step`` if derivatives need it.

        Args:
            x: Packed sequences (N, I): the rows of the first step, then those of the second, and so on.
            batch_sizes: Number of samples at each step; never increasing.
            state: (h, c) before the first step, each (B, H + S).
            reverse: Run from the last step to the first.

        Returns:
            Outputs (N, H); (h, c) of each sample after its last step.
        """
        H, S = self.hidden_size, self.hyper_size
        dtype = torch.promote_types(self.bias.dtype, torch.float32)  # of everything except the largest products
        masks = [
            _keep_mask(x, (len(x), size), p if self.training else 0.0, dtype)
            for size, p in ((H, self.recurrent_dropout), (S, self.hyper_recurrent_dropout))
        ]
        if self.eager or is_transformed():
            output, (h, c) = run_steps(self.step, [x, *masks], batch_sizes, state, H, reverse)
        else:
            output, h, hyper_h, c, hyper_c = self._fast_sequence(x, batch_sizes, state, reverse, masks, dtype)
            h, c = torch.cat([h, hyper_h], -1), torch.cat([c, hyper_c], -1)
        return output.to(self.bias.dtype), (h.to(self.bias.dtype), c.to(self.bias.dtype))

    def _fast_sequence(
        self,
        x: Tensor,
        batch_sizes: list[int],
        state: Sequence[Tensor],
        reverse: bool,
        masks: list[Tensor | None],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Run the operator. Returns outputs (N, H), then h, hyper_h, c and hyper_c after the last step."""
        H, S = self.hidden_size, self.hyper_size
        # z gets one more number, always 1, whose column of the scale weights is b_0: then b is a product like d_h, d_x.
        embed_weight = F.pad(self.embed_weight, (0, 0, 0, 1)).flatten(0, 2)
        embed_bias = F.pad(F.pad(self.embed_bias, (0, 0, 0, 0, 0, 1)), (0, 1), value=1.0).flatten()
        forget = self.bias.new_tensor([0.0, 1.0, 0.0, 0.0, 0.0])[:, None]
        bias: Tensor = self.bias
        hyper_bias: Tensor = self.hyper_bias
        norms = []
        if self.layer_norm:
            norms = [
                torch.stack([self.norm_weight, self.norm_bias + forget])[:, :, None],
                torch.stack([self.hyper_norm_weight, self.hyper_norm_bias + forget])[:, :, None],
            ]
        else:
            bias = (bias.view(4, H) + forget[:4]).flatten()
            hyper_bias = (hyper_bias.view(4, S) + forget[:4]).flatten()
        b_0 = F.pad(bias.view(1, 4, 1, H), (0, 0, 0, 0, 0, 0, 2, 0))
        scale = torch.cat([self.scale_weight.mT, b_0], 2).flatten(0, 1)
        projected = self._project(x)
        weights = [self.hyper_weight_hh, hyper_bias, embed_weight, embed_bias, scale]
        return hyper_lstm(
            projected,
            self._weight_h().to(projected.dtype),
            [weight.to(dtype) for weight in weights],
            [norm.to(dtype) for norm in norms],
            *masks,
            [part.to(dtype) for whole in state for part in whole.split([H, S], -1)],
            batch_sizes,
            reverse,
            self.embed_previous,
            torch.is_grad_enabled(),
        )[:5]


class HyperRNNCell(_HyperCell):
    r"""Tanh RNN cell in which a smaller RNN rescales the rows of all weights at every step (Ha et al. 2016, 3.2).

    .. math::
        \hat h_t &= \tanh(\hat W_h \hat h_{t-1} + \hat W_x (h_{t-1}, x_t) + \hat b) \\
        z_h &= W_{hh} \hat h_t + b_{hh}, \quad z_x = W_{hx} \hat h_t + b_{hx}, \quad z_b = W_{hb} \hat h_t \\
        h_t &= \tanh(W_{hz} z_h \odot W_h h_{t-1} + W_{xz} z_x \odot W_x x_t + W_{bz} z_b + b_0)

    The state is h (B, H + S), the main RNN's H numbers first.

    Args:
        input_size: I.
        hidden_size: H.
        hyper_size: S.
        embedding_size: Z, the size of each of the 3 embeddings.
        init: See ``HyperLSTMCell``.

    Raises:
        ValueError: If an option is out of range.

    >>> import torch
    >>> HyperRNNCell(5, 8, hyper_size=4)(torch.randn(3, 5)).shape
    torch.Size([3, 12])
    """

    gates = 1

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            x: (B, I).
            state: h (B, H + S). Default: zeros.

        Returns:
            The next h. The cell's output is ``h[:, :hidden_size]``.
        """
        _, (h,) = self.sequence(x, [len(x)], [self.start(len(x)) if state is None else state])
        return h

    def sequence(
        self, x: Tensor, batch_sizes: list[int], state: Sequence[Tensor], reverse: bool = False
    ) -> tuple[Tensor, tuple[Tensor]]:
        """Run all steps; see ``HyperLSTMCell.sequence``, with state (h,) instead of (h, c)."""
        H, S = self.hidden_size, self.hyper_size
        weight_h = self._weight_h()

        def step(projected: Tensor, state: Sequence[Tensor]) -> tuple[Tensor]:
            x_main, x_hyper = projected.split([H, S], -1)
            h, hyper_h = state[0].split([H, S], -1)
            h_main, h_hyper = F.linear(h, weight_h).split([H, S], -1)
            hyper_h = torch.tanh(x_hyper + h_hyper + F.linear(hyper_h, self.hyper_weight_hh, self.hyper_bias))
            d_h, d_x, b = (scale.squeeze(-2) for scale in self.scales(hyper_h))
            return (torch.cat([torch.tanh(d_h * h_main + d_x * x_main + b), hyper_h], -1),)

        output, (h,) = run_steps(step, [self._project(x)], batch_sizes, state, H, reverse)
        return output, (h,)


def run_steps(
    step: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    batch_sizes: list[int],
    state: Sequence[Tensor],
    hidden_size: int,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a cell's step over packed sequences.

    Args:
        step: Maps rows of the first input, a state and rows of the other inputs to the next state.
        inputs: Packed inputs (N, ...); None is passed on as None.
        batch_sizes: Number of samples at each step; never increasing.
        state: Tensors (B, ...) before the first step.
        hidden_size: H; the output of a step is the first H numbers of its first state tensor.
        reverse: Run from the last step to the first.

    Returns:
        Outputs (N, H); the state of each sample after its last step.
    """
    split = ([None] * len(batch_sizes) if t is None else t.split(batch_sizes) for t in inputs)
    rows = list(zip(*split, strict=True))
    outputs, after = [], tuple(state)
    for x, *others in reversed(rows) if reverse else rows:
        n = len(x)
        new = step(x, [part[:n] for part in after], *others)
        outputs.append(new[0][:, :hidden_size])
        after = tuple(torch.cat([part, old[n:]]) for part, old in zip(new, after, strict=True))
    return torch.cat(outputs[::-1] if reverse else outputs), after


class Recurrent(nn.Module):
    """Base class: layers and directions of one kind of cell, with the interface of PyTorch's recurrent layers.

    A cell needs ``sequence``, ``start`` and ``state_size``; see ``HyperLSTMCell``.
    """

    cell: type[nn.Module]
    cells: Any  # an nn.ModuleList of cells
    states: int  # number of tensors of a state

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **cell: Any,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"expected num_layers of at least 1, got {num_layers}: choose a positive number")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout = batch_first, _probability("dropout", dropout)
        self.directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            self.cell(self.directions * hidden_size if layer else input_size, hidden_size, **cell)
            for layer in range(num_layers)
            for _ in range(self.directions)
        )

    def flatten_parameters(self) -> None:
        """Do nothing; ``torch.nn.LSTM`` has a method of this name, which its users call before each forward pass."""

    def _run(
        self, x: Tensor | PackedSequence, state: Sequence[Tensor] | None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        packed, data = (x, x.data) if isinstance(x, PackedSequence) else (None, x)
        unbatched = not packed and data.ndim == 2
        if not packed:
            data = data.unsqueeze(1) if unbatched else data.transpose(0, 1) if self.batch_first else data
        if data.ndim != (2 if packed else 3) or data.shape[-1] != self.input_size or not data.numel():
            raise ValueError(
                f"expected x of 2 or 3 dimensions, the last of size {self.input_size} (input_size) and none of size 0, "
                f"got {tuple(x.data.shape)}: reshape x"
            )
        sizes = packed.batch_sizes.tolist() if packed else [data.shape[1]] * data.shape[0]
        expected = (len(self.cells), sizes[0], self.cells[0].state_size)
        if state is None:
            state = (self.cells[0].start(sizes[0]).expand(expected),) * self.states
        elif unbatched:
            state = [s.unsqueeze(1) for s in state]
        if len(state) != self.states or any(s.shape != expected for s in state):
            raise ValueError(
                f"expected {self.states} state tensors of shape {expected} (layers * directions, B, state size), "
                f"got {[tuple(s.shape) for s in state]}: pass a state that a call has returned"
            )
        if packed and packed.sorted_indices is not None:
            state = [s.index_select(1, packed.sorted_indices) for s in state]
        if not packed:
            data = data.flatten(0, 1)
        last = []
        for i in range(0, len(self.cells), self.directions):
            if i:
                data = F.dropout(data, self.dropout, self.training)
            found = [
                cell.sequence(data, sizes, [s[i + k] for s in state], reverse=bool(k))
                for k, cell in enumerate(self.cells[i : i + self.directions])
            ]
            data = torch.cat([output for output, _ in found], -1)
            last += [final for _, final in found]
        state = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        if packed:
            if packed.unsorted_indices is not None:
                state = tuple(s.index_select(1, packed.unsorted_indices) for s in state)
            return packed._replace(data=data), state
        data = data.unflatten(0, (len(sizes), -1))
        if unbatched:
            return data.squeeze(1), tuple(s.squeeze(1) for s in state)
        return data.transpose(0, 1) if self.batch_first else data, state


class HyperLSTM(Recurrent):
    """Layers of ``HyperLSTMCell`` with the interface of ``torch.nn.LSTM`` (without ``proj_size`` and ``bias``).

    Each layer and direction has its own small LSTM, which reads that layer's h and input.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: Number of stacked layers.
        batch_first: Use (B, T, ...) instead of (T, B, ...) for x and the output.
        dropout: Probability that an output is dropped between layers, in training.
        bidirectional: Also run each layer from the last step to the first. Outputs are concatenated, (..., 2H).
        **cell: Options of ``HyperLSTMCell``: ``hyper_size``, ``embedding_size``, ``layer_norm``,
            ``recurrent_dropout``, ``hyper_recurrent_dropout``, ``init``, ``embed_previous``, ``eager``.

    Raises:
        ValueError: If an option, the shape of x or a state does not fit.

    >>> import torch
    >>> lstm = HyperLSTM(50, 100, num_layers=2, hyper_size=16)
    >>> output, (h, c) = lstm(torch.randn(7, 3, 50))
    >>> output.shape, h.shape
    (torch.Size([7, 3, 100]), torch.Size([2, 3, 116]))
    """

    cell, states = HyperLSTMCell, 2

    def forward(
        self, x: Tensor | PackedSequence, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run over sequences.

        Args:
            x: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) without a batch, or a ``PackedSequence``.
            state: (h, c) before the first step, each (num_layers * directions, B, H + S), the main LSTM's H numbers
                first. Default: zeros.

        Returns:
            Output, laid out like x, with H (or 2H) instead of I; (h, c) after each sample's last step.
        """
        output, (h, c) = self._run(x, state)
        return output, (h, c)


class HyperRNN(Recurrent):
    """Layers of ``HyperRNNCell`` with the interface of ``torch.nn.RNN``; see ``HyperLSTM``, with h instead of (h, c).

    >>> import torch
    >>> output, h = HyperRNN(50, 100, hyper_size=16)(torch.randn(7, 3, 50))
    >>> output.shape, h.shape
    (torch.Size([7, 3, 100]), torch.Size([1, 3, 116]))
    """

    cell, states = HyperRNNCell, 1

    def forward(
        self, x: Tensor | PackedSequence, state: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run over sequences; shapes as in ``HyperLSTM.forward``."""
        output, (h,) = self._run(x, None if state is None else (state,))
        return output, h


class KernelGenerator(nn.Module):
    r"""Generates the kernel of a convolution from an embedding (Ha et al. 2016, section 3.1).

    Two linear layers without a nonlinearity. The first has its own weights for each input channel i, the second is
    shared:

    .. math:: a_i = W_i z + B_i, \quad K_i = \langle W_{out}, a_i \rangle + B_{out}

    Several ``HyperConv2d`` layers can share one generator; their channels are multiples of the generator's.

    Args:
        in_channels: Input channels of the basic kernel (paper: 16).
        out_channels: Output channels of the basic kernel (paper: 16).
        kernel_size: f.
        embedding_size: Z; also the size of a_i, as in all of the paper's experiments.
        init: ``"variance"`` (our choice) initialises kernels with the variance of He et al. (2015). ``"paper"`` is the
            initialisation of the authors' code for MNIST: all weights have standard deviation 0.01, so kernels are
            near 0 at first. The paper does not say how its residual networks are initialised.

    Raises:
        ValueError: If ``init`` is unknown.

    >>> import torch
    >>> generator = KernelGenerator(in_channels=4, out_channels=8, embedding_size=2)
    >>> generator(torch.randn(5, 2)).shape
    torch.Size([5, 8, 4, 3, 3])
    """

    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        kernel_size: int = 3,
        embedding_size: int = 64,
        init: str = "variance",
    ):
        super().__init__()
        if init not in ("variance", "paper"):
            raise ValueError(f"expected init of variance or paper, got {init!r}: choose one of these")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.embedding_size, self.init = embedding_size, init
        self.first = nn.Linear(embedding_size, in_channels * embedding_size)
        self.second = nn.Linear(embedding_size, out_channels * kernel_size**2)
        for layer in (self.first, self.second):
            if init == "paper":
                _truncated_normal(layer.weight, 0.01)
            else:
                nn.init.normal_(layer.weight, std=embedding_size**-0.5)
            nn.init.zeros_(layer.bias)

    def embeddings(self, count: int, fan_in: int) -> nn.Parameter:
        """Return new embeddings (count, Z) for a kernel with ``fan_in`` inputs per output."""
        z = nn.Parameter(torch.empty(count, self.embedding_size))
        if self.init == "paper":
            _truncated_normal(z, 1.0, mean=0.01)
        else:
            nn.init.normal_(z, std=math.sqrt(2 / fan_in))
        return z

    def forward(self, z: Tensor) -> Tensor:
        """Generate kernels (J, out_channels, in_channels, f, f) from embeddings (J, Z)."""
        a = self.first(z).unflatten(1, (self.in_channels, -1))
        K = self.second(a).unflatten(2, (self.out_channels, self.kernel_size, self.kernel_size))
        return K.transpose(1, 2)


class HyperConv2d(nn.Module):
    """Convolution whose kernel is generated from learned embeddings (Ha et al. 2016, section 4.2).

    Works like ``torch.nn.Conv2d`` without groups and with zero padding. A kernel with more channels than the
    generator's is a grid of basic kernels, (in / basic in) rows by (out / basic out) columns, filled row by row. Each
    has its own embedding.

    Args:
        in_channels: A multiple of the generator's.
        out_channels: A multiple of the generator's.
        generator: Generates the kernel. Layers can share it.
        stride: See ``torch.nn.Conv2d``.
        padding: See ``torch.nn.Conv2d``.
        dilation: See ``torch.nn.Conv2d``.
        bias: Add a bias. It is learned, not generated.

    Raises:
        ValueError: If the channels are not multiples of the generator's.

    >>> import torch
    >>> conv = HyperConv2d(32, 64, KernelGenerator(), padding=1)
    >>> conv(torch.randn(2, 32, 9, 9)).shape
    torch.Size([2, 64, 9, 9])
    >>> conv.embeddings.shape  # a grid of 2 x 4 basic kernels
    torch.Size([8, 64])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        generator: KernelGenerator,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        basic = generator.in_channels, generator.out_channels
        if not (in_channels and out_channels) or in_channels % basic[0] or out_channels % basic[1]:
            raise ValueError(
                f"expected in_channels and out_channels to be multiples of the generator's {basic[0]} and {basic[1]}, "
                f"got {in_channels} and {out_channels}: change them or the generator"
            )
        self.in_channels, self.out_channels, self.generator = in_channels, out_channels, generator
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.grid = in_channels // basic[0], out_channels // basic[1]
        self.embeddings = generator.embeddings(math.prod(self.grid), in_channels * generator.kernel_size**2)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The kernel (out_channels, in_channels, f, f), generated anew at each access."""
        tiles = self.generator(self.embeddings).unflatten(0, self.grid)  # rows, columns, out, in, f, f
        f = self.generator.kernel_size
        return tiles.permute(1, 2, 0, 3, 4, 5).reshape(self.out_channels, self.in_channels, f, f)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, in_channels, height, width)."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, embeddings={len(self.embeddings)}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


class CoordinateNetwork(nn.Module):
    """Generates the weights of a fully connected layer from coordinates (Ha et al. 2016, section A.1).

    The layer's inputs and units lie on two grids. A network with two hidden layers of ReLUs maps four numbers, the x
    and y of a weight's input and of its unit, to that weight: 801 parameters generate 784 * 256 weights. The paper does
    not say: coordinates run from -1 to 1 on each grid; the initial weights have mean 0 and the variance of He et al.
    (2015).

    Args:
        inputs: Height and width of the grid of inputs (paper: 28 x 28).
        outputs: Height and width of the grid of units (paper: 16 x 16).
        width: Units of each hidden layer (25 gives the paper's number of parameters).

    >>> CoordinateNetwork()().shape
    torch.Size([256, 784])
    """

    def __init__(self, inputs: tuple[int, int] = (28, 28), outputs: tuple[int, int] = (16, 16), width: int = 25):
        super().__init__()
        self.from_input = nn.Linear(2, width)
        self.from_output = nn.Linear(2, width, bias=False)
        self.hidden = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)
        self.scale = math.sqrt(2 / math.prod(inputs))
        self.register_buffer("inputs", _grid(*inputs), persistent=False)
        self.register_buffer("outputs", _grid(*outputs), persistent=False)
        with torch.no_grad():
            weight = self() / self.scale
            self.last.weight /= weight.std()
            self.last.bias.sub_(weight.mean()).div_(weight.std())

    def forward(self) -> Tensor:
        """Generate the weights (units, inputs), as ``torch.nn.functional.linear`` takes them."""
        # The first layer is a sum of two terms, so it is computed once per input and per unit, not for each pair.
        hidden = torch.relu(self.from_output(self.outputs)[:, None] + self.from_input(self.inputs))
        return self.scale * self.last(torch.relu(self.hidden(hidden))).squeeze(-1)


def _grid(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _truncated_normal(weight: Tensor, std: float, mean: float = 0.0) -> Tensor:
    return nn.init.trunc_normal_(weight, mean, std, mean - 2 * std, mean + 2 * std)


def _probability(name: str, p: float) -> float:
    if not 0 <= p < 1:
        raise ValueError(f"expected {name} of at least 0 and below 1, got {p}: choose a probability")
    return p


def _lstm_update(
    y: Tensor, c: Tensor, norm_weight: Tensor | None, norm_bias: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the next h and c, each (B, H), from the sums y (B, 4, H) of the gates and from c; see ``HyperLSTMCell``.

    Gains and biases of the layer norm are (5, H), for the four gates and for c.
    """

    def LN(x: Tensor, k: int | slice) -> Tensor:
        if norm_weight is None:
            return x
        x = x - x.mean(-1, keepdim=True)  # F.layer_norm's forward-mode derivative cannot be differentiated again
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * norm_weight[k] + norm_bias[k]

    i, f, g, o = LN(y, slice(4)).unbind(-2)
    dropped = torch.tanh(g) if mask is None else torch.tanh(g) * mask
    c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * dropped
    return torch.sigmoid(o) * torch.tanh(LN(c, 4)), c


def _keep_mask(x: Tensor, shape: tuple[int, int], p: float, dtype: torch.dtype) -> Tensor | None:
    """Return dropout's factors, 1 / (1 - p) for a kept unit and 0 for a dropped one; None if p is 0."""
    return torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(1 - p).div_(1 - p) if p else None
