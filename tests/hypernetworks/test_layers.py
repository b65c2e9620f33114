"""The recurrent layers against their equations, step by step, in float64."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from lightning_meta.hypernetworks import HyperLSTM, HyperLSTMCell, HyperRNN, HyperRNNCell
from lightning_meta.hypernetworks.ops import hyper_lstm, hyper_lstm_native

LSTM_OPTIONS = [
    {"layer_norm": layer_norm, "embed_previous": previous} for layer_norm in (True, False) for previous in (True, False)
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def randomised(layer: nn.Module) -> nn.Module:
    """In float64, no weight at its start."""
    with torch.no_grad():
        for weight in layer.double().parameters():
            weight.normal_(std=0.5)
    return layer


def by_equations(cell, x: Tensor, state, reverse: bool = False):
    """Outputs (T, B, H) and the last state of one layer in one direction, step by step."""
    outputs, step = [], cell.step if isinstance(cell, HyperLSTMCell) else partial(rnn_step, cell)
    for x_t in x.flip(0) if reverse else x:
        state = step(x_t, state)
        outputs.append(state[0][:, : cell.hidden_size])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def rnn_step(cell: HyperRNNCell, x: Tensor, state):
    h, hyper_h = state[0].split([cell.hidden_size, cell.hyper_size], 1)
    hyper_x = torch.cat([h, x], 1)
    hyper_h = torch.tanh(hyper_h @ cell.hyper_weight_hh.T + hyper_x @ cell.hyper_weight_ih.T + cell.hyper_bias)
    z = [hyper_h @ weight[0].T for weight in cell.embed_weight]
    z[:2] = [z_j + bias[0] for z_j, bias in zip(z[:2], cell.embed_bias, strict=True)]
    d_h, d_x, b = (z_j @ weight[0].T for z_j, weight in zip(z, cell.scale_weight, strict=True))
    h = torch.tanh(d_h * (h @ cell.weight_hh.T) + d_x * (x @ cell.weight_ih.T) + b + cell.bias)
    return [torch.cat([h, hyper_h], 1)]


def compare(found, wanted, leaves) -> None:
    """Values, and gradients of a random sum of them."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.randn_like(b) for b in wanted]
    found, wanted = (torch.autograd.grad(outputs, leaves, grads) for outputs in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


CELLS = [*((HyperLSTMCell, options) for options in LSTM_OPTIONS), (HyperRNNCell, {})]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("kind", "options"), CELLS)
def test_a_layer_equals_the_equations(kind, options, reverse):
    cell = randomised(kind(3, 5, hyper_size=4, embedding_size=2, **options))
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    count = 2 if kind is HyperLSTMCell else 1
    state = [torch.randn(3, 9, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    output, last = cell.sequence(x.flatten(0, 1), [3] * 4, state, reverse)
    wanted, wanted_last = by_equations(cell, x, state, reverse)
    compare([output.unflatten(0, (4, 3)), *last], [wanted, *wanted_last], [x, *state, *cell.parameters()])


@pytest.mark.parametrize("recurrent_dropout", [0.0, 0.4])
@pytest.mark.parametrize("options", LSTM_OPTIONS)
def test_gradcheck(options, recurrent_dropout):
    """Two layers, both directions, sequences of several lengths, masks drawn from one seed."""
    lstm = HyperLSTM(
        2,
        3,
        2,
        dropout=recurrent_dropout,
        bidirectional=True,
        hyper_size=2,
        embedding_size=2,
        recurrent_dropout=recurrent_dropout,
        hyper_recurrent_dropout=recurrent_dropout,
        **options,
    )
    names = [name for name, _ in randomised(lstm).named_parameters()]

    def run(a, b, h, c, *weights):
        torch.manual_seed(1)
        packed = pack_sequence([a, b], enforce_sorted=False)
        weights = dict(zip(names, weights, strict=True))
        output, state = torch.func.functional_call(lstm, weights, (packed, (h, c)))
        return output.data, *state

    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 2), (3, 2), (4, 2, 5), (4, 2, 5))]
    inputs = [t.requires_grad_() for t in (*inputs, *(weight.detach() for weight in lstm.parameters()))]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_gradcheck_without_a_shortcut():
    cell = randomised(HyperLSTMCell(2, 2, hyper_size=2, embedding_size=1))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2), (2, 4), (2, 4))]

    def run(x, h, c, *weights):
        output, state = cell.sequence(x, [2, 2], (h, c))
        return output, *state

    assert torch.autograd.gradcheck(run, (*inputs, *cell.parameters()))


