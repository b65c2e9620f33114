"""Building blocks of the filter-generating networks (De Brabandere et al. 2016, section 4, and the authors' code).

Shapes: B samples, C channels, H x W pixels, (Kh, Kw) the generated filters.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_meta.dynamic_filters.layers import dynamic_local_filter


class Convolution(NamedTuple):
    """Options of a 3x3 convolution, which a leaky ReLU of slope 0.01 follows."""

    channels: int
    stride: int = 1
    untied: tuple[int, int] | None = None  # (H, W) of the output, if each channel and pixel has its own bias


class UntiedBias(nn.Module):
    """Adds a bias of its own to every channel and pixel: (C, H, W), so all images must have this size."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, height, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add the biases to images (B, C, H, W).

        Raises:
            ValueError: If the images have another size.
        """
        if x.shape[1:] != self.bias.shape:
            raise ValueError(
                f"expected images of shape {tuple(self.bias.shape)} for untied biases, got {tuple(x.shape[1:])}: scale "
                "the images, or turn untied biases off"
            )
        return x + self.bias


class FilteredImage(nn.Module):
    """Makes the new image: filters the old one, or, in the baseline, convolves the generated planes.

    Args:
        kernel_size: ``(Kh, Kw)``, both odd.
        dynamic: False gives the paper's baseline of equal size: a 1x1 convolution turns the planes into the image.
        dynamic_bias: Add the last plane to the image before filtering, which allows for changes of light.
    """

    def __init__(self, kernel_size: tuple[int, int], dynamic: bool = True, dynamic_bias: bool = False):
        super().__init__()
        self.kernel_size, self.dynamic, self.dynamic_bias = kernel_size, dynamic, dynamic_bias
        self.taps = kernel_size[0] * kernel_size[1]
        self.planes = self.taps + dynamic_bias
        self.convolution = nn.Identity() if dynamic else nn.Conv2d(self.planes, 1, 1)

    def forward(self, image: Tensor, planes: Tensor) -> Tensor:
        """Return the new image (B, 1, H, W) for the old one and planes (B, Kh * Kw [+ 1], H, W): logits [and bias]."""
        if not self.dynamic:
            return self.convolution(planes)
        filters, biases = planes[:, : self.taps], planes[:, self.taps :]
        return dynamic_local_filter(image + biases if self.dynamic_bias else image, filters, self.kernel_size)


def convolutions(channels: int, *layers: Convolution) -> nn.Sequential:
    """Return a sequence of 3x3 convolutions, each with its leaky ReLU."""
    modules: list[nn.Module] = []
    for layer in layers:
        tied = layer.untied is None
        modules.append(nn.Conv2d(channels, layer.channels, 3, layer.stride, padding=1, bias=tied))
        modules += [] if tied else [UntiedBias(layer.channels, *layer.untied)]
        modules.append(nn.LeakyReLU(0.01))
        channels = layer.channels
    return nn.Sequential(*modules)


def decoder(channels: int, before: list[int], after: list[int], hidden: int, planes: int) -> nn.Sequential:
    """Return a decoder from a code (B, channels, H / 2, W / 2) to planes (B, planes, H, W).

    Args:
        channels: Channels of the code.
        before: Channels of the 3x3 convolutions before the upsampling.
        after: Channels of those after it.
        hidden: Channels of the first of two 1x1 convolutions at the end; the last one is linear.
        planes: Channels of the output.
    """
    return nn.Sequential(
        convolutions(channels, *map(Convolution, before)),
        nn.Upsample(scale_factor=2),
        convolutions(before[-1], *map(Convolution, after)),
        nn.Conv2d(after[-1], hidden, 1),
        nn.LeakyReLU(0.01),
        nn.Conv2d(hidden, planes, 1),
    )


def initialise(network: nn.Module, gain: float = 1.0) -> None:
    """Draw weights uniformly within gain * sqrt(3 / fan-in) and set biases to zero. The paper uses a gain of 1."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
            module.weight.data *= gain
            if module.bias is not None:
                nn.init.zeros_(module.bias)
