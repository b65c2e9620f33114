r"""The layers of Ha, Dai and Le 2016, "HyperNetworks": networks whose weights another, smaller network writes.

Static (section 3.1): convolutions whose kernels come from small learned embeddings. Dynamic (section 3.2): recurrent
layers whose weights a smaller recurrent network rescales at every step.

Letters: B samples, T steps, I inputs, H hidden units, S units of the small network (``hyper_size``), Z numbers of an
embedding (``embedding_size``), Y gates: 4 of an LSTM in torch's order (input, forget, cell, output), 1 of an RNN.
N is the number of rows of a packed sequence: T * B where all are of one length.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_meta.hypernetworks.ops.hyper_lstm import hyper_lstm

_STARTS = ("paper", "broken-symmetry")


class _HyperCell(nn.Module):
    """The weights of a cell and of the small network that rescales them; their start (section A.2.3)."""

    gates: int  # Y

    def __init__(
        self, input_size: int, hidden_size: int, hyper_size: int = 128, embedding_size: int = 4, init: str = "paper"
    ):
        super().__init__()
        for name, size in (("input", input_size), ("hidden", hidden_size), ("hyper", hyper_size)):
            if size < 1:
                raise ValueError(f"expected {name}_size of at least 1, got {size}: choose a positive number")
        if embedding_size < 1:
            raise ValueError(f"expected embedding_size of at least 1, got {embedding_size}: choose a positive number")
        if init not in _STARTS:
            raise ValueError(f"expected init of {' or '.join(_STARTS)}, got {init!r}: choose one of these")
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
        """Starts anew."""
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

    def scales(self, h: Tensor) -> Tensor:
        """What the small network writes: d_h, d_x and b of each gate.

        Args:
            h: State (..., H + S), of which the small network's S are read.

        Returns:
            (..., 3, Y, H).
        """
        z = torch.einsum("kyzs,...s->...kyz", self.embed_weight, h[..., self.hidden_size :])
        z = z + F.pad(self.embed_bias, (0, 0, 0, 0, 0, 1))
        d = torch.einsum("kyhz,...kyz->...kyh", self.scale_weight, z)
        return d + F.pad(self.bias.view(1, -1, self.hidden_size), (0, 0, 0, 0, 2, 0))

    def start(self, batch: int) -> Tensor:
        """The state before the first step: zeros (B, H + S)."""
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
        """Both networks' products with x (N, I), in one: W_x x and What_x x, (N, YH + YS)."""
        return F.linear(x, torch.cat([self.weight_ih, self.hyper_weight_ih[:, self.hidden_size :]]))

    def _weight_h(self) -> Tensor:
        """What both networks multiply h by, (YH + YS, H)."""
        return torch.cat([self.weight_hh, self.hyper_weight_ih[:, : self.hidden_size]])


