import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_meta.learnets.layers import (
    FactorisedConv2d,
    FactorisedLinear,
    depthwise_conv2d,
    filter_variation,
    initialise_as_filters,
)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def filtered(picture, filters, padding):
    """Depthwise cross-correlation of (d, H, W) with (d, f, f), as a loop."""
    d, f, _ = filters.shape
    _, H, W = picture.shape
    y = torch.zeros(d, H - f + 1 + 2 * padding, W - f + 1 + 2 * padding, dtype=torch.float64)
    for c in range(d):
        for i in range(y.shape[1]):
            for j in range(y.shape[2]):
                for u in range(f):
                    for v in range(f):
                        row, column = i + u - padding, j + v - padding
                        if 0 <= row < H and 0 <= column < W:
                            y[c, i, j] += filters[c, u, v] * picture[c, row, column]
    return y


def mixed(picture, layer):
    """A 1x1 convolution, as a loop."""
    y = torch.zeros(layer.out_channels, *picture.shape[1:], dtype=torch.float64)
    for k in range(layer.out_channels):
        for c in range(layer.in_channels):
            y[k] += layer.weight[k, c, 0, 0] * picture[c]
        if layer.bias is not None:
            y[k] += layer.bias[k]
    return y


def pictures(x):
    """The images of a batch, each with the number of its example."""
    return [(b, x[b]) for b in range(len(x))] if x.ndim == 4 else [(b, p) for b in range(len(x)) for p in x[b]]


SHAPES = pytest.mark.parametrize("shape", [(3, 2, 5, 6), (3, 4, 2, 5, 6), (1, 2, 5, 6), (3, 1, 2, 5, 6)])
PADDINGS = pytest.mark.parametrize(("f", "padding"), [(3, 0), (3, 1), (2, 0), (1, 0), (5, 3)])


@SHAPES
@PADDINGS
def test_depthwise_convolution_is_the_loop(shape, f, padding):
    x, filters = randn(*shape), randn(shape[0], 2, f, f)
    y = depthwise_conv2d(x, filters, padding)
    wanted = torch.stack([filtered(picture, filters[b], padding) for b, picture in pictures(x)])
    assert y.shape == (*shape[:-2], *wanted.shape[-2:])
    close(y.flatten(0, -4), wanted)


@SHAPES
@PADDINGS
@pytest.mark.parametrize("only", [None, 0, 1])
def test_its_gradients_are_those_of_taps(shape, f, padding, only):
    """Also if only the image or only the filters need a gradient."""
    inputs = [randn(*shape), randn(shape[0], 2, f, f)]
    for i, value in enumerate(inputs):
        value.requires_grad_(only in (None, i))
    wanting = [value for value in inputs if value.requires_grad]
    x, filters = inputs
    y = depthwise_conv2d(x, filters, padding)
    padded = F.pad(x, (padding,) * 4)
    H, W = y.shape[-2:]
    w = filters if x.ndim == 4 else filters[:, None]
    taps = ((u, v) for u in range(f) for v in range(f))
    literal = sum(w[..., u, v, None, None] * padded[..., u : u + H, v : v + W] for u, v in taps)
    g = randn(*y.shape)
    close(torch.autograd.grad(y, wanting, g), torch.autograd.grad(literal, wanting, g))


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 2, 2, 3, 4)])
@pytest.mark.parametrize("padding", [0, 1])
def test_depthwise_convolution_has_first_and_second_derivatives(shape, padding):
    inputs = (randn(*shape).requires_grad_(), randn(2, 2, 2, 2).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv2d(x, w, padding), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w: depthwise_conv2d(x, w, padding), inputs)


def test_no_example_sees_anothers_filters():
    x, filters = randn(3, 2, 5, 5), randn(3, 2, 3, 3)
    other = filters.index_add(0, torch.tensor([1]), randn(1, 2, 3, 3))
    changed = (depthwise_conv2d(x, other) != depthwise_conv2d(x, filters)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


def test_depthwise_convolution_in_bf16():
    """Under autocast, filters are bf16 and images either type; gradients have the type of their inputs."""
    for dtype in (torch.float32, torch.bfloat16):
        x, filters = randn(2, 2, 6, 6).to(dtype).requires_grad_(), randn(2, 2, 3, 3).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = depthwise_conv2d(x, filters)
        y.float().square().sum().backward()
        wide = [value.detach().double().requires_grad_() for value in (x, filters)]
        wanted = depthwise_conv2d(*wide)
        wanted.square().sum().backward()
        torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.05)
        for narrow, value in zip((x, filters), wide, strict=True):
            assert narrow.grad.dtype == narrow.dtype
            torch.testing.assert_close(narrow.grad.double(), value.grad, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (3, 2, 2, 5, 6)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("inner", "bias"), [(None, True), (3, False)])
