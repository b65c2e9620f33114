"""The layers whose weights are written from embeddings or coordinates."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_meta.hypernetworks import CoordinateNetwork, HyperConv2d, KernelGenerator


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def by_equations(generator: KernelGenerator, z):
    """The basic kernel of one embedding, channel by channel."""
    Z, f = generator.embedding_size, generator.kernel_size
    slices = []
    for i in range(generator.in_channels):
        rows = slice(i * Z, (i + 1) * Z)
        a = generator.first.weight[rows] @ z + generator.first.bias[rows]
        slices.append((generator.second.weight @ a + generator.second.bias).view(generator.out_channels, f, f))
    return torch.stack(slices, 1)


def test_a_kernel_is_a_grid_of_basic_ones_filled_row_by_row():
    generator = KernelGenerator(2, 3, kernel_size=3, embedding_size=4).double()
    for bias in (generator.first.bias, generator.second.bias):
        nn.init.normal_(bias)
    layer = HyperConv2d(4, 9, generator, stride=2, padding=1).double()
    nn.init.normal_(layer.bias)
    assert layer.embeddings.shape == (6, 4)
    rows = []
    for row in range(2):
        rows.append(torch.cat([by_equations(generator, layer.embeddings[3 * row + column]) for column in range(3)], 0))
    kernel = torch.cat(rows, 1)
    torch.testing.assert_close(layer.weight, kernel)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, layer.bias, 2, 1))


def test_gradcheck():
    generator = KernelGenerator(1, 2, kernel_size=2, embedding_size=2).double()
    layer = HyperConv2d(2, 2, generator).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *weights: layer(x), (x, *layer.parameters()))


def test_a_convolution_can_be_replaced():
    wanted = nn.Conv2d(4, 8, 3, 2, 2, 2)
    layer = HyperConv2d(4, 8, KernelGenerator(4, 4, embedding_size=3), 2, 2, 2)
    assert layer.weight.shape == wanted.weight.shape
    x = torch.randn(2, 4, 9, 9)
    wanted.load_state_dict({"weight": layer.weight, "bias": nn.init.normal_(layer.bias)})
    torch.testing.assert_close(layer(x), wanted(x))
    same = HyperConv2d(4, 8, layer.generator, padding="same", bias=False)
    torch.testing.assert_close(same(x), F.conv2d(x, same.weight, padding=1))


def test_mnist_has_as_many_parameters_as_the_paper_prints():
    layer = HyperConv2d(16, 16, KernelGenerator(kernel_size=7, embedding_size=4), padding=3, bias=False)
    assert count(layer) == 4_244
    assert layer.weight.numel() == 12_544


@pytest.mark.parametrize(("k", "embeddings", "weights"), [(1, 15_488, 557_568), (2, 61_824, 2_225_664)])
def test_residual_nets_have_as_many_parameters_as_the_paper_prints(k, embeddings, weights):
    generator = KernelGenerator()
    widths = [16, *(width * k for width in (16, 32, 64) for _ in range(12))]
    net = nn.Sequential(*(HyperConv2d(a, b, generator, bias=False) for a, b in pairwise(widths)))
    assert count(generator) == 75_920
    assert count(net) == 75_920 + embeddings, "one generator"
    assert sum(layer.weight.numel() for layer in net) == weights
    other = nn.Sequential(*(HyperConv2d(16, 16, generator) for _ in range(2)))
    other.load_state_dict(other.state_dict())
    assert other[0].generator is other[1].generator


def test_start():
    torch.manual_seed(0)
    generator = KernelGenerator()
    for channels in (16, 64):
        wanted = (2 / (channels * 9)) ** 0.5
        found = torch.stack([HyperConv2d(channels, channels, generator).weight for _ in range(20)]).std().item()
        assert found == pytest.approx(wanted, rel=0.3)
    paper = KernelGenerator(kernel_size=7, embedding_size=4, init="paper")
    stds = [HyperConv2d(16, 16, paper).weight.std().item() for _ in range(20)]
    assert 0.5e-4 < sum(stds) / 20 < 5e-4
    with pytest.raises(ValueError, match="expected init of variance or paper"):
        KernelGenerator(init="zeros")


def test_channels_that_do_not_fit():
    for channels in ((24, 16), (16, 24), (0, 16)):
        with pytest.raises(ValueError, match="multiples of the generator's 16 and 16"):
            HyperConv2d(*channels, KernelGenerator())


def test_weights_from_coordinates():
    network = CoordinateNetwork()
    assert count(network) == 801
    assert network().shape == (256, 784)
    assert network().numel() == 200_704
    torch.testing.assert_close(network().mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(network().std(), torch.tensor((2 / 784) ** 0.5), rtol=1e-4, atol=0)
    network = CoordinateNetwork((2, 3), (1, 2), width=4).double()
    inputs = [(x, y) for y in (-1, 1) for x in (-1, 0, 1)]
    units = [(x, -1) for x in (-1, 1)]
    weight = torch.cat([network.from_input.weight, network.from_output.weight], 1)
    for u, unit in enumerate(units):
        for i, pixel in enumerate(inputs):
            hidden = torch.relu(weight @ torch.tensor([*pixel, *unit], dtype=torch.float64) + network.from_input.bias)
            wanted = (2 / 6) ** 0.5 * network.last(torch.relu(network.hidden(hidden)))[0]
            torch.testing.assert_close(network()[u, i], wanted)
