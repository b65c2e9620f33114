"""Layers whose filters come from outside, one set for every example (Bertinetto et al. 2016, section 2).

Shapes: B examples; d inner channels; f the side of a filter; n pictures that are seen with one example's filters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise_conv2d(x: Tensor, filters: Tensor, padding: int = 0) -> Tensor:
    """Filters channel by channel, every example with filters of its own: the paper's ``*_d``.

    One grouped convolution does it for all, the examples being groups.

    Args:
        x: (B, d, H, W), or (B, n, d, H, W).
        filters: (B, d, f, f).
        padding: Zeros around x (paper: none).

    Returns:
        (B, d, H', W') or (B, n, d, H', W') with H' = H - f + 1 + 2 * padding, W' likewise.
    """
    shape, filters = filters.shape[:2], filters.flatten(0, 1)
    if x.ndim == 4:
        return _Depthwise.apply(x.flatten(0, 1), filters, padding).unflatten(0, shape)
    x = x.transpose(0, 1).flatten(1, 2)  # (n, B * d, H, W)
    return F.conv2d(x, filters[:, None], padding=padding, groups=len(filters)).unflatten(1, shape).transpose(0, 1)


class _Depthwise(torch.autograd.Function):
    """A grouped convolution of (G, H, W) and (G, f, f) whose filters' gradient is one, too.

    On a CPU torch computes that gradient many times more slowly, unless there are many pictures.
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
    r"""A dense layer with predicted diagonal (section 2.1): :math:`y = M' \mathrm{diag}(w(z)) M x + b(z)`.

    Args:
        in_features: Of x.
        out_features: Of y.
        inner_features: d, what a learnet has to predict. None: as in the paper, ``in_features``.
        bias: Whether M' has a learned bias, for want of a predicted one.
    """

    def __init__(self, in_features: int, out_features: int, inner_features: int | None = None, bias: bool = True):
        super().__init__()
        self.predicted = inner_features or in_features
        self.M = nn.Linear(in_features, self.predicted, bias=False)
        self.M_prime = nn.Linear(self.predicted, out_features, bias=bias)

    def forward(self, x: Tensor, diagonal: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, ..., out_features) for x (B, ..., in_features).

        Args:
            x: Inputs.
            diagonal: w(z), (B, d).
            bias: b(z), (B, out_features).
        """
        y = self.M_prime(self.M(x) * _broadcast(diagonal, x))
        return y if bias is None else y + _broadcast(bias, x)


class FactorisedConv2d(nn.Module):
    r"""A convolution with predicted filters (section 2.2): :math:`y = M' * w(z) *_d M * x + b(z)`.

    M and M' are 1x1 convolutions, learned once for all examples; w(z) is written by another network.

    Args:
        in_channels: Of x.
        out_channels: Of y.
        kernel_size: f.
        inner_channels: d. None: ``out_channels``, as in the paper's networks (its formula has ``in_channels``).
        padding: Zeros around M * x.
        bias: Whether M and M' have learned biases.
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
        """(B, out_channels, H', W') for x (B, in_channels, H, W); n pictures an example likewise.

        Args:
            x: Inputs, (B, in_channels, H, W) or (B, n, in_channels, H, W).
            filters: w(z), (B, d, f, f).
            bias: b(z), (B, out_channels).
        """
        return self.recombine(depthwise_conv2d(self.project(x), filters, self.padding), bias)

    def project(self, x: Tensor) -> Tensor:
        """M * x: what does not depend on the exemplar, and is computed once where many look at one x."""
        return _fold(self.M, x)

    def recombine(self, filtered: Tensor, bias: Tensor | None = None) -> Tensor:
        """M' * x + b(z)."""
        y = _fold(self.M_prime, filtered)
        return y if bias is None else y + _broadcast(bias[..., None, None], y)


def begin_as_filters(last: nn.Conv2d | nn.Linear, kernel_size: int, spread: float = 0.1) -> None:
    """Starts a learnet's last layer so that it writes filters of the size that filters usually begin with.

    Its bias is one set of such filters, normal with variance 1 / f², the same for all exemplars; ``spread`` is how far
    the filters of an exemplar with unit features lie from it. A layer that is started as usual writes filters so small
    that nothing passes through them.

    Args:
        last: The layer, whose outputs are filters and nothing else.
        kernel_size: f.
        spread: Standard deviation relative to the bias.
    """
    nn.init.normal_(last.bias, std=1 / kernel_size)  # type: ignore[arg-type]  # torch allows none, this has one
    nn.init.normal_(last.weight, std=spread / kernel_size / last.weight[0].numel() ** 0.5)


def filter_variation(filters: Tensor) -> Tensor:
    """Variance between exemplars as a share of all variance of predicted filters (B, ...): 0 where all are the same.

    A learnet that has collapsed writes one set of filters whatever it sees; this is how that shows.
    """
    filters = filters.detach().flatten(1).to(torch.promote_types(filters.dtype, torch.float32))
    return filters.var(0, correction=0).mean() / filters.var(correction=0).clamp(min=torch.finfo(filters.dtype).tiny)


def _fold(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if x.ndim == 4 else layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _broadcast(value: Tensor, x: Tensor) -> Tensor:
    """(B, ...) with as many dimensions as x, the new ones after the first."""
    return value.reshape(len(value), *[1] * (x.ndim - value.ndim), *value.shape[1:])
