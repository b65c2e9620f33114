"""The networks whose kernels are written, against the paper's numbers and against their equations one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_meta.hypernetworks import HyperConv2d, KernelGenerator
from lightning_meta.hypernetworks.networks import (
    DigitNetwork,
    FullyConnectedNetwork,
    WideResNet,
    generated_kernels,
    l2,
)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def double(make, **options):
    """In float64, in evaluation, and with nothing left at a start that would hide it: biases and statistics."""
    torch.manual_seed(0)
    net = make(**options).double().eval()
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        if values.ndim == 1:
            (nn.init.uniform_ if name.endswith("running_var") else nn.init.normal_)(values, 0.5, 1.5)
    return net


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(
    ("width", "plain", "hyper"), [(1, 562_762, 96_602), (2, 2_235_530, 147_610)], ids=["40-1", "40-2"]
)
def test_residual_networks_have_as_many_parameters_as_the_paper_prints(width, plain, hyper):
    assert count(WideResNet(hyper=False, width=width)) == plain
    assert count(WideResNet(hyper=True, width=width)) == hyper


def test_the_other_networks_have_as_many_parameters_as_the_paper_prints():
    assert [count(DigitNetwork(hyper)) for hyper in (False, True)] == [21_210, 12_910]
    plain, hyper = (count(FullyConnectedNetwork(hyper)) for hyper in (False, True))
    assert hyper - 801 == plain - 200_704 == 256 + 2_570


def test_kernels_written_in_one_go_are_those_that_each_layer_writes(monkeypatch):
    generator = KernelGenerator(2, 3, embedding_size=4).double()
    nn.init.normal_(generator.second.bias)
    layers = [HyperConv2d(*size, generator).double() for size in ((2, 3), (4, 9), (6, 3), (2, 3))]
    wanted, calls = [layer.weight for layer in layers], []
    forward = KernelGenerator.forward
    monkeypatch.setattr(KernelGenerator, "forward", lambda self, z: calls.append(len(z)) or forward(self, z))
    for kernel, expected in zip(generated_kernels(layers), wanted, strict=True):
        torch.testing.assert_close(kernel, expected)
    assert calls == [1 + 6 + 3 + 1]


def test_a_forward_of_the_residual_network_asks_its_generator_once(monkeypatch):
    calls, forward = [], KernelGenerator.forward
    monkeypatch.setattr(KernelGenerator, "forward", lambda self, z: calls.append(len(z)) or forward(self, z))
    net = WideResNet(depth=40)
    net(torch.randn(2, 3, 32, 32))
    assert calls == [242]


def test_kernels_stay_in_float32_under_autocast():
    for net, x in ((DigitNetwork(), torch.randn(2, 1, 28, 28)), (FullyConnectedNetwork(), torch.randn(2, 1, 28, 28))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, kernels = net(x)
        assert {kernel.dtype for kernel in kernels} == {torch.float32}
        assert logits.dtype == torch.bfloat16


def norm(x, layer):
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    return (x - layer.running_mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]


def residual(net, x, N):
    """The residual network picture by picture, block by block, each kernel from the layer itself."""
    layers, norms = list(net.convolutions), list(net.norms)

    def convolution(x, layer, stride):
        return F.conv2d(x[None], layer.weight, layer.bias, stride, 1)[0]

    x = torch.relu(norm(convolution(x, layers.pop(0), 1), norms.pop(0)))
    for stage in range(3):
        for block in range(N):
            stride = 2 if stage and not block else 1
            y = convolution(torch.relu(norm(x, norms.pop(0))), layers.pop(0), stride)
            y = convolution(torch.relu(norm(y, norms.pop(0))), layers.pop(0), 1)
            shortcut = torch.zeros_like(y)
            shortcut[: len(x)] = x[:, ::stride, ::stride]
            x = shortcut + y
    x = torch.relu(norm(x, norms.pop(0)))
    assert not layers
    assert not norms
    assert x.shape[1:] == (8, 8)
    return net.last.weight @ x.flatten(1).mean(1) + net.last.bias


@pytest.mark.parametrize("hyper", [True, False])
@pytest.mark.parametrize(("depth", "width"), [(10, 2), (16, 1)])
def test_the_residual_network_block_by_block(hyper, depth, width):
    net, x = double(WideResNet, hyper=hyper, depth=depth, width=width, embedding_size=3), randn(2, 3, 32, 32)
    wanted = torch.stack([residual(net, picture, (depth - 4) // 6) for picture in x])
    torch.testing.assert_close(net(x)[0], wanted)
    shapes = [tuple(kernel.shape) for kernel in (net.kernels()[i] for i in net.shown.values())]
    assert shapes == [(w * width, w * width, 3, 3) for w in (16, 32, 64)]


@pytest.mark.parametrize("hyper", [True, False])
def test_the_network_for_digits_step_by_step(hyper):
    net, x = double(DigitNetwork, hyper=hyper), randn(3, 1, 28, 28)
    first, second = net.convolutions
    assert isinstance(second, HyperConv2d) == hyper
    y = F.max_pool2d(F.conv2d(F.pad(x, [3] * 4), first.weight, first.bias).clamp(min=0), 2)
    y = F.max_pool2d(F.conv2d(F.pad(y, [3] * 4), second.weight, second.bias).clamp(min=0), 2)
    torch.testing.assert_close(net(x)[0], y.reshape(3, 784) @ net.last.weight.T + net.last.bias)


@pytest.mark.parametrize("hyper", [True, False])
def test_the_fully_connected_network_step_by_step(hyper):
    net, x = double(FullyConnectedNetwork, hyper=hyper), randn(3, 1, 28, 28)
    weight = net.generator() if hyper else net.weight
    hidden = (x.view(3, 784) @ weight.T + net.bias).clamp(min=0)
    torch.testing.assert_close(net(x)[0], hidden @ net.last.weight.T + net.last.bias)
    assert torch.equal(net.kernels()[0].view(256, 784), weight)


@pytest.mark.parametrize("hyper", [True, False])
@pytest.mark.parametrize("make", [DigitNetwork, WideResNet, FullyConnectedNetwork])
def test_every_weight_gets_a_gradient(make, hyper):
    net = make(hyper, **({"depth": 10} if make is WideResNet else {}))
    logits, _ = net(torch.randn(4, *net.shape))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad.any() for name, p in net.named_parameters() if "convolutions" not in name or p.ndim > 1)


def test_l2_falls_on_the_kernels_that_are_written_and_on_those_that_are_learned():
    net = double(DigitNetwork)
    first, second = net.convolutions
    kernels = net.kernels()
    assert l2(kernels).item() == pytest.approx(
        (first.weight.square().sum() + second.weight.square().sum()).item() / 2, rel=1e-12
    )
    gradients = torch.autograd.grad(l2(kernels), kernels)
    for gradient, kernel in zip(gradients, kernels, strict=True):
        torch.testing.assert_close(gradient, kernel)  # what weight decay is to a kernel
    l2(net.kernels()).backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None}
    written = {f"generator.{layer}.{kind}" for layer in ("first", "second") for kind in ("weight", "bias")}
    assert touched == {"convolutions.0.weight", "convolutions.1.embeddings"} | {f"convolutions.1.{w}" for w in written}


def test_starts():
    torch.manual_seed(0)
    plain = DigitNetwork(hyper=False, init="paper")
    assert plain.convolutions[1].weight.std().item() == pytest.approx(0.0088, rel=0.05)  # 0.01, cut off at twice that
    assert DigitNetwork(init="paper").kernels()[1].std() < 0.002
    for hyper in (True, False):
        kernels = WideResNet(hyper).kernels()
        wanted = torch.tensor([(2 / kernel[0].numel()) ** 0.5 for kernel in kernels[1:]])
        found = torch.stack([kernel.std() for kernel in kernels[1:]])
        assert 0.7 < (found / wanted).mean() < 1.3


@pytest.mark.parametrize("depth", [4, 12, 41])
def test_depths_that_there_are_not(depth):
    with pytest.raises(ValueError, match=f"got {depth}: choose one of these"):
        WideResNet(depth=depth)
    with pytest.raises(ValueError, match="width of at least 1"):
        WideResNet(width=0)
