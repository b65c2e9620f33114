import math

import pytest
import torch
from torch import nn

from lightning_meta.learned_optimizers.layers import LearnedRule, UpdateNetwork, log_sign

SHAPES = [(2, 3, 1, 2), (2,), (4, 3), (1, 2, 2, 2), ()]  # 12 and 8 coordinates of kernels, 2 + 12 + 1 of others


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def network(**options):
    torch.manual_seed(0)
    net = UpdateNetwork(**{"hidden_size": 4, "output_scale": 0.5} | options).double()
    nn.init.normal_(net.output.bias)  # so that a forgotten bias shows
    return net


def by_branches(x, p):
    if abs(x) >= math.exp(-p):
        return math.log(abs(x)) / p, math.copysign(1, x)
    return -1, math.exp(p) * x


def cells(net):
    """Torch's cell with the weights of each layer."""
    for layer in net.layers:
        cell = nn.LSTMCell(layer.input_size, layer.hidden_size).double()
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        yield cell


def literal(net, gradients, state, problems=1):
    """One step after another, one coordinate after another; averaging cells over each problem's coordinates."""
    T, N = gradients.shape
    updates, layers = torch.zeros_like(gradients), list(cells(net))
    state = [[(h[i], c[i]) for i in range(N)] for h, c in state]
    for t in range(T):
        xs = [gradients.new_tensor([x] if net.p is None else by_branches(x, net.p)) for x in gradients[t].tolist()]
        for k, cell in enumerate(layers):
            pairs = [tuple(v[0] for v in cell(xs[i][None], tuple(v[None] for v in state[k][i]))) for i in range(N)]
            hs, size = [h.clone() for h, _ in pairs], N // problems
            for first in range(0, N, size):
                for unit in range(net.averaging_cells):
                    mean = sum(pairs[i][0][unit] for i in range(first, first + size)) / size
                    for i in range(first, first + size):
                        hs[i][unit] = mean
            xs, state[k] = hs, [(hs[i], pairs[i][1]) for i in range(N)]
        for i in range(N):
            updates[t, i] = net.output_scale * (net.output.weight[0] @ xs[i] + net.output.bias[0])
    return updates, [tuple(torch.stack(v) for v in zip(*layer, strict=True)) for layer in state]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("p", [10, 5])
def test_log_sign_is_the_formula_with_branches(p):
    edge = math.exp(-p)
    sizes = [0, 1e-30, edge / 3, edge * (1 - 1e-9), edge, edge * (1 + 1e-9), 3 * edge, 0.1, 1, math.e, 1e6, 1e30, 1e300]
    values = [sign * size for size in sizes for sign in (1, -1)]
    got = log_sign(torch.tensor(values, dtype=torch.float64).view(2, -1), p)
    wanted = torch.tensor([by_branches(value, p) for value in values], dtype=torch.float64)
    torch.testing.assert_close(got.view(-1, 2), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-5, math.exp(-10), 3.0, -1e30])
def test_log_sign_has_a_finite_derivative(value):
    x = torch.tensor(value, requires_grad=True)
    for output in log_sign(x):
        assert torch.autograd.grad(output, x, retain_graph=True)[0].isfinite()


def test_log_sign_has_the_derivative_of_the_formula():
    x = torch.tensor([0.0, 1e-6, -2e-5, 1e-3, -0.5, 20], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_sign, x, eps=1e-9, atol=1e-4)


def test_numbers_of_weights():
    assert sum(p.numel() for p in UpdateNetwork().parameters()) == 5301
    assert sum(p.numel() for p in UpdateNetwork(p=None).parameters()) == 5221
    assert sum(p.numel() for p in LearnedRule().parameters()) == 5301
    assert sum(p.numel() for p in LearnedRule(separate_convolutions=True).parameters()) == 2 * 5301


def test_the_first_updates_are_small_whatever_the_gradient():
    """Most starts move all coordinates in one direction, so only the size is promised."""
    for seed in range(50):
        torch.manual_seed(seed)
        net = UpdateNetwork(output_scale=1.0)
        updates, _ = net(torch.tensor([[-1.0, 1.0, 0.0, 1e-3, -30.0]]), net.start(5))
        assert 1e-4 < updates.abs().max() < 0.015


@pytest.mark.parametrize("options", [{}, {"p": None}, {"num_layers": 1}, {"num_layers": 3, "p": 5.0}])
def test_the_network_is_a_cell_on_each_coordinate(options):
    net, gradients = network(**options), randn(4, 5)
    state = [(0.5 * randn(5, 4), randn(4, 5).T) for _ in net.layers]
    close(net(gradients, state), literal(net, gradients, state))