def test_factorised_convolution_is_the_formula(shape, padding, inner, bias):
    torch.manual_seed(0)
    layer = FactorisedConv2d(2, 4, 3, inner, padding, bias).double()
    d = inner or 4
    assert layer.filter_shape == (d, 3, 3)
    x, filters, b = randn(*shape), randn(3, d, 3, 3), randn(3, 4)

    def literal(number, picture):
        return mixed(filtered(mixed(picture, layer.M), filters[number], padding), layer.M_prime)

    wanted = torch.stack([literal(number, picture) for number, picture in pictures(x)])
    y = layer(x, filters)
    assert y.shape == (*shape[:-3], *wanted.shape[1:])
    close(y.flatten(0, -4), wanted)
    shifted = torch.stack([w + b[n, :, None, None] for (n, _), w in zip(pictures(x), wanted, strict=True)])
    close(layer(x, filters, b).flatten(0, -4), shifted)
    close(layer.recombine(depthwise_conv2d(layer.project(x), filters, padding), b), layer(x, filters, b))


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 5, 4)])
@pytest.mark.parametrize(("inner", "bias"), [(None, True), (5, False)])
def test_factorised_dense_layer_is_the_formula(shape, inner, bias):
    torch.manual_seed(0)
    layer = FactorisedLinear(4, 3, inner, bias).double()
    d = inner or 4
    x, w, b = randn(*shape), randn(3, d), randn(3, 3)
    constant = layer.M_prime.bias if bias else torch.zeros(3, dtype=torch.float64)

    def literal(number, vector):
        y = constant.clone()
        for k in range(3):
            for i in range(d):
                for j in range(4):
                    y[k] += layer.M_prime.weight[k, i] * w[number, i] * layer.M.weight[i, j] * vector[j]
        return y

    vectors = [(n, vector) for n in range(3) for vector in x[n].reshape(-1, 4)]
    wanted = torch.stack([literal(n, vector) for n, vector in vectors])
    assert layer(x, w).shape == (*shape[:-1], 3)
    close(layer(x, w).reshape(-1, 3), wanted)
    shifted = torch.stack([y + b[n] for (n, _), y in zip(vectors, wanted, strict=True)])
    close(layer(x, w, b).reshape(-1, 3), shifted)
    assert layer.M.bias is None


def test_factorised_layers_have_the_right_gradients():
    torch.manual_seed(0)
    conv, dense = FactorisedConv2d(1, 2, 2).double(), FactorisedLinear(2, 3).double()
    for shape in ((2, 1, 3, 3), (2, 2, 1, 3, 3)):
        inputs = [randn(*shape), randn(2, 2, 2, 2), randn(2, 2)]
        assert torch.autograd.gradcheck(conv, [value.requires_grad_() for value in inputs])
    inputs = [randn(2, 2), randn(2, 2), randn(2, 3)]
    assert torch.autograd.gradcheck(dense, [value.requires_grad_() for value in inputs])


def test_how_much_is_predicted():
    layer = FactorisedConv2d(16, 64, 5)
    assert layer.predicted == 1600, "the paper's: 64 filters of 5x5, where the whole layer has 25,600"
    assert (layer.M.out_channels, layer.M_prime.in_channels) == (64, 64)
    assert sum(p.numel() for p in layer.parameters()) == 16 * 64 + 64 + 64 * 64 + 64
    assert FactorisedConv2d(16, 64, 5, inner_channels=16).predicted == 400
    dense = FactorisedLinear(100, 50)
    assert dense.predicted == 100
    assert sum(p.numel() for p in dense.parameters()) == 100 * 100 + 100 * 50 + 50
    assert FactorisedLinear(100, 50, 7, bias=False).predicted == 7


@pytest.mark.parametrize("spread", [0.1, 0.5])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(16, 1600, 4), lambda: nn.Linear(256, 1600)])
def test_predicted_filters_begin_as_large_as_learned_ones(make, spread):
    torch.manual_seed(0)
    last = make()
    initialise_as_filters(last, 5, spread)
    features = torch.randn(30, 16, 4, 4)
    filters = last(features if isinstance(last, nn.Conv2d) else features.flatten(1)).flatten(1)
    assert last.bias.std().item() == pytest.approx(1 / 5, rel=0.05)
    assert (filters - last.bias).std().item() == pytest.approx(spread / 5, rel=0.05)
    assert filter_variation(filters).item() == pytest.approx(spread**2 / (1 + spread**2), rel=0.15)


def test_variation_is_the_share_between_exemplars():
    filters = randn(5, 3, 2, 2)
    rows = filters.flatten(1).tolist()
    everything = [value for row in rows for value in row]
    between = 0
    for column in zip(*rows, strict=True):
        mean = sum(column) / 5
        between += sum((value - mean) ** 2 for value in column) / 5
    mean = sum(everything) / 60
    total = sum((value - mean) ** 2 for value in everything) / 60
    assert filter_variation(filters).item() == pytest.approx(between / 12 / total, rel=1e-12)


def test_a_collapsed_learnet_has_no_variation():
    one = randn(1, 4, 3, 3)
    assert filter_variation(one.expand(6, -1, -1, -1)).item() == pytest.approx(0, abs=1e-20)
    assert filter_variation(torch.zeros(6, 4, 3, 3)) == 0
    constants = randn(6, 1).expand(6, 9)  # filters are constant, so all variance is between exemplars
    assert filter_variation(constants).item() == pytest.approx(1)
    varied = one + 0.1 * randn(6, 4, 3, 3)
    assert 0 < filter_variation(varied).item() < 0.1
    assert filter_variation(varied.bfloat16().requires_grad_()).item() == pytest.approx(
        filter_variation(varied).item(), rel=0.05
    )
    assert filter_variation(varied.bfloat16()).dtype == torch.float32
