"""The inner problems: batches of B problems of n coordinates (Andrychowicz et al. 2016, section 3).

The three named tuples follow the protocol ``unroll.Problems``: they compute the losses of B problems in one call.
T is the number of inner steps, M the number of images in a minibatch.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_meta.learned_optimizers.features import Features, style_transfer_loss
from lightning_meta.running.segments import Segment


class Quadratics(NamedTuple):
    r"""Section 3.1: :math:`f(\theta) = \|W \theta - y\|_2^2`.

    >>> import torch
    >>> W, y, start = 2 * torch.eye(2)[None], torch.ones(1, 2), torch.zeros(1, 2)
    >>> Quadratics(W, y, start, None, Segment(0, 0, 100, True)).loss(start, t=0)
    tensor([2.])
    """

    W: Tensor  # (B, n, n)
    y: Tensor  # (B, n)
    start: Tensor  # (B, n)
    scale: Tensor | None
    segment: Segment

    @property
    def shapes(self) -> Sequence[Sequence[int]]:
        return [self.y.shape[1:]]

    def loss(self, theta: Tensor, t: int) -> Tensor:
        return ((self.W @ theta[..., None])[..., 0] - self.y).square().sum(-1)

    def select(self, which: Tensor) -> "Quadratics":
        scale = None if self.scale is None else self.scale[which]
        return Quadratics(self.W[which], self.y[which], self.start[which], scale, self.segment)


class Classification(NamedTuple):
    """Sections 3.2 and 3.3: cross-entropy of a small network on random minibatches, in nats.

    ``network`` gives the architecture; its own weights are not used.
    """

    network: nn.Module
    images: Tensor  # (N, C, H, W), uint8: all images of the split
    labels: Tensor  # (N,)
    indices: Tensor  # (B, T + 1, M): the minibatches of steps segment.start to segment.stop
    start: Tensor  # (B, n)
    scale: Tensor | None
    segment: Segment

    @property
    def shapes(self) -> Sequence[Sequence[int]]:
        return [parameter.shape for parameter in self.network.parameters()]

    def loss(self, theta: Tensor, t: int) -> Tensor:
        chosen = self.indices[:, t - self.segment.start]
        return vmap(self._loss)(theta, self.images[chosen].to(theta.dtype) / 255, self.labels[chosen].long())

    def _loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        named = list(self.network.named_parameters())
        parts = theta.split([parameter.numel() for _, parameter in named])
        weights = {name: part.view_as(p) for (name, p), part in zip(named, parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(self.network, weights, (images,)), labels)

    def select(self, which: Tensor) -> "Classification":
        scale = None if self.scale is None else self.scale[which]
        return self._replace(indices=self.indices[which], start=self.start[which], scale=scale)


class StyleTransfers(NamedTuple):
    """Section 3.4: neural style transfer; theta holds the pixels of the results, 0 to 1."""

    features: Features
    contents: Tensor  # (B, 3, H, W)
    style: Tensor  # (1, 3, H', W')
    content_targets: dict[str, Tensor]
    style_targets: dict[str, Tensor]
    start: Tensor  # (B, n), n = 3 * H * W
    scale: Tensor | None
    segment: Segment

    @property
    def shapes(self) -> Sequence[Sequence[int]]:
        return [self.contents.shape[1:]]

    def loss(self, theta: Tensor, t: int) -> Tensor:
        images = theta.view_as(self.contents)
        return style_transfer_loss(self.features, images, self.content_targets, self.style_targets)

    def select(self, which: Tensor) -> "StyleTransfers":
        return self._replace(
            contents=self.contents[which],
            content_targets={name: target[which] for name, target in self.content_targets.items()},
            start=self.start[which],
            scale=None if self.scale is None else self.scale[which],
        )


class MLP(nn.Sequential):
    """Section 3.2: a fully connected network; the paper's base network has one hidden layer of 20 sigmoid units.

    Args:
        inputs: Pixels of an image.
        hidden: Units of each hidden layer.
        classes: Number of outputs.
        activation: ``sigmoid`` or ``relu``.

    >>> sum(p.numel() for p in MLP(784, [20], 10, "sigmoid").parameters())
    15910
    """

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int, activation: str):
        sizes = [inputs, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, width in pairwise(sizes):
            layers += [nn.Linear(size, width), {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}[activation]()]
        super().__init__(*layers, nn.Linear(sizes[-1], classes))


class ConvNet(nn.Sequential):
    """Section 3.3: three 5x5 convolutions with pooling, a dense layer of 32, ReLU and batch norm throughout.

    Sizes and order are those of the authors' code: batch norm has a shift and no scale, and always uses the statistics
    of the minibatch.

    Args:
        size: Side of an image in pixels.
        channels: Channels of each convolution (authors' code: 16).
        classes: Number of outputs.

    >>> sum(p.numel() for p in ConvNet(32, 16, 10).parameters())
    22682
    """

    def __init__(self, size: int, channels: int, classes: int):
        layers: list[nn.Module] = []
        for inputs in (3, channels, channels):
            layers += [nn.Conv2d(inputs, channels, 5, padding=2), BatchNorm(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        dense = channels * math.ceil(size / 8) ** 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(dense, 32), BatchNorm(32), nn.ReLU(), nn.Linear(32, classes))


class BatchNorm(nn.Module):
    """Batch normalisation with a learned shift, no scale and no running statistics."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, None, self.shift, training=True)