@pytest.mark.parametrize("cells", [0, 2])
def test_step_by_step_is_the_whole_sequence(cells):
    net, gradients = network(averaging_cells=cells), randn(6, 4)
    state, updates = net.start(4), []
    for gradient in gradients:
        update, state = net(gradient[None], state, 2)
        updates.append(update)
    close(net(gradients, net.start(4), 2), (torch.cat(updates), state))


def test_permuting_coordinates_permutes_updates():
    net, gradients = network(), randn(5, 6)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    updates, state = net(gradients, net.start(6))
    permuted, permuted_state = net(gradients[:, order], net.start(6))
    close(permuted, updates[:, order])
    close(permuted_state, [(h[order], c[order]) for h, c in state])
    for h, c in state:
        assert len({tuple(row) for row in h.tolist()}) == len({tuple(row) for row in c.tolist()}) == 6


def test_a_coordinate_sees_only_its_own_gradients():
    net, gradients = network(), randn(5, 6)
    updates, _ = net(gradients, net.start(6))
    other = gradients.index_add(1, torch.tensor([2]), randn(5, 1))
    changed = (net(other, net.start(6))[0] != updates).any(0)
    assert changed.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("cells", [1, 3, 4])
@pytest.mark.parametrize("problems", [1, 2, 3])
def test_averaging_cells_are_a_mean_over_each_problems_coordinates(problems, cells):
    net, gradients = network(averaging_cells=cells), randn(3, 6)
    state = [(0.5 * randn(6, 4), randn(4, 6).T) for _ in net.layers]
    close(net(gradients, state, problems), literal(net, gradients, state, problems))


def test_averaging_cells_of_one_problem_do_not_see_another():
    net, gradients = network(averaging_cells=2), randn(4, 6)
    updates, _ = net(gradients, net.start(6), 2)
    other = gradients.index_add(1, torch.tensor([1]), randn(4, 1))
    assert (net(other, net.start(6), 2)[0] != updates).any(0).tolist() == [True] * 3 + [False] * 3


def test_averaging_over_one_coordinate_changes_nothing():
    plain, averaging, gradients = network(), network(averaging_cells=4), randn(4, 3)
    close(averaging(gradients, averaging.start(3), 3), plain(gradients, plain.start(3)))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[1:3], SHAPES[:1], SHAPES[::-1]])
def test_join_is_the_inverse_of_split(shapes, separate):
    rule = LearnedRule(separate, hidden_size=2)
    values = randn(3, 2, sum(map(math.prod, shapes)))
    parts = rule.split(values, shapes)
    assert sum(part.shape[1] for part in parts.values()) == values[0].numel()
    assert torch.equal(rule.join(parts, 2, shapes), values)


def test_kernels_go_to_their_network_and_the_rest_to_the_other():
    rule, values = LearnedRule(True, hidden_size=2), torch.arange(2 * 35).view(1, 2, 35)
    parts = rule.split(values, SHAPES)
    kernels = [*range(12), *range(26, 34)]
    assert parts["kernels"].tolist() == [kernels + [35 + i for i in kernels]]
    others = [i for i in range(35) if i not in kernels]
    assert parts["others"].tolist() == [others + [35 + i for i in others]]


def test_start_counts_coordinates():
    state = LearnedRule(True, hidden_size=3, num_layers=1).start(4, SHAPES)
    assert {name: [v.shape for layer in s for v in layer] for name, s in state.items()} == {
        "kernels": [(80, 3)] * 2,
        "others": [(60, 3)] * 2,
    }
    state = LearnedRule(hidden_size=3).start(4, SHAPES)
    assert [h.shape for h, _ in state["all"]] == [(140, 3)] * 2
    assert all(not h.any() and not c.any() for h, c in state["all"])
    assert list(LearnedRule(True).start(1, [(3,)])) == ["others"]


@pytest.mark.parametrize("cells", [0, 2])
def test_one_step_of_the_rule_is_one_of_each_network(cells):
    torch.manual_seed(0)
    rule = LearnedRule(True, hidden_size=4, averaging_cells=cells).double()
    gradients = randn(1, 2, 35)
    state = {name: [(h + 0.3, c - 0.2) for h, c in s] for name, s in rule.start(2, SHAPES).items()}
    updates, after = rule(gradients, state, SHAPES)
    flat = {name: torch.zeros(2, 35, dtype=torch.bool) for name in ("kernels", "others")}
    flat["kernels"][:, :12] = flat["kernels"][:, 26:34] = True
    flat["others"] = ~flat["kernels"]
    for name, mask in flat.items():
        wanted, wanted_state = rule.networks[name](gradients[0][mask][None], state[name], 2)
        close(updates[0][mask], wanted[0])
        close(after[name], wanted_state)
    assert not torch.equal(*(net.output.weight for net in rule.networks.values()))
