"""Layers whose filters another network predicts, one set for each example (Bertinetto et al. 2016, section 2).

Shapes: B examples; d inner channels; f the side of a filter; n images to which one example's filters are applied.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise_conv2d(x: Tensor, filters: Tensor, padding: int = 0) -> Tensor:
    """Convolve each channel of each example with its own filter: the paper's ``*_d`` (section 2.2).

    All examples together are one grouped convolution.

    Args:
        x: (B, d, H, W), or (B, n, d, H, W).
        filters: (B, d, f, f).
        padding: Number of zeros on each side of x (paper: none).

    Returns:
        (B, d, H', W') or (B, n, d, H', W') with H' = H - f + 1 + 2 * padding, W' likewise.

    >>> import torch
    >>> depthwise_conv2d(torch.ones(2, 4, 8, 8), torch.ones(2, 4, 3, 3)).shape
    torch.Size([2, 4, 6, 6])
    """
    shape, filters = filters.shape[:2], filters.flatten(0, 1)
    if x.ndim == 4:
        return _Depthwise.apply(x.flatten(0, 1), filters, padding).unflatten(0, shape)
    x = x.transpose(0, 1).flatten(1, 2)  # (n, B * d, H, W)
    return F.conv2d(x, filters[:, None], padding=padding, groups=len(filters)).unflatten(1, shape).transpose(0, 1)


class _Depthwise(torch.autograd.Function):
    """Grouped convolution of (G, H, W) with (G, f, f) that computes the filters' gradient as a convolution too.

    PyTorch computes that gradient many times more slowly on a CPU, unless there are many images.
    """

    @staticmethod
    def forward(x: Tensor, filters: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, filters[:, None].to(x.dtype), padding=padding, groups=len(filters))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, filters, ctx.padding = inputs
        ctx.save_for_backward(x, filters)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, filters = (saved.to(grad_output.dtype) for saved in ctx.saved_tensors)
        groups, padding = len(filters), ctx.padding
        grad_x = grad_filters = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv_transpose2d(grad_output, filters[:, None], padding=padding, groups=groups)
        if ctx.needs_input_grad[1]:  # the gradient of the output slides over x
            grad_filters = F.conv2d(x, grad_output[:, None], padding=padding, groups=groups)
        return grad_x, grad_filters, None


class FactorisedLinear(nn.Module):
    r"""Dense layer with a predicted diagonal (section 2.1): :math:`y = M' \mathrm{diag}(w(z)) M x + b(z)`.

    Args:
        in_features: Size of x.
        out_features: Size of y.
        inner_features: d, the number of weights to predict. None: ``in_features``, as in the paper.
        bias: Give M' a learned bias, for use without a predicted one.

    >>> import torch
    >>> layer = FactorisedLinear(8, 5)
    >>> layer(torch.randn(2, 8), diagonal=torch.randn(2, layer.predicted)).shape
    torch.Size([2, 5])
    """

    def __init__(self, in_features: int, out_features: int, inner_features: int | None = None, bias: bool = True):
        super().__init__()
        self.predicted = inner_features or in_features
        self.M = nn.Linear(in_features, self.predicted, bias=False)
        self.M_prime = nn.Linear(self.predicted, out_features, bias=bias)

    def forward(self, x: Tensor, diagonal: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y, (B, ..., out_features).

        Args:
            x: (B, ..., in_features).
            diagonal: w(z), (B, d).
            bias: b(z), (B, out_features).
        """
        y = self.M_prime(self.M(x) * _broadcast(diagonal, x))
        return y if bias is None else y + _broadcast(bias, x)


class FactorisedConv2d(nn.Module):
    r"""Convolution with predicted filters (section 2.2): :math:`y = M' * w(z) *_d M * x + b(z)`.

    M and M' are learned 1x1 convolutions, the same for all examples. Another network, the learnet, predicts w(z).

    Args:
        in_channels: Channels of x.
        out_channels: Channels of y.
        kernel_size: f.
        inner_channels: d. None: ``out_channels``, as in the paper's networks (its formula has ``in_channels``).
        padding: Number of zeros on each side of M * x.
        bias: Give M and M' learned biases.

    >>> import torch
    >>> layer = FactorisedConv2d(3, 16, kernel_size=5)
    >>> layer(torch.randn(2, 3, 28, 28), filters=torch.randn(2, *layer.filter_shape)).shape
    torch.Size([2, 16, 24, 24])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        inner_channels: int | None = None,
        padding: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        inner = inner_channels or out_channels
        self.padding = padding
        self.filter_shape = (inner, kernel_size, kernel_size)
        self.predicted = inner * kernel_size**2
        self.M = nn.Conv2d(in_channels, inner, 1, bias=bias)
        self.M_prime = nn.Conv2d(inner, out_channels, 1, bias=bias)

    def forward(self, x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y, (B, out_channels, H', W') or (B, n, out_channels, H', W').

        Args:
            x: (B, in_channels, H, W) or (B, n, in_channels, H, W).
            filters: w(z), (B, d, f, f).
            bias: b(z), (B, out_channels).
        """
        return self.recombine(depthwise_conv2d(self.project(x), filters, self.padding), bias)

    def project(self, x: Tensor) -> Tensor:
        """Return M * x. It does not depend on the exemplar, so several exemplars can share it."""
        return _fold(self.M, x)

    def recombine(self, filtered: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return M' * filtered + b(z)."""
        y = _fold(self.M_prime, filtered)
        return y if bias is None else y + _broadcast(bias[..., None, None], y)


def initialise_as_filters(last: nn.Conv2d | nn.Linear, kernel_size: int, spread: float = 0.1) -> None:
    """Initialise a learnet's last layer so that it predicts filters of standard deviation 1 / f.

    Its bias becomes one random set of such filters, common to all exemplars; the weights add small differences. The
    default initialisation of PyTorch predicts filters with 2 to 3.5 times this deviation behind batch normalisation,
    and with a third to an eighth of it without (measured on the networks of this package).

    Args:
        last: The layer. All of its outputs are filters.
        kernel_size: f.
        spread: Standard deviation of an exemplar's filters around the bias, relative to 1 / f, for inputs of mean
            square 1.
    """
    nn.init.normal_(last.bias, std=1 / kernel_size)  # type: ignore[arg-type]  # torch allows none, this has one
    nn.init.normal_(last.weight, std=spread / kernel_size / last.weight[0].numel() ** 0.5)


def filter_variation(filters: Tensor) -> Tensor:
    """Return the share of the variance of predicted filters (B, ...) that lies between exemplars.

    It is 0 if all exemplars get the same filters, that is, if the learnet ignores its input.

    >>> import torch
    >>> filter_variation(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    tensor(0.)
    """
    filters = filters.detach().flatten(1).to(torch.promote_types(filters.dtype, torch.float32))
    return filters.var(0, correction=0).mean() / filters.var(correction=0).clamp(min=torch.finfo(filters.dtype).tiny)


def _fold(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if x.ndim == 4 else layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _broadcast(value: Tensor, x: Tensor) -> Tensor:
    """Insert dimensions after the first until ``value`` (B, ...) has as many as x."""
    return value.reshape(len(value), *[1] * (x.ndim - value.ndim), *value.shape[1:])
