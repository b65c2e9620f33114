"""Networks that classify images with generated kernels (Ha et al. 2016, sections 3.1, 4.1, 4.2 and A.1).

Each has a plain twin, which learns the same kernels directly. Shapes: B images; kernels (out, in, f, f).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.hypernetworks.layers import CoordinateNetwork, HyperConv2d, KernelGenerator
from lightning_meta.nn.batch_norm import BatchNorm2d


def generated_kernels(layers: Sequence[HyperConv2d]) -> list[Tensor]:
    """Generate the kernels of all layers that share a generator, with two matmuls instead of two per layer.

    Kernels are in float32 or better even under autocast, because L2 regularisation sums their squares.

    >>> from lightning_meta.hypernetworks import HyperConv2d, KernelGenerator
    >>> generator = KernelGenerator()
    >>> layers = [HyperConv2d(16, 16, generator), HyperConv2d(16, 32, generator)]
    >>> [tuple(kernel.shape) for kernel in generated_kernels(layers)]
    [(16, 16, 3, 3), (32, 16, 3, 3)]
    """
    z = torch.cat([layer.embeddings for layer in layers])
    with torch.autocast(z.device.type, enabled=False):
        tiles = layers[0].generator(z).split([len(layer.embeddings) for layer in layers])
    kernels = []
    for layer, own in zip(layers, tiles, strict=True):
        rows_first = own.unflatten(0, layer.grid).permute(1, 2, 0, 3, 4, 5)  # columns, out, rows, in, f, f
        kernels.append(rows_first.reshape(layer.out_channels, layer.in_channels, *own.shape[-2:]))
    return kernels


def convolve(x: Tensor, layer: nn.Conv2d | HyperConv2d, kernel: Tensor) -> Tensor:
    """Apply ``layer`` to x (B, in, H, W) with the given kernel."""
    return F.conv2d(x, kernel, layer.bias, layer.stride, layer.padding)


class ConvolutionalClassifier(nn.Module):
    """Base class of the two convolutional networks: a list of layers with learned or generated kernels."""

    shape: tuple[int, int, int]  # of an image
    shown: dict[str, int]  # name and index of each kernel that is drawn
    convolutions: Any  # an nn.ModuleList of nn.Conv2d and HyperConv2d

    def kernels(self) -> list[Tensor]:
        """Return the kernel (out, in, f, f) of every convolution in order, generated or learned."""
        hyper = [layer for layer in self.convolutions if isinstance(layer, HyperConv2d)]
        generated = iter(generated_kernels(hyper) if hyper else ())
        return [next(generated) if isinstance(layer, HyperConv2d) else layer.weight for layer in self.convolutions]


class DigitNetwork(ConvolutionalClassifier):
    """Network for MNIST: two 7x7 convolutions of 16 channels, each with ReLU and 2x2 pooling, and a linear layer.

    The second kernel is generated from one embedding: 4,244 parameters for 12,544 weights.

    Args:
        hyper: Generate the second kernel. False: learn it directly.
        classes: Number of classes.
        embedding_size: N_z.
        init: ``paper`` (the authors' code: small kernels; learned ones have standard deviation 0.01) or ``variance``
            (He et al. 2015).

    >>> import torch
    >>> logits, kernels = DigitNetwork()(torch.randn(2, 1, 28, 28))
    >>> logits.shape, kernels[1].shape
    (torch.Size([2, 10]), torch.Size([16, 16, 7, 7]))
    """

    shape = (1, 28, 28)
    shown = {"second_kernel": 1}  # noqa: RUF012 - never changed

    def __init__(
        self,
        hyper: bool = True,
        classes: int = 10,
        embedding_size: int = 4,
        init: Literal["variance", "paper"] = "variance",
    ):
        super().__init__()
        first = nn.Conv2d(1, 16, 7, padding=3)
        if hyper:
            second: nn.Module = HyperConv2d(16, 16, KernelGenerator(16, 16, 7, embedding_size, init), padding=3)
        else:
            second = nn.Conv2d(16, 16, 7, padding=3)
        self.convolutions = nn.ModuleList([first, second])
        self.last = nn.Linear(16 * 7 * 7, classes)
        _initialise(self.convolutions, init)
        nn.init.orthogonal_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits (B, classes) for images (B, 1, 28, 28), and the kernels."""
        kernels = self.kernels()
        for layer, kernel in zip(self.convolutions, kernels, strict=True):
            x = F.max_pool2d(torch.relu(convolve(x, layer, kernel)), 2)
        return self.last(x.flatten(1)), kernels


class WideResNet(ConvolutionalClassifier):
    """Wide residual network for CIFAR-10, 40-1 or 40-2 in the paper; all kernels except the first are generated.

    The paper does not say: shortcuts have no parameters (they take every other pixel and pad channels with zeros),
    every convolution has a bias, and a batch norm follows the first and the last convolution. This gives all four
    numbers of parameters that it prints.

    Args:
        hyper: Generate the kernels. False: learn them directly.
        depth: 6 N + 4, with N blocks of two convolutions in each of three stages.
        width: k; the stages have 16 k, 32 k and 64 k channels.
        classes: Number of classes.
        embedding_size: N_z.
        init: Initialisation of generator and embeddings, see ``KernelGenerator``. Learned kernels are initialised as in
            He et al. (2015).

    Raises:
        ValueError: If depth or width is not possible.

    >>> import torch
    >>> logits, kernels = WideResNet(depth=10)(torch.randn(2, 3, 32, 32))
    >>> logits.shape, len(kernels)
    (torch.Size([2, 10]), 7)
    """

    shape = (3, 32, 32)

    def __init__(
        self,
        hyper: bool = True,
        depth: int = 40,
        width: int = 1,
        classes: int = 10,
        embedding_size: int = 64,
        init: Literal["variance", "paper"] = "variance",
    ):
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"expected a depth of 10, 16, 22, ... (6 N + 4), got {depth}: choose one of these")
        if width < 1:
            raise ValueError(f"expected a width of at least 1, got {width}: choose a positive number")
        N = (depth - 4) // 6
        generator = KernelGenerator(embedding_size=embedding_size, init=init) if hyper else None
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 16, 3, padding=1)])
        self.norms = nn.ModuleList([BatchNorm2d(16)])  # after the first convolution, before the others, after the last
        channels = 16
        for stage in range(3):
            wide = 16 * 2**stage * width
            for i in range(2 * N):
                stride = 2 if stage and not i else 1
                if generator:
                    layer: nn.Module = HyperConv2d(channels, wide, generator, stride, padding=1)
                else:
                    layer = nn.Conv2d(channels, wide, 3, stride, padding=1)
                self.convolutions.append(layer)
                self.norms.append(BatchNorm2d(channels))
                channels = wide
        self.norms.append(BatchNorm2d(channels))
        self.last = nn.Linear(channels, classes)
        self.shown = {f"conv{stage + 2}": 2 * N * (stage + 1) for stage in range(3)}  # the last of each stage
        _initialise(self.convolutions, "variance")

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits (B, classes) for images (B, 3, 32, 32), and the kernels."""
        kernels = self.kernels()
        x = x.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        *norms, last_norm = self.norms
        (norm, layer, kernel), *layers = zip(norms, self.convolutions, kernels, strict=True)
        x = torch.relu(norm(convolve(x, layer, kernel)))
        for one, two in zip(layers[::2], layers[1::2], strict=True):
            y = x
            for norm, layer, kernel in (one, two):
                y = convolve(torch.relu(norm(y)), layer, kernel)
            stride = x.shape[-1] // y.shape[-1]
            x = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])) + y
        return self.last(torch.relu(last_norm(x)).mean((2, 3))), kernels


class FullyConnectedNetwork(nn.Module):
    """Network 784-256-10 whose first layer is generated from coordinates: 801 parameters for 200,704 weights.

    The paper does not say: the hidden units are ReLUs, and both layers have learned biases.

    Args:
        hyper: Generate the first layer's weights. False: learn them directly.
        classes: Number of classes.

    >>> import torch
    >>> logits, kernels = FullyConnectedNetwork()(torch.randn(2, 1, 28, 28))
    >>> logits.shape, kernels[0].shape
    (torch.Size([2, 10]), torch.Size([256, 1, 28, 28]))
    """

    shape = (1, 28, 28)
    shown = {"first_layer": 0}  # noqa: RUF012 - never changed

    def __init__(self, hyper: bool = True, classes: int = 10):
        super().__init__()
        self.generator = CoordinateNetwork() if hyper else None
        if not hyper:
            self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(256, 28 * 28)))
        self.bias = nn.Parameter(torch.zeros(256))
        self.last = nn.Linear(256, classes)

    def kernels(self) -> list[Tensor]:
        """Return the first layer's weights as filters (256, 1, 28, 28)."""
        with torch.autocast(self.bias.device.type, enabled=False):
            weight = self.weight if self.generator is None else self.generator()
        return [weight.unflatten(1, self.shape)]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits (B, classes) for images (B, 1, 28, 28), and the filters."""
        kernels = self.kernels()
        hidden = torch.relu(F.linear(x.flatten(1), kernels[0].flatten(1), self.bias))
        return self.last(hidden), kernels


def l2(kernels: Sequence[Tensor]) -> Tensor:
    """Return half the sum of all squares. Times 5e-4 it acts on learned kernels like a weight decay of 5e-4."""
    return torch.cat([kernel.flatten() for kernel in kernels]).square().sum() / 2


def _initialise(layers: nn.ModuleList, init: str) -> None:
    """Initialise the learned kernels and their biases."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            std = 0.01 if init == "paper" else math.sqrt(2 / layer.weight[0].numel())
            nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # never None here