class HyperLSTMCell(_HyperCell):
    r"""LSTM cell whose weights' rows are rescaled at every step by a smaller LSTM (Ha et al. 2016, sections 3.2, A.2).

    For each gate y in i, f, g, o, hats for the small LSTM:

    .. math::
        \hat x &= (h_{t-1}, x_t) \\
        \hat y &= LN(\hat W_h^y \hat h_{t-1} + \hat W_x^y \hat x + \hat b^y) \\
        \hat c_t &= \sigma(\hat f) \hat c_{t-1} + \sigma(\hat i) \tanh(\hat g), \quad
        \hat h_t = \sigma(\hat o) \tanh(LN(\hat c_t)) \\
        z_h^y &= W_{hh}^y \hat h_t + b_{hh}^y, \quad z_x^y = W_{hx}^y \hat h_t + b_{hx}^y, \quad
        z_b^y = W_{hb}^y \hat h_t \\
        y &= LN(W_{hz}^y z_h^y \odot W_h^y h_{t-1} + W_{xz}^y z_x^y \odot W_x^y x_t + W_{bz}^y z_b^y + b_0^y) \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \mathrm{Dropout}(\tanh(g)), \quad h_t = \sigma(o) \tanh(LN(c_t))

    The state is torch's pair (h, c), each (B, H + S): the small LSTM's part follows the main one's. Both forget gates
    get 1 more, after their layer norm (the authors' code).

    Differs from the paper: z reads the small LSTM's new output, as the text and the authors' code have it;
    ``embed_previous`` reads the one before, as the equations are printed. Gradients are worked out by hand, once: they
    cannot be differentiated again.

    Args:
        input_size: I.
        hidden_size: H.
        hyper_size: S.
        embedding_size: Z, of each of the 12 embeddings.
        layer_norm: Whether LN normalises, in both networks, or does nothing.
        recurrent_dropout: Probability that a unit's tanh(g) is dropped at a step, in training.
        hyper_recurrent_dropout: The same in the small LSTM (the paper's largest model).
        init: ``"paper"``, under which all Z components of an embedding stay equal for ever, or ``"broken-symmetry"``:
            with noise between them, and d_h, d_x the same 0.1.
        embed_previous: Whether z reads the small LSTM's output of the step before.
    """

    gates = 4
    norm_weight: nn.Parameter
    norm_bias: nn.Parameter
    hyper_norm_weight: nn.Parameter
    hyper_norm_bias: nn.Parameter

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
    ):
        super().__init__(input_size, hidden_size, hyper_size, embedding_size, init)
        self.recurrent_dropout = _probability("recurrent_dropout", recurrent_dropout)
        self.hyper_recurrent_dropout = _probability("hyper_recurrent_dropout", hyper_recurrent_dropout)
        self.layer_norm, self.embed_previous = layer_norm, embed_previous
        if layer_norm:  # of the four gates and of c
            for name, size in (("norm", hidden_size), ("hyper_norm", hyper_size)):
                self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(5, size)))
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(5, size)))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            x: (B, I).
            state: (h, c), each (B, H + S); zeros if not given.

        Returns:
            The next (h, c). The cell's output is ``h[:, :hidden_size]``.
        """
        _, state = self.sequence(x, [len(x)], state or (self.start(len(x)),) * 2)
        return state

    def sequence(
        self, x: Tensor, batch_sizes: list[int], state: Sequence[Tensor], reverse: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All steps, without a graph of each.

        Args:
            x: Packed sequences (N, I): the samples of one step after those of another.
            batch_sizes: How many samples each step has: fewer from step to step.
            state: (h, c) before the first step, each (B, H + S).
            reverse: From the last step to the first.

        Returns:
            Outputs (N, H); (h, c) of each sample after its last step.
        """
        H, S = self.hidden_size, self.hyper_size
        # One number more in z, always 1, and b_0 in its column: b is then a product like d_h and d_x.
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
        scale = torch.cat([self.scale_weight.mT, F.pad(bias.view(1, 4, 1, H), (0, 0, 0, 0, 0, 0, 2, 0))], 2).flatten(
            0, 1
        )
        projected = self._project(x)
        dtype = torch.promote_types(self.bias.dtype, torch.float32)  # of all but the largest products
        masks = (
            _keep_mask(x, (len(x), size), p if self.training else 0.0, dtype)
            for size, p in ((H, self.recurrent_dropout), (S, self.hyper_recurrent_dropout))
        )
        weights = [self.hyper_weight_hh, hyper_bias, embed_weight, embed_bias, scale]
        output, *states = hyper_lstm(
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
        h, hyper_h, c, hyper_c = (t.to(self.bias.dtype) for t in states)
        return output.to(self.bias.dtype), (torch.cat([h, hyper_h], -1), torch.cat([c, hyper_c], -1))


class HyperRNNCell(_HyperCell):
    r"""Tanh RNN cell whose weights' rows are rescaled at every step by a smaller RNN (Ha et al. 2016, section 3.2).

    .. math::
        \hat h_t &= \tanh(\hat W_h \hat h_{t-1} + \hat W_x (h_{t-1}, x_t) + \hat b) \\
        z_h &= W_{hh} \hat h_t + b_{hh}, \quad z_x = W_{hx} \hat h_t + b_{hx}, \quad z_b = W_{hb} \hat h_t \\
        h_t &= \tanh(W_{hz} z_h \odot W_h h_{t-1} + W_{xz} z_x \odot W_x x_t + W_{bz} z_b + b_0)

    The state is h (B, H + S): the small RNN's part follows the main one's.

    Args:
        input_size: I.
        hidden_size: H.
        hyper_size: S.
        embedding_size: Z, of each of the 3 embeddings.
        init: As of ``HyperLSTMCell``.
    """

    gates = 1

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            x: (B, I).
            state: h (B, H + S); zeros if not given.

        Returns:
            The next h. The cell's output is ``h[:, :hidden_size]``.
        """
        _, (h,) = self.sequence(x, [len(x)], [self.start(len(x)) if state is None else state])
        return h

    def sequence(
        self, x: Tensor, batch_sizes: list[int], state: Sequence[Tensor], reverse: bool = False
    ) -> tuple[Tensor, tuple[Tensor]]:
        """All steps. Arguments and results as of ``HyperLSTMCell.sequence``, with (h,) for (h, c)."""
        H, S = self.hidden_size, self.hyper_size
        (both,), weight_h = state, self._weight_h()
        outputs = []
        steps = self._project(x).split(batch_sizes)  # one view a step, one gradient for all
        for projected in reversed(steps) if reverse else steps:
            (x_main, x_hyper), n = projected.split([H, S], -1), len(projected)
            h, hyper_h = both[:n].split([H, S], -1)
            h_main, h_hyper = F.linear(h, weight_h).split([H, S], -1)
            hyper_h = torch.tanh(x_hyper + h_hyper + F.linear(hyper_h, self.hyper_weight_hh, self.hyper_bias))
            d_h, d_x, b = self.scales(torch.cat([h, hyper_h], -1))[:, :, 0].unbind(1)
            h = torch.tanh(d_h * h_main + d_x * x_main + b)
            outputs.append(h)
            both = torch.cat([torch.cat([h, hyper_h], -1), both[n:]])
        return torch.cat(outputs[::-1] if reverse else outputs), (both,)


class Recurrent(nn.Module):
    """Layers and directions of one kind of cell, with the interface of torch's recurrent layers.

    A cell has ``sequence``, ``start`` and ``state_size``; see ``HyperLSTMCell``.
    """

    cell: type[nn.Module]
    cells: Any  # an nn.ModuleList of them
    states: int  # tensors of a state

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

    def _run(
        self, x: Tensor | PackedSequence, state: Sequence[Tensor] | None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        packed, data = (x, x.data) if isinstance(x, PackedSequence) else (None, x)
        unbatched = not packed and data.ndim == 2
        if not packed:
            data = data.unsqueeze(1) if unbatched else data.transpose(0, 1) if self.batch_first else data
        if data.ndim != (2 if packed else 3) or data.shape[-1] != self.input_size or not data.numel():
            raise ValueError(
                f"expected x of 2 or 3 dimensions, the last of {self.input_size} (input_size), none of them 0, got "
                f"{tuple(x.data.shape)}: reshape x"
            )
        sizes = packed.batch_sizes.tolist() if packed else [data.shape[1]] * data.shape[0]
        expected = (len(self.cells), sizes[0], self.cells[0].state_size)
        if state is None:
            state = (self.cells[0].start(sizes[0]).expand(expected),) * self.states
        elif unbatched:
            state = [s.unsqueeze(1) for s in state]
        if len(state) != self.states or any(s.shape != expected for s in state):
            raise ValueError(
                f"expected {self.states} state tensors of shape {expected} (layers * directions, B, units of a state), "
                f"got {[tuple(s.shape) for s in state]}: pass the state that a call returned"
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
    """Layers of ``HyperLSTMCell`` with the interface of ``torch.nn.LSTM``.

    Each layer and direction has a small LSTM of its own, which reads that layer's h and input.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: Each reads the outputs of the one below.
        batch_first: Whether x and the output are (B, T, ...) instead of (T, B, ...).
        dropout: Probability that an output is dropped between layers, in training.
        bidirectional: Whether each layer also runs from the last step to the first; outputs side by side, (..., 2H).
        **cell: Options of ``HyperLSTMCell``: ``hyper_size``, ``embedding_size``, ``layer_norm``,
            ``recurrent_dropout``, ``hyper_recurrent_dropout``, ``init``, ``embed_previous``.

    Raises:
        ValueError: An option, a shape or a state does not fit.
    """

    cell, states = HyperLSTMCell, 2

    def forward(
        self, x: Tensor | PackedSequence, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run over sequences.

        Args:
            x: (T, B, I), (B, T, I) if ``batch_first``, (T, I), or packed.
            state: (h, c) before the first step, each (num_layers * directions, B, H + S), the small LSTM's S after the
                main one's H; zeros if not given.

        Returns:
            Output as x is, with H (or 2H) for I; (h, c) after each sample's last step.
        """
        output, (h, c) = self._run(x, state)
        return output, (h, c)


class HyperRNN(Recurrent):
    """Layers of ``HyperRNNCell`` with the interface of ``torch.nn.RNN``; see ``HyperLSTM``, with h for (h, c)."""

    cell, states = HyperRNNCell, 1

    def forward(
        self, x: Tensor | PackedSequence, state: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run over sequences; shapes as of ``HyperLSTM.forward``."""
        output, (h,) = self._run(x, None if state is None else (state,))
        return output, h


class KernelGenerator(nn.Module):
    r"""The network that writes a convolution's kernel from an embedding (Ha et al. 2016, section 3.1).

    Two linear layers with nothing between them; the first has weights for each input channel i, the second is shared:

    .. math:: a_i = W_i z + B_i, \quad K_i = \langle W_{out}, a_i \rangle + B_{out}

    One generator serves any number of ``HyperConv2d``, of any multiples of its channels.

    Args:
        in_channels: Of the basic kernel (paper: 16).
        out_channels: Of the basic kernel (paper: 16).
        kernel_size: f.
        embedding_size: Z; also the size of a_i, as in all of the paper's experiments.
        init: ``"variance"``, a choice of ours: a kernel starts with the variance that its layer needs (He et al.
            2015). ``"paper"``, the start of the authors' code for MNIST: all weights of standard deviation 0.01, so
            that kernels start near 0. The paper does not say how the residual nets start.
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
        """New embeddings (count, Z) for a kernel whose outputs sum over so many inputs."""
        z = nn.Parameter(torch.empty(count, self.embedding_size))
        if self.init == "paper":
            _truncated_normal(z, 1.0, mean=0.01)
        else:
            nn.init.normal_(z, std=math.sqrt(2 / fan_in))
        return z

    def forward(self, z: Tensor) -> Tensor:
        """Kernels (J, out_channels, in_channels, f, f) of embeddings (J, Z)."""
        a = self.first(z).unflatten(1, (self.in_channels, -1))
        K = self.second(a).unflatten(2, (self.out_channels, self.kernel_size, self.kernel_size))
        return K.transpose(1, 2)


class HyperConv2d(nn.Module):
    """Convolution whose kernel a generator writes from learned embeddings, in the place of ``torch.nn.Conv2d``.

    A kernel larger than the generator's is a grid of basic ones, (in / basic in) rows by (out / basic out) columns,
    each with an embedding of its own, filled row by row (section 4.2).

    Args:
        in_channels: A multiple of the generator's.
        out_channels: A multiple of the generator's.
        generator: May be shared with other layers.
        stride: As of ``torch.nn.Conv2d``.
        padding: As of ``torch.nn.Conv2d``.
        dilation: As of ``torch.nn.Conv2d``.
        bias: Whether there is one; it is learned, not generated.

    Raises:
        ValueError: The channels are no multiples of the generator's.
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
                f"expected channels that are multiples of the generator's {basic[0]} and {basic[1]}, got {in_channels} "
                f"and {out_channels}: change them or the generator"
            )
        self.in_channels, self.out_channels, self.generator = in_channels, out_channels, generator
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.grid = in_channels // basic[0], out_channels // basic[1]
        self.embeddings = generator.embeddings(math.prod(self.grid), in_channels * generator.kernel_size**2)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The kernel (out_channels, in_channels, f, f), generated anew at each reading."""
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
    """Writes a fully connected layer's weights from where their two ends lie (Ha et al. 2016, section A.1).

    Inputs and units of the layer lie on two grids. Four numbers, the x and y of a weight's input and of its unit, go
    through two hidden layers of ReLUs to that weight: 801 parameters write 784 * 256. The paper does not say: the
    numbers run from -1 to 1 on each grid; what comes out starts with mean 0 and variance 1, and is scaled to the
    variance of He et al. (2015).

    Args:
        inputs: Height and width of the grid of inputs (paper: 28 x 28).
        outputs: Height and width of the grid of units (paper: 16 x 16).
        width: Units of each hidden layer (25, which gives the paper's number of parameters).
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
        """Weights (units, inputs), as ``torch.nn.functional.linear`` takes them."""
        # The first layer is linear in the two ends, so that it is worked out once for each end, not for each pair.
        hidden = torch.relu(self.from_output(self.outputs)[:, None] + self.from_input(self.inputs))
        return self.scale * self.last(torch.relu(self.hidden(hidden))).squeeze(-1)


def _grid(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _truncated_normal(weight: Tensor, std: float, mean: float = 0.0) -> Tensor:
    return nn.init.trunc_normal_(weight, mean, std, mean - 2 * std, mean + 2 * std)


def _probability(name: str, p: float) -> float:
    if not 0 <= p < 1:
        raise ValueError(f"expected {name} of at least 0 and below 1, got {p}: it is the part that is dropped")
    return p


def _keep_mask(x: Tensor, shape: tuple[int, int], p: float, dtype: torch.dtype) -> Tensor | None:
    """1 / (1 - p) where a unit is kept, 0 where it is dropped; None if all are kept."""
    return torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(1 - p).div_(1 - p) if p else None
