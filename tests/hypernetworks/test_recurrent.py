"""The LSTM that the HyperLSTM is compared with."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_meta.hypernetworks import HyperLSTM, HyperLSTMCell
from lightning_meta.hypernetworks.recurrent import LSTM, LSTMCell, recurrent_network


def by_equations(cell: LSTMCell, x, h, c):
    """One step of one sample, unit by unit."""
    H, outputs = cell.hidden_size, []
    gates = cell.weight_ih @ x + cell.weight_hh @ h + cell.bias

    def norm(y, k):
        if not cell.layer_norm:
            return y
        variance = ((y - y.mean()) ** 2).mean()
        return (y - y.mean()) / (variance + 1e-3).sqrt() * cell.norm_weight[k]

    i, f, g, o = (norm(gates[k * H : (k + 1) * H], k) for k in range(4))
    c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
    outputs = torch.sigmoid(o) * torch.tanh(norm(c, 4))
    return outputs, c


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_it_follows_the_equations(layer_norm, reverse):
    cell = LSTMCell(3, 5, layer_norm).double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    x, h, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((8, 3), (2, 5), (2, 5)))
    output, (h_n, c_n) = cell.sequence(x, [2] * 4, (h, c), reverse)
    for sample in range(2):
        h_1, c_1 = h[sample], c[sample]
        for t in reversed(range(4)) if reverse else range(4):
            h_1, c_1 = by_equations(cell, x[2 * t + sample], h_1, c_1)
            torch.testing.assert_close(output[2 * t + sample], h_1)
        torch.testing.assert_close(h_n[sample], h_1)
        torch.testing.assert_close(c_n[sample], c_1)


@pytest.mark.parametrize("packed", [True, False])
def test_without_layer_norm_it_is_torchs(packed):
    ours = LSTM(3, 5, 2, bidirectional=True).double()
    theirs = nn.LSTM(3, 5, 2, bidirectional=True).double()
    for i, cell in enumerate(ours.cells):
        name = f"l{i // 2}{'_reverse' if i % 2 else ''}"
        bias = cell.bias.detach().clone()
        bias[5:10] += 1  # the forget gates
        values = {"weight_ih": cell.weight_ih, "weight_hh": cell.weight_hh, "bias_ih": bias, "bias_hh": 0 * bias}
        theirs.load_state_dict(theirs.state_dict() | {f"{key}_{name}": value for key, value in values.items()})
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    x = pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False) if packed else x
    for a, b in zip(ours(x)[1], theirs(x)[1], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(*((layer(x)[0].data if packed else layer(x)[0]) for layer in (ours, theirs)))


def test_recurrent_dropout_drops_what_enters_a_cell():
    torch.manual_seed(0)
    cell = LSTMCell(3, 1000, recurrent_dropout=0.3)
    x, zero = torch.randn(1, 3), torch.zeros(1, 1000)
    _, (_, c) = cell.sequence(x, [1], (zero, zero))
    _, (_, wanted) = cell.eval().sequence(x, [1], (zero, zero))
    kept = c != 0
    assert 0.65 < kept.float().mean() < 0.75
    torch.testing.assert_close(c[kept], wanted[kept] / 0.7)


def test_gradcheck():
    layer = LSTM(2, 3, layer_norm=True).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *weights: layer(x)[0], (x, *layer.parameters()))


@pytest.mark.parametrize(
    ("inputs", "hidden", "layers", "layer_norm", "outputs", "count"),
    [
        (50, 1000, 1, False, 50, 4_254_050),  # Penn Treebank
        (50, 1250, 1, False, 50, 6_567_550),
        (50, 1000, 2, False, 50, 12_258_050),
        (50, 1000, 1, True, 50, 4_259_050),  # printed as 4.26 M
        (205, 1800, 1, False, 205, 14_812_405),  # enwik8
        (205, 2000, 1, False, 205, 18_058_205),
        (205, 1800, 1, True, 205, 14_821_405),
        (3, 900, 1, False, 121, 3_363_421),  # handwriting
        (3, 400, 3, False, 121, 3_258_121),
        (3, 650, 2, False, 121, 5_161_771),
    ],
)
def test_as_many_parameters_as_the_paper_prints(inputs, hidden, layers, layer_norm, outputs, count):
    with torch.device("meta"):
        lstm = LSTM(inputs, hidden, layers, layer_norm=layer_norm)
    assert sum(p.numel() for p in lstm.parameters()) + hidden * outputs + outputs == count


def test_the_start_is_orthogonal_by_gate():
    cell = LSTMCell(3, 6)
    for weight in (cell.weight_ih, cell.weight_hh):
        for gate in weight.chunk(4):
            torch.testing.assert_close(gate.T @ gate, torch.eye(gate.shape[1]), rtol=0, atol=1e-5)
    assert not cell.bias.any()


def test_networks_by_name():
    options = {"layer_norm": True, "recurrent_dropout": 0.1, "hyper_size": 4, "embedding_size": 2, "dropout": 0.2}
    plain = recurrent_network("lstm", 3, 5, 2, **options)
    assert isinstance(plain, LSTM)
    assert plain.dropout == 0.2
    hyper = recurrent_network("hyper_lstm", 3, 5, 2, init="broken-symmetry", **options)
    assert isinstance(hyper, HyperLSTM)
    (first, _) = hyper.cells
    assert isinstance(first, HyperLSTMCell)
    assert (first.hyper_size, first.embedding_size, first.init) == (4, 2, "broken-symmetry")
    assert first.recurrent_dropout == plain.cells[0].recurrent_dropout == 0.1