@pytest.mark.parametrize("layer", [HyperLSTM, HyperRNN])
def test_without_scales_it_is_torchs_layer(layer):
    """d_h = d_x = 1 and b = b_0."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    settings = {"layer_norm": False} if layer is HyperLSTM else {}
    ours = layer(3, 5, hyper_size=4, embedding_size=2, **options, **settings).double()
    theirs = (nn.LSTM if layer is HyperLSTM else nn.RNN)(3, 5, **options).double()
    for cell, suffix in zip(ours.cells, ("l0", "l0_reverse", "l1", "l1_reverse"), strict=True):
        with torch.no_grad():
            cell.embed_weight[2].zero_()
            cell.scale_weight[:2].fill_(1 / 2)
            cell.weight_ih.copy_(getattr(theirs, f"weight_ih_{suffix}"))
            cell.weight_hh.copy_(getattr(theirs, f"weight_hh_{suffix}"))
            cell.bias.copy_(getattr(theirs, f"bias_ih_{suffix}") + getattr(theirs, f"bias_hh_{suffix}"))
            if layer is HyperLSTM:
                cell.bias[5:10] -= 1  # it adds 1 to the forget gate
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    output, state = ours(x)
    wanted, wanted_state = theirs(x)
    torch.testing.assert_close(output, wanted)
    state, wanted_state = (s if isinstance(s, tuple) else (s,) for s in (state, wanted_state))
    for a, b in zip(state, wanted_state, strict=True):
        torch.testing.assert_close(a[..., :5], b)


def both_layers(**options):
    return [randomised(layer(3, 5, hyper_size=4, embedding_size=2, **options)) for layer in (HyperLSTM, HyperRNN)]


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def test_packed_sequences_run_each_alone():
    for layer in both_layers(num_layers=2, bidirectional=True):
        sequences = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 5, 3)]
        start = [torch.randn(4, 3, 9, dtype=torch.float64) for _ in range(layer.states)]
        as_state = tuple if layer.states == 2 else (lambda s: s[0])
        packed, state = layer(pack_sequence(sequences, enforce_sorted=False), as_state(start))
        outputs, lengths = pad_packed_sequence(packed)
        assert lengths.tolist() == [2, 5, 3]
        for b, sequence in enumerate(sequences):
            wanted, wanted_state = layer(sequence, as_state([s[:, b] for s in start]))
            torch.testing.assert_close(outputs[: len(sequence), b], wanted)
            for a, w in zip(parts(state), parts(wanted_state), strict=True):
                torch.testing.assert_close(a[:, b], w)


def test_batch_first_and_unbatched():
    for layer in both_layers():
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        wanted, state = layer(x)
        layer.batch_first = True
        output, _ = layer(x.transpose(0, 1))
        torch.testing.assert_close(output.transpose(0, 1), wanted)
        output, last = layer(x[:, 1])
        torch.testing.assert_close(output, wanted[:, 1])
        torch.testing.assert_close(parts(last)[0], parts(state)[0][:, 1])


def test_a_carried_state_goes_on_and_a_cell_makes_the_same_steps():
    for layer in both_layers():
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        wanted, state = layer(x)
        first, carried = layer(x[:2])
        second, carried = layer(x[2:], carried)
        torch.testing.assert_close(torch.cat([first, second]), wanted)
        stepped = None
        for step in x:
            stepped = layer.cells[0](step, stepped)
        for a, b, c in zip(parts(carried), parts(stepped), parts(state), strict=True):
            torch.testing.assert_close(a, c)
            torch.testing.assert_close(b, c[0])


def test_a_layer_reads_the_one_below():
    for layer in both_layers(num_layers=2, dropout=0.5):
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        start = [torch.zeros(2, 9, dtype=torch.float64)] * layer.states
        low, _ = layer.cells[0].sequence(x.flatten(0, 1), [2] * 4, start)
        torch.manual_seed(1)
        wanted, _ = layer.cells[1].sequence(F.dropout(low, 0.5), [2] * 4, start)
        torch.manual_seed(1)
        torch.testing.assert_close(layer(x)[0].flatten(0, 1), wanted)
        layer.eval()
        wanted, _ = layer.cells[1].sequence(low, [2] * 4, start)
        torch.testing.assert_close(layer(x)[0].flatten(0, 1), wanted)


def test_without_gradients_the_same_comes_out():
    lstm, _ = both_layers(bidirectional=True)
    x = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (4, 2)])
    (wanted, state) = lstm(x)
    with torch.no_grad():
        output, last = lstm(x)
    assert torch.equal(output.data, wanted.data)
    assert all(torch.equal(a, b) for a, b in zip(last, state, strict=True))


def test_gradients_can_be_computed_again_but_not_differentiated():
    lstm, _ = both_layers()
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    output = lstm(x)[0].sum()
    once, again = (torch.autograd.grad(output, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    (grad,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("options", LSTM_OPTIONS)
def test_eager_layers_have_second_derivatives(options):
    cell = randomised(HyperLSTMCell(2, 2, hyper_size=2, embedding_size=1, eager=True, **options))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (2, 4), (2, 4))]

    def run(x, h, c, *weights):
        output, state = cell.sequence(x, [2, 1], (h, c))
        return output, *state

    assert torch.autograd.gradgradcheck(run, (*inputs, *cell.parameters()), fast_mode=True)


def test_both_ways_to_run_drop_the_same_units():
    options = {"bidirectional": True, "recurrent_dropout": 0.4, "hyper_recurrent_dropout": 0.4}
    fast = randomised(HyperLSTM(3, 5, hyper_size=4, embedding_size=2, **options))
    eager = HyperLSTM(3, 5, hyper_size=4, embedding_size=2, eager=True, **options).double()
    eager.load_state_dict(fast.state_dict())
    packed, found = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (4, 2)]), []
    for layer in (fast, eager):
        torch.manual_seed(1)
        output, state = layer(packed)
        found.append([output.data, *state])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def layer_and_loss(layer_norm: bool):
    """A layer, the sum of its squared outputs as a function of x, and x; the loss curves in all directions."""
    lstm = HyperLSTM(2, 3, 2, bidirectional=True, hyper_size=2, embedding_size=2, layer_norm=layer_norm)
    randomised(lstm)
    return lstm, lambda x: lstm(x)[0].square().sum(), torch.randn(3, 2, 2, dtype=torch.float64)


def by_differences(function, x: Tensor, v: Tensor, step: float = 1e-5) -> Tensor:
    """The directional derivative of a function by central differences."""
    with torch.no_grad():
        return (function(x + step * v) - function(x - step * v)) / (2 * step)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_torch_func_and_forward_mode(layer_norm):
    _, loss, x = layer_and_loss(layer_norm)
    v = torch.randn_like(x)

    def gradient(x: Tensor) -> Tensor:  # by the fast operator
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(loss(x), x)[0]

    slope, curve = by_differences(loss, x, v), by_differences(gradient, x, v)
    assert slope.abs() > 1e-3
    assert curve.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient(x))
    torch.testing.assert_close(torch.func.jacrev(loss)(x), gradient(x))
    torch.testing.assert_close(torch.func.jacfwd(loss)(x), gradient(x))
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (v,))[1], slope, rtol=1e-7, atol=1e-8)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, slope, rtol=1e-7, atol=1e-8)
    for first in (torch.func.jacrev, torch.func.jacfwd):
        for second in (torch.func.jacrev, torch.func.jacfwd):
            product = (second(first(loss))(x) * v).sum((-3, -2, -1))
            torch.testing.assert_close(product, curve, rtol=1e-6, atol=1e-7)


def test_gradients_of_each_sample_and_vmap():
    lstm, loss, _ = layer_and_loss(True)
    weights = {name: weight.detach() for name, weight in lstm.named_parameters()}
    xs = torch.randn(3, 4, 1, 2, dtype=torch.float64)

    def loss_of(weights, x):
        return torch.func.functional_call(lstm, weights, (x,))[0].square().sum()

    found = torch.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(weights, xs)
    for i, x in enumerate(xs):
        wanted = torch.autograd.grad(loss(x), list(lstm.parameters()))
        for name, grad in zip(weights, wanted, strict=True):
            torch.testing.assert_close(found[name][i], grad)
    torch.testing.assert_close(torch.vmap(loss)(xs), torch.stack([loss(x) for x in xs]))


def test_compiled_transforms_are_right_and_plain_calls_keep_the_operator():
    lstm, loss, x = layer_and_loss(True)
    compiled = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.func.grad(loss)(x))
    for strict in (True, False):
        exported = torch.export.export(lstm, (x,), strict=strict)
        operators = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert operators.count(torch.ops.lightning_meta.hyper_lstm.default) == 4, "2 layers of 2 directions"
        torch.testing.assert_close(exported.module()(x)[0], lstm(x)[0])


def test_recurrent_dropout_drops_tanh_g_and_nothing_else():
    """With all gates open and tanh(g) = 1, c counts the steps at which a unit was kept."""
    cell = HyperLSTMCell(1, 400, hyper_size=2, layer_norm=False, recurrent_dropout=0.25).double()
    with torch.no_grad():
        cell.scale_weight.zero_()
        cell.bias.fill_(50)
    x = torch.zeros(20, 1, 1, dtype=torch.float64)
    state = (cell.start(1),) * 2
    _, (_, c) = cell.sequence(x.flatten(0, 1), [1] * 20, state)
    kept = c[0, :400] * 0.75
    torch.testing.assert_close(kept, kept.round())
    assert abs(kept.mean() - 15) < 0.3
    assert len(kept.unique()) > 4, "a mask of its own at each step"
    _, (_, c) = cell.eval().sequence(x.flatten(0, 1), [1] * 20, state)
    torch.testing.assert_close(c[0, :400], torch.full((400,), 20.0, dtype=torch.float64))


@pytest.mark.parametrize("init", ["paper", "broken-symmetry"])
@pytest.mark.parametrize("embedding_size", [1, 4])
@pytest.mark.parametrize("kind", [HyperLSTMCell, HyperRNNCell])
def test_start(kind, embedding_size, init):
    cell = kind(6, 8, hyper_size=5, embedding_size=embedding_size, init=init)
    d = torch.stack(cell.scales(torch.randn(3, 5)), 1)
    assert d.shape == (3, 3, cell.gates, 8)
    torch.testing.assert_close(d[:, :2], torch.full_like(d[:, :2], 0.1))
    assert not d[:, 2].any()
    for weight in (cell.weight_hh, cell.weight_ih, cell.hyper_weight_hh, cell.hyper_weight_ih):
        for gate in weight.chunk(cell.gates):
            narrow = gate if gate.shape[0] <= gate.shape[1] else gate.T
            torch.testing.assert_close(narrow @ narrow.T, torch.eye(len(narrow)), rtol=0, atol=1e-5)
    assert not cell.bias.any()
    assert not cell.hyper_bias.any()
    assert 0.002 < cell.embed_weight[2].std() < 0.02


def test_at_the_start_nothing_depends_on_the_small_network():
    cell = HyperLSTMCell(3, 6, hyper_size=4)
    x, state = torch.randn(8, 3), (cell.start(2),) * 2
    output, _ = cell.sequence(x, [2] * 4, state)
    small = [weight for name, weight in cell.named_parameters() if name.startswith("hyper_")]
    assert not any(grad.any() for grad in torch.autograd.grad(output.square().sum(), small, retain_graph=True))
    assert all(grad.any() for grad in torch.autograd.grad(output.square().sum(), (cell.weight_hh, cell.weight_ih)))
    torch.nn.init.normal_(cell.hyper_weight_ih)
    assert torch.equal(cell.sequence(x, [2] * 4, state)[0], output)


@pytest.mark.parametrize(("kind", "tolerance"), [(HyperLSTM, 1e-12), (HyperRNN, 1e-12)])
def test_components_of_an_embedding_stay_equal_under_the_papers_start_alone(kind, tolerance):
    def spread(init: str) -> float:
        torch.manual_seed(0)
        layer = kind(3, 6, hyper_size=4, embedding_size=3, init=init).double()
        optimizer = torch.optim.Adam(layer.parameters(), 0.01)
        x, y = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 4, 6, dtype=torch.float64)
        for _ in range(10):
            optimizer.zero_grad()
            (layer(x)[0] - y).square().sum().backward()
            optimizer.step()
        moved = layer.cells[0].embed_weight[:2]
        assert moved.abs().max() > 0.01, "they are learned"
        return (moved - moved.mean(2, keepdim=True)).abs().max().item()

    assert spread("paper") <= tolerance
    assert spread("broken-symmetry") > 1e-3


@pytest.mark.parametrize(
    ("inputs", "hidden", "hyper", "embedding", "layers", "layer_norm", "outputs", "count"),
    [
        (50, 1000, 128, 4, 1, False, 50, 4_911_874),  # Penn Treebank
        (50, 1000, 128, 4, 1, True, 50, 4_923_154),
        (50, 1000, 128, 16, 2, True, 50, 14_407_714),
        (205, 1800, 256, 64, 1, False, 205, 18_708_213),  # enwik8
        (205, 2048, 512, 64, 1, True, 205, 26_541_773),
        (3, 900, 128, 4, 1, False, 121, 3_941_181),  # handwriting
        (3, 900, 128, 4, 1, True, 121, 3_951_461),
    ],
)
def test_as_many_parameters_as_the_paper_prints(inputs, hidden, hyper, embedding, layers, layer_norm, outputs, count):
    with torch.device("meta"):
        lstm = HyperLSTM(inputs, hidden, layers, hyper_size=hyper, embedding_size=embedding, layer_norm=layer_norm)
    assert sum(p.numel() for p in lstm.parameters()) + hidden * outputs + outputs == count


def test_names_in_a_checkpoint():
    assert list(HyperLSTM(2, 3, 2, hyper_size=2).state_dict())[:13] == [
        f"cells.0.{name}"
        for name in (
            "weight_ih",
            "weight_hh",
            "bias",
            "hyper_weight_ih",
            "hyper_weight_hh",
            "hyper_bias",
            "embed_weight",
            "embed_bias",
            "scale_weight",
            "norm_weight",
            "norm_bias",
            "hyper_norm_weight",
            "hyper_norm_bias",
        )
    ]


def test_the_operators_meet_what_torch_asks_of_them():
    lstm, _ = both_layers()
    seen = []
    original = torch.ops.lightning_meta.hyper_lstm.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is original:
                seen.append(args)
            return operator(*args, **(kwargs or {}))

    with Watch():
        lstm(torch.randn(3, 2, 3, dtype=torch.float64))
    (arguments,) = seen

    def fresh(value):
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_()
        return [fresh(v) for v in value] if isinstance(value, (list, tuple)) else value

    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(original, tuple(fresh(value) for value in arguments), test_utils=tests)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_compiled_it_computes_the_same(layer_norm):
    lstm = randomised(HyperLSTM(3, 5, 2, bidirectional=True, hyper_size=4, embedding_size=2, layer_norm=layer_norm))
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(lstm), backend=compiler, fullgraph=True)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for run in (lstm, compiled):
        output, (h, c) = run(x)
        (output.square().sum() + h.sum() + c.sum()).backward()
    assert compiler.frame_count == 1
    torch.testing.assert_close(compiled(x)[0], lstm(x)[0])
    for a, b in zip(compiled.parameters(), lstm.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("layer", [HyperLSTM, HyperRNN])
def test_bfloat16(layer):
    """Outputs and gradients, with weights that let every part count: at the start the output is nearly zero."""
    ours = layer(8, 16, 2, hyper_size=8, bidirectional=True)
    for weight in ours.parameters():
        nn.init.normal_(weight, std=0.3)
    x = torch.randn(6, 4, 8)

    def run(model, x):
        model.zero_grad()
        output = model(x)[0]
        output.float().square().sum().backward()
        return output.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    def error(found, wanted):
        return ((found.float() - wanted).norm() / wanted.norm()).item()

    wanted, wanted_gradient = run(ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(ours, x)
    narrow = run(ours.bfloat16(), x.bfloat16())
    for (output, gradient), dtype in ((mixed, torch.float32), (narrow, torch.bfloat16)):
        assert gradient.dtype == dtype
        assert error(output, wanted) < 0.02
        assert error(gradient, wanted_gradient) < 0.04
    assert narrow[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", LSTM_OPTIONS)
def test_both_forms_of_a_step_compute_the_same(monkeypatch, options, dropout, dtype):
    """Packed, in two threads, with sizes that fill no vector and no block of samples; bfloat16 under autocast."""
    mixed = dtype == torch.bfloat16
    working = torch.float32 if mixed else dtype
    if hyper_lstm_native.steps(torch.zeros(1, dtype=working), dtype) is None:
        pytest.skip("there is no C++ compiler")
    options = {**options, "recurrent_dropout": dropout, "hyper_recurrent_dropout": dropout}
    lstm = randomised(HyperLSTM(3, 21, 2, bidirectional=True, hyper_size=10, embedding_size=3, **options)).to(working)
    for weight in lstm.parameters():
        weight.data.mul_(0.5)
    torch.set_num_threads(2)
    x = pack_sequence([torch.randn(n, 3, dtype=working, requires_grad=True) for n in (4,) * 11 + (3,) * 8 + (1,)])

    call, calls = hyper_lstm_native._call, []
    monkeypatch.setattr(hyper_lstm_native, "_call", lambda *arguments: calls.append(True) or call(*arguments))

    def run(worth: int) -> list[Tensor]:
        calls.clear()
        monkeypatch.setattr(hyper_lstm, "WORTH_BUILDING", worth)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            output, state = lstm(x)
        loss = output.data.sum() + sum(part.square().sum() for part in state)
        gradients = torch.autograd.grad(loss, (x.data, *lstm.parameters()))
        assert bool(calls) == (worth == 0), "which form ran"
        return [output.data, *state, *gradients]

    for a, b in zip(run(worth=0), run(worth=2**60), strict=True):
        scale = b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol={8: 1e-13, 4: 1e-5, 2: 3e-2}[dtype.itemsize])


def test_what_is_short_waits_for_no_compiler(monkeypatch):
    asked = []
    monkeypatch.setattr(hyper_lstm_native, "_library", lambda: asked.append(True))
    for rows in (2**6 - 1, 2**6):
        assert not asked
        cell = HyperLSTMCell(1, 2**10, hyper_size=1, embedding_size=1)
        cell.sequence(torch.zeros(rows, 1), [1] * rows, (cell.start(1),) * 2)
    assert asked


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_it_runs(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hyper_lstm_native, "_library", hyper_lstm_native._library.__wrapped__)
    monkeypatch.setattr(hyper_lstm, "WORTH_BUILDING", 0)
    lstm, _ = both_layers()
    cell, x = lstm.cells[0], torch.randn(2, 3, 3, dtype=torch.float64)
    wanted, _ = by_equations(cell, x, [torch.zeros(3, 9, dtype=torch.float64)] * 2)
    torch.testing.assert_close(lstm(x)[0], wanted)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "expected init of paper or broken-symmetry"),
        ({"hyper_size": 0}, "expected hyper_size of at least 1"),
        ({"embedding_size": 0}, "expected embedding_size of at least 1"),
        ({"num_layers": 0}, "expected num_layers of at least 1"),
        ({"dropout": 1.0}, "expected dropout of at least 0 and below 1"),
        ({"recurrent_dropout": -0.1}, "expected recurrent_dropout of at least 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        HyperLSTM(3, 4, **options)


def test_inputs_that_do_not_fit():
    lstm = HyperLSTM(3, 4, hyper_size=2)
    for shape in ((5, 2, 4), (3,), (0, 2, 3)):
        with pytest.raises(ValueError, match="expected x of 2 or 3 dimensions, the last of size 3"):
            lstm(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected 2 state tensors of shape \(1, 2, 6\)"):
        lstm(torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))


@pytest.mark.parametrize("layer", [HyperLSTM, HyperRNN])
def test_code_for_torchs_layers_may_flatten_parameters(layer):
    torch.manual_seed(0)
    made = layer(3, 4, hyper_size=2, embedding_size=1)
    x = torch.randn(2, 1, 3)
    before = made(x)[0]
    assert made.flatten_parameters() is None
    assert torch.equal(made(x)[0], before)
