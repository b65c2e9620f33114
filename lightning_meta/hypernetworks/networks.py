"""Networks that classify pictures with kernels from a generator (Ha et al. 2016, sections 3.1, 4.1, 4.2 and A.1).

Each has a plain twin that learns the same kernels itself. Shapes: B pictures; kernels (out, in, f, f).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.hypernetworks.layers import CoordinateNetwork, HyperConv2d, KernelGenerator
from lightning_meta.nn.batch_norm import BatchNorm2d


def written_kernels(layers: Sequence[HyperConv2d]) -> list[Tensor]:
    """The kernels of all layers that share a generator: two matrix products in all, where ``weight`` takes two a layer.

    They are in float32 or better under autocast, too: they are what L2 falls on.
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
    """What ``layer`` does to x (B, in, H, W), with a kernel that is there already."""
    return F.conv2d(x, kernel, layer.bias, layer.stride, layer.padding)


class ConvolutionalClassifier(nn.Module):
    """What the two convolutional networks share: their layers in a row, and who makes the kernels."""

    shape: tuple[int, int, int]  # of a picture
    shown: dict[str, int]  # the kernels to look at, by name
    convolutions: Any  # an nn.ModuleList of nn.Conv2d and HyperConv2d

    def kernels(self) -> list[Tensor]:
        """The kernel (out, in, f, f) of every convolution, written or learned, from the first to the last."""
        hyper = [layer for layer in self.convolutions if isinstance(layer, HyperConv2d)]
        written = iter(written_kernels(hyper) if hyper else ())
        return [next(written) if isinstance(layer, HyperConv2d) else layer.weight for layer in self.convolutions]


class DigitNetwork(ConvolutionalClassifier):
    """MNIST's network: 7x7 convolutions 1 to 16 and 16 to 16, ReLU and 2x2 pooling after each, a linear layer.

    The second kernel is written from one embedding: 4,244 parameters for 12,544 weights.

    Args:
        hyper: False learns that kernel.
        classes: Outputs.
        embedding_size: N_z.
        init: ``paper``, the authors' code: small kernels, of standard deviation 0.01 where they are learned; or
            ``variance`` (He et al. 2015).
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
        _start(self.convolutions, init)
        nn.init.orthogonal_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, classes) of pictures (B, 1, 28, 28), and the kernels that were used."""
        kernels = self.kernels()
        for layer, kernel in zip(self.convolutions, kernels, strict=True):
            x = F.max_pool2d(torch.relu(convolve(x, layer, kernel)), 2)
        return self.last(x.flatten(1)), kernels


class WideResNet(ConvolutionalClassifier):
    """CIFAR-10's residual network, depth - width: 40-1 or 40-2 in the paper, all but the first kernel written.

    The paper does not say: shortcuts have no parameters (every other pixel, new channels zero), every convolution has a
    bias, and a norm follows the first and another the last. This gives all four numbers of parameters that it prints.

    Args:
        hyper: False learns the kernels.
        depth: 6 N + 4, with N blocks of two convolutions in each of three stages.
        width: k: the stages have 16 k, 32 k and 64 k channels.
        classes: Outputs.
        embedding_size: N_z.
        init: Of generator and embeddings, see ``KernelGenerator``; learned kernels start as He et al. 2015.

    Raises:
        ValueError: There is no such depth or width.
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
        _start(self.convolutions, "variance")

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, classes) of pictures (B, 3, 32, 32), and the kernels that were used."""
        kernels = self.kernels()
        x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU
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
    """784-256-10 with the first layer's weights from coordinates: 801 parameters for 200,704 weights.

    The paper does not say: the hidden units are ReLUs, and both layers have learned biases.

    Args:
        hyper: False learns the weights.
        classes: Outputs.
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
        """The first layer's weights, as filters (256, 1, 28, 28)."""
        with torch.autocast(self.bias.device.type, enabled=False):
            weight = self.weight if self.generator is None else self.generator()
        return [weight.unflatten(1, self.shape)]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, classes) of pictures (B, 1, 28, 28), and the filters that were used."""
        kernels = self.kernels()
        hidden = torch.relu(F.linear(x.flatten(1), kernels[0].flatten(1), self.bias))
        return self.last(hidden), kernels


def l2(kernels: Sequence[Tensor]) -> Tensor:
    """Half the sum of all squares: times 5e-4, what a weight decay of 5e-4 is to learned kernels."""
    return torch.cat([kernel.flatten() for kernel in kernels]).square().sum() / 2


def _start(layers: nn.ModuleList, init: str) -> None:
    """Starts the learned kernels and their biases."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            std = 0.01 if init == "paper" else math.sqrt(2 / layer.weight[0].numel())
            nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # torch allows none, these have one
