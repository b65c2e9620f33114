import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_meta.learned_optimizers.features import Features, targets
from lightning_meta.learned_optimizers.problems import (
    MLP,
    BatchNorm,
    Classification,
    ConvNet,
    Quadratics,
    StyleTransfers,
)
from lightning_meta.running.segments import Segment

WHICH = torch.tensor([False, True, True])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(network):
    return sum(p.numel() for p in network.parameters())


def classification(network, size, channels, start=0, stop=3):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, channels, size, size), generator=random, dtype=torch.uint8)
    labels = torch.randint(3, (20,), generator=random, dtype=torch.uint8)
    indices = torch.randint(20, (3, stop - start + 1, 6), generator=random)
    return Classification(
        network, images, labels, indices, 0.5 * randn(3, weights_of(network)), None, Segment(0, start, stop, True)
    )


def sliced(theta, *shapes):
    parts = theta.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def perceptron(theta, x, activation):
    """4-3-2-3."""
    W1, b1, W2, b2, W3, b3 = sliced(theta, (3, 4), (3,), (2, 3), (2,), (3, 2), (3,))
    x = activation(activation(x.flatten(1) @ W1.T + b1) @ W2.T + b2)
    return x @ W3.T + b3


def convolutional(theta, x):
    """Two channels of 10x10 pixels, halved to 5, 3 and 2."""
    first, other, dense = [(2, 3, 5, 5), (2,), (2,)], [(2, 2, 5, 5), (2,), (2,)], [(32, 8), (32,), (32,)]
    K1, b1, s1, K2, b2, s2, K3, b3, s3, W, b, s, V, c = sliced(theta, *first, *other, *other, *dense, (3, 32), (3,))

    def norm(x, shift):
        dims = [d for d in range(x.ndim) if d != 1]
        mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() + shift.view(1, -1, *[1] * (x.ndim - 2))

    for K, bias, shift in ((K1, b1, s1), (K2, b2, s2), (K3, b3, s3)):
        x = norm(F.conv2d(x, K, bias, padding=2), shift).clamp(min=0)
        odd = x.shape[-1] % 2
        x = F.pad(x, (0, odd, 0, odd), value=-math.inf)
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
    return norm(x.flatten(1) @ W.T + b, s).clamp(min=0) @ V.T + c


NETWORKS = {
    "sigmoid": (MLP(4, [3, 2], 3, "sigmoid"), 2, 1, lambda theta, x: perceptron(theta, x, torch.sigmoid)),
    "relu": (MLP(4, [3, 2], 3, "relu"), 2, 1, lambda theta, x: perceptron(theta, x, torch.relu)),
    "ConvNet": (ConvNet(10, 2, 3), 10, 3, convolutional),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_classification_is_one_network_after_another(name):
    network, size, channels, forward = NETWORKS[name]
    problems = classification(network, size, channels, start=20, stop=23)
    for t in (20, 22, 23):
        got = problems.loss(problems.start, t)
        assert got.shape == (3,)
        for b in range(3):
            chosen = problems.indices[b, t - 20]
            logits = forward(problems.start[b], problems.images[chosen].double() / 255)
            right = [logits[i].log_softmax(0)[int(problems.labels[k])] for i, k in enumerate(chosen.tolist())]
            torch.testing.assert_close(got[b], -sum(right) / 6, rtol=1e-9, atol=1e-12)


def test_any_module_works_unchanged():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    problems = classification(network, 2, 1)
    W, b = sliced(problems.start[1], (3, 4), (3,))
    chosen = problems.indices[1, 0]
    logits = problems.images[chosen].double().flatten(1) / 255 @ W.T + b
    torch.testing.assert_close(
        problems.loss(problems.start, 0)[1], F.cross_entropy(logits, problems.labels[chosen].long())
    )


def test_at_zero_all_classes_are_equally_likely():
    problems = classification(MLP(4, [3], 3, "sigmoid"), 2, 1)
    assert problems.loss(0 * problems.start, 0).tolist() == pytest.approx([math.log(3)] * 3)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (ConvNet(32, 16, 10), 22_682),
        (MLP(784, [20], 10, "sigmoid"), 15_910),
        (MLP(784, [40], 10, "sigmoid"), 31_810),
        (MLP(784, [20, 20], 10, "relu"), 16_330),
    ],
)
def test_networks_have_the_papers_numbers_of_parameters(network, count):
    assert weights_of(network) == count


def test_batch_norm_takes_the_minibatchs_statistics_and_keeps_none():
    norm = BatchNorm(2)
    nn.init.constant_(norm.shift, 3)
    for seed, shape in ((0, (7, 2)), (1, (5, 2, 4, 4))):
        for _ in range(2):
            y = norm.eval()(100 + 20 * randn(*shape, seed=seed).float())
            dims = [d for d in range(len(shape)) if d != 1]
            torch.testing.assert_close(y.mean(dims), torch.tensor([3.0, 3]), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(y.var(dims, correction=0), torch.ones(2), rtol=1e-3, atol=1e-3)
    assert not list(norm.buffers())
    assert [name for name, _ in norm.named_parameters()] == ["shift"]


def quadratics():
    scale = randn(3, 4, seed=4).exp()
    return Quadratics(randn(3, 4, 4, seed=1), randn(3, 4, seed=2), randn(3, 4, seed=3), scale, Segment(0, 0, 3, True))


def test_quadratics_by_numbers():
    problems = quadratics()
    got = problems.loss(problems.start, 0)
    for b in range(3):
        W, y, theta = problems.W[b].tolist(), problems.y[b].tolist(), problems.start[b].tolist()
        wanted = sum((sum(W[i][j] * theta[j] for j in range(4)) - y[i]) ** 2 for i in range(4))
        assert got[b].item() == pytest.approx(wanted, rel=1e-12)


def style_transfers():
    features = Features("squeezenet1_1").double()
    contents, style = randn(3, 3, 32, 32).sigmoid(), randn(1, 3, 40, 40).sigmoid()
    return StyleTransfers(
        features,
        contents,
        style,
        *targets(features, contents, style),
        contents.flatten(1) + 0.1 * randn(3, 3 * 32 * 32),
        None,
        Segment(0, 0, 3, True),
    )


def some():
    return classification(ConvNet(8, 2, 3), 8, 3)


@pytest.mark.parametrize("make", [quadratics, some, style_transfers])
def test_selected_problems_are_the_same_problems(make):
    problems = make()
    part = problems.select(WHICH)
    assert torch.equal(part.start, problems.start[WHICH])
    assert part.shapes == problems.shapes
    assert part.segment == problems.segment
    torch.testing.assert_close(part.loss(part.start, 1), problems.loss(problems.start, 1)[WHICH])
    assert (part.scale is None) == (problems.scale is None)
    scaled = problems._replace(scale=randn(*problems.start.shape)).select(WHICH).scale
    assert torch.equal(scaled, randn(*problems.start.shape)[WHICH])


@pytest.mark.parametrize("make", [quadratics, some, style_transfers])
def test_shapes_add_up_and_problems_do_not_touch(make):
    problems = make()
    assert sum(math.prod(shape) for shape in problems.shapes) == problems.start.shape[1]
    losses = problems.loss(problems.start, 0)
    moved = problems.start.index_add(0, torch.tensor([1]), 0.1 * torch.ones_like(problems.start[:1]))
    assert (problems.loss(moved, 0) != losses).tolist() == [False, True, False]
