"""The LSTM that the paper compares with, and a choice of recurrent network by name (Ha et al. 2016, section 4).

Letters as in ``layers.py``: B samples, T steps, I inputs, H hidden units, N rows of a packed sequence.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_meta.hypernetworks.layers import HyperLSTM, Recurrent, run_steps
from lightning_meta.hypernetworks.ops.hyper_lstm import EPSILON

Network = Literal["lstm", "hyper_lstm"]


class LSTMCell(nn.Module):
    r"""LSTM cell with a HyperLSTM's layer norm and recurrent dropout, without its small network.

    .. math::
        y &= LN(W_h^y h_{t-1} + W_x^y x_t + b^y), \quad y \in \{i, f, g, o\} \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \mathrm{Dropout}(\tanh(g)), \quad h_t = \sigma(o) \tanh(LN(c_t))

    The forget gate gets 1 added after layer norm. Layer norm has gains but no biases; this gives the paper's numbers of
    parameters. ``torch.lstm`` runs the cell if layer norm and dropout are off and all sequences have one length.

    Args:
        input_size: I.
        hidden_size: H.
        layer_norm: Use layer norm (LN). Otherwise LN is the identity.
        recurrent_dropout: Probability that tanh(g) of a unit is dropped at a step, in training.

    >>> import torch
    >>> cell = LSTMCell(5, 8, layer_norm=True)
    >>> output, (h, c) = cell.sequence(torch.randn(6, 5), [3, 3], (cell.start(3), cell.start(3)))
    >>> output.shape, h.shape
    (torch.Size([6, 8]), torch.Size([3, 8]))
    """

    def __init__(self, input_size: int, hidden_size: int, layer_norm: bool = False, recurrent_dropout: float = 0.0):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.layer_norm, self.recurrent_dropout = layer_norm, recurrent_dropout
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        if layer_norm:
            self.norm_weight = nn.Parameter(torch.ones(5, hidden_size))  # of the four gates and of c
        for weight in (self.weight_ih, self.weight_hh):
            for gate in weight.chunk(4):
                nn.init.orthogonal_(gate)

    @property
    def state_size(self) -> int:
        """H."""
        return self.hidden_size

    def start(self, batch: int) -> Tensor:
        """Return the state before the first step: zeros (B, H)."""
        return self.bias.new_zeros(batch, self.hidden_size)

    def sequence(
        self, x: Tensor, batch_sizes: list[int], state: Sequence[Tensor], reverse: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run all steps; see ``HyperLSTMCell.sequence``. States are (B, H)."""
        H, (h, c) = self.hidden_size, state
        forget = self.bias.new_tensor([0.0, 1.0, 0.0, 0.0])[:, None]
        plain = not (self.layer_norm or (self.recurrent_dropout and self.training))
        if plain and batch_sizes[0] == batch_sizes[-1] and not reverse:  # several times as fast
            bias = (self.bias.view(4, H) + forget).flatten()
            weights = [self.weight_ih, self.weight_hh, bias, torch.zeros_like(bias)]
            x = x.unflatten(0, (len(batch_sizes), -1))
            output, h, c = torch.lstm(x, [h[None], c[None]], weights, True, 1, 0.0, self.training, False, False)
            return output.flatten(0, 1), (h[0], c[0])

        def step(projected: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            h, c = state
            gates = (projected + F.linear(h, self.weight_hh)).unflatten(1, (4, H))
            if self.layer_norm:
                gates = F.layer_norm(gates, (H,), None, None, EPSILON) * self.norm_weight[:4]
            i, f, g, o = (gates + forget).unbind(1)
            g = F.dropout(torch.tanh(g), self.recurrent_dropout, self.training)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * g
            normal = F.layer_norm(c, (H,), self.norm_weight[4], None, EPSILON) if self.layer_norm else c
            return torch.sigmoid(o) * torch.tanh(normal), c

        return run_steps(step, [F.linear(x, self.weight_ih, self.bias)], batch_sizes, state, H, reverse)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, layer_norm={self.layer_norm}"


class LSTM(Recurrent):
    """Layers of ``LSTMCell`` with the interface of ``torch.nn.LSTM`` and ``HyperLSTM``.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: Number of stacked layers.
        batch_first: Use (B, T, ...) instead of (T, B, ...) for x and the output.
        dropout: Probability that an output is dropped between layers, in training.
        bidirectional: Also run each layer from the last step to the first. Outputs are concatenated, (..., 2H).
        **cell: Options of ``LSTMCell``: ``layer_norm`` and ``recurrent_dropout``.

    Raises:
        ValueError: If an option, the shape of x or a state does not fit.

    >>> import torch
    >>> output, (h, c) = LSTM(5, 8, num_layers=2, layer_norm=True)(torch.randn(7, 3, 5))
    >>> output.shape, h.shape
    (torch.Size([7, 3, 8]), torch.Size([2, 3, 8]))
    """

    cell, states = LSTMCell, 2

    def forward(
        self, x: Tensor | PackedSequence, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run over sequences; shapes as in ``torch.nn.LSTM``."""
        return self._run(x, state)


def recurrent_network(
    network: Network,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    layer_norm: bool,
    recurrent_dropout: float = 0.0,
    hyper_size: int = 128,
    embedding_size: int = 4,
    hyper_recurrent_dropout: float = 0.0,
    init: str = "paper",
    **options: bool | float,
) -> LSTM | HyperLSTM:
    """Build one of the paper's recurrent networks. An LSTM ignores the options of the small network.

    Args:
        network: ``lstm`` or ``hyper_lstm``.
        input_size: I.
        hidden_size: H.
        num_layers: Number of stacked layers.
        layer_norm: Use layer norm.
        recurrent_dropout: See ``HyperLSTMCell``.
        hyper_size: See ``HyperLSTMCell``.
        embedding_size: See ``HyperLSTMCell``.
        hyper_recurrent_dropout: See ``HyperLSTMCell``.
        init: See ``HyperLSTMCell``.
        options: ``batch_first``, ``dropout`` and ``bidirectional``; see ``HyperLSTM``.
    """
    options |= {"layer_norm": layer_norm, "recurrent_dropout": recurrent_dropout}
    if network == "lstm":
        return LSTM(input_size, hidden_size, num_layers, **options)
    return HyperLSTM(
        input_size,
        hidden_size,
        num_layers,
        **options,
        hyper_size=hyper_size,
        embedding_size=embedding_size,
        hyper_recurrent_dropout=hyper_recurrent_dropout,
        init=init,
    )


def generated_scales(recurrent: HyperLSTM, state: tuple[Tensor, Tensor]) -> Tensor:
    """Return the scales d_h of the last layer's gates i, f, g, o after a step, of the first sample: (4, H)."""
    return recurrent.cells[-1].scales(state[0][-1, 0, recurrent.hidden_size :])[0]


def weight_changes(recurrent: HyperLSTM, d_h: Tensor) -> Tensor:
    """Measure how much the last layer's weights W_h change at each step (the paper's figures 4 and 7).

    For each gate this is the Frobenius norm of W_h(t) - W_h(t - 1), where W_h(t) has the rows of W_h scaled by d_h(t).

    Args:
        recurrent: The network.
        d_h: Scales (T, 4, H) from ``generated_scales``.

    Returns:
        (T, 4), float32 on the CPU, 0 at the first step.
    """
    rows = recurrent.cells[-1].weight_hh.unflatten(0, (4, -1)).norm(dim=2)
    return F.pad((d_h.diff(dim=0) * rows).norm(dim=2), (0, 0, 1, 0)).float().cpu()
