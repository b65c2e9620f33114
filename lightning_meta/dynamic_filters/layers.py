r"""The two dynamic filtering layers of De Brabandere et al. 2016, "Dynamic Filter Networks", section 3.2.

They hold no learned weights: another network writes the filters, for every sample (dynamic convolution) or for every
sample and pixel (dynamic local filtering). Both are cross-correlations (no flip), stride 1, output the size of the
input.

Letters: B samples, C channels, O output channels, H x W pixels, G groups, (Kh, Kw) an odd kernel with radii
rh = Kh // 2 and rw = Kw // 2. Taps run row-major: k = u * Kw + v is the pixel at dy_k = u - rh, dx_k = v - rw.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.dynamic_filters.ops.local_filter import local_filter

_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def dynamic_local_filter(
    x: Tensor,
    filters: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    softmax: bool = True,
    padding_mode: str = "zeros",
    groups: int = 1,
) -> Tensor:
    r"""Filter every pixel of an image with its own filter (De Brabandere et al. 2016, section 3.2).

    .. math:: y[b,c,i,j] = \sum_k p[b,k,i,j] \, x[b,c, i + dy_k, j + dx_k], \quad p = \mathrm{softmax}_k(f)

    Without ``softmax`` the taps are used as they are, :math:`p = f`. The probabilities never exist as a whole: memory
    grows like the filters, whatever the number of channels. Differentiable any number of times (beyond the first, the
    probabilities are formed).

    Differs from the paper: the filters are shared by the channels of a group; the paper also sums over channels.

    Args:
        x: images (B, C, H, W), any floating dtype. Stays in its dtype, under autocast too.
        filters: logits, or raw taps, (B, groups * Kh * Kw, H, W), contiguous or channels_last. May have another dtype
            than ``x``; sums are kept in float32 at least.
        kernel_size: odd, ``K`` or ``(Kh, Kw)``.
        softmax: normalise over the taps, so that each output pixel is a convex combination of its window.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: channels are cut into this many groups, each with taps of its own (``groups=C``: one filter a channel).

    Returns:
        (B, C, H, W) in the dtype of ``x``.

    Raises:
        ValueError: a shape, an even kernel, the padding mode or the number of groups does not fit.
    """
    kh, kw = _odd_pair(kernel_size)
    _check_image(x)
    B, C, H, W = x.shape
    if groups < 1 or C % groups:
        raise ValueError(f"expected groups to divide the {C} channels of x, got {groups}: choose a divisor of {C}")
    expected = (B, groups * kh * kw, H, W)
    if filters.shape != expected:
        raise ValueError(
            f"expected filters of shape {expected} (B, groups * {kh} * {kw} taps, H, W) for x {tuple(x.shape)}, got "
            f"{tuple(filters.shape)}: change the filters or kernel_size"
        )
    padded = _pad(x, kh, kw, padding_mode).unflatten(1, (groups, C // groups))
    y, _ = local_filter(padded, filters.unflatten(1, (groups, kh, kw)), softmax)
    return y.flatten(1, 2)


def dynamic_convolution(x: Tensor, filters: Tensor, padding_mode: str = "zeros", *, softmax: bool = False) -> Tensor:
    r"""Convolve every sample with its own filter bank (De Brabandere et al. 2016, section 3.2).

    .. math:: y[b,o,i,j] = \sum_{c,u,v} f[b,o,c,u,v] \, x[b,c, i + u - r_h, j + v - r_w]

    Args:
        x: images (B, C, H, W), any floating dtype. Stays in its dtype, under autocast too.
        filters: (B, O, C, Kh, Kw), odd Kh and Kw, any floating dtype.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        softmax: normalise each Kh x Kw kernel over its taps.

    Returns:
        (B, O, H, W) in the dtype of ``x``.

    Raises:
        ValueError: a shape, an even kernel or the padding mode does not fit.
    """
    _check_image(x)
    B, C, H, W = x.shape
    if filters.ndim != 5 or filters.shape[0] != B or filters.shape[2] != C:
        raise ValueError(
            f"expected filters of shape ({B}, O, {C}, Kh, Kw) for x {tuple(x.shape)}, got {tuple(filters.shape)}: "
            "give one filter bank per sample"
        )
    O = filters.shape[1]
    kh, kw = _odd_pair((filters.shape[3], filters.shape[4]))
    padded = _pad(x, kh, kw, padding_mode)
    with torch.autocast(x.device.type, enabled=False):  # conv2d would round x to bfloat16
        weight = filters.to(x.dtype)
        if softmax:
            weight = weight.flatten(3).softmax(-1)
        # B filter banks side by side are one convolution of B groups.
        y = F.conv2d(padded.reshape(1, B * C, *padded.shape[2:]), weight.reshape(B * O, C, kh, kw), groups=B)
    return y.view(B, O, H, W)


def expected_displacement(filters: Tensor, kernel_size: int | tuple[int, int], softmax: bool = True) -> Tensor:
    r"""Flow read off local filters: the centre of mass of each filter (De Brabandere et al. 2016, section 4).

    .. math:: (dx, dy)[b,i,j] = \sum_k p[b,k,i,j] \, (dx_k, dy_k)

    It says where each pixel comes *from*: positive dx means that the content was to the right and moved left.

    Args:
        filters: logits, or raw taps, (B, Kh * Kw, H, W).
        kernel_size: odd, ``K`` or ``(Kh, Kw)``.
        softmax: the filters are logits over the taps.

    Returns:
        (B, 2, H, W) in pixels, at least float32: channel 0 is dx, channel 1 is dy.

    Raises:
        ValueError: the kernel is even or the number of taps does not fit.
    """
    kh, kw = _odd_pair(kernel_size)
    if filters.ndim != 4 or filters.shape[1] != kh * kw:
        raise ValueError(
            f"expected filters of shape (B, {kh * kw}, H, W), got {tuple(filters.shape)}: change kernel_size, or pass "
            "one group at a time"
        )
    dtype = torch.promote_types(filters.dtype, torch.float32)
    p = filters.softmax(1, dtype=dtype) if softmax else filters.to(dtype)
    p = p.unflatten(1, (kh, kw))
    dy = torch.arange(kh, dtype=dtype, device=p.device) - kh // 2
    dx = torch.arange(kw, dtype=dtype, device=p.device) - kw // 2
    # Products and sums, not einsum: autocast would round a matrix product to bfloat16.
    return torch.stack([(p.sum(1) * dx[:, None, None]).sum(1), (p.sum(2) * dy[:, None, None]).sum(1)], 1)


class DynamicLocalFilter(nn.Module):
    """Dynamic local filtering layer: one filter per pixel, given with the input. No learned weights.

    See :func:`dynamic_local_filter` for equation, shapes and errors.

    Args:
        kernel_size: odd, ``K`` or ``(Kh, Kw)``.
        softmax: the filters are logits over the taps.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: number of channel groups with filters of their own.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        softmax: bool = True,
        padding_mode: str = "zeros",
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.kernel_size = _odd_pair(kernel_size)
        self.softmax = softmax
        self.padding_mode = _known_mode(padding_mode)
        self.groups = groups

    def forward(self, x: Tensor, filters: Tensor) -> Tensor:
        """Filter x (B, C, H, W) with filters (B, groups * Kh * Kw, H, W)."""
        return dynamic_local_filter(
            x,
            filters,
            self.kernel_size,
            softmax=self.softmax,
            padding_mode=self.padding_mode,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, softmax={self.softmax}, padding_mode={self.padding_mode!r}, "
            f"groups={self.groups}"
        )


class DynamicConv2d(nn.Module):
    """Dynamic convolution layer: one filter bank per sample, given with the input. No learned weights.

    See :func:`dynamic_convolution` for equation, shapes and errors.

    Args:
        kernel_size: odd, ``K`` or ``(Kh, Kw)``; the filters must have it.
        softmax: normalise each kernel over its taps.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        softmax: bool = False,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.kernel_size = _odd_pair(kernel_size)
        self.softmax = softmax
        self.padding_mode = _known_mode(padding_mode)

    def forward(self, x: Tensor, filters: Tensor) -> Tensor:
        """Convolve x (B, C, H, W) with filters (B, O, C, Kh, Kw)."""
        if filters.shape[3:] != self.kernel_size:
            raise ValueError(
                f"expected filters (B, O, C, {self.kernel_size[0]}, {self.kernel_size[1]}), got "
                f"{tuple(filters.shape)}: change the filters or kernel_size"
            )
        return dynamic_convolution(x, filters, self.padding_mode, softmax=self.softmax)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, softmax={self.softmax}, padding_mode={self.padding_mode!r}"


def _odd_pair(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(pair) != 2 or any(k < 1 or k % 2 == 0 for k in pair):
        raise ValueError(f"expected an odd kernel size K or (Kh, Kw), got {kernel_size}: use odd numbers, such as 9")
    return pair


def _known_mode(padding_mode: str) -> str:
    if padding_mode not in _PADDING_MODES:
        raise ValueError(
            f"expected padding_mode of {', '.join(_PADDING_MODES)}, got {padding_mode!r}: choose one of these"
        )
    return padding_mode


def _check_image(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"expected floating x of shape (B, C, H, W), got {x.dtype} {tuple(x.shape)}: reshape or convert x"
        )


def _pad(x: Tensor, kh: int, kw: int, padding_mode: str) -> Tensor:
    mode = _PADDING_MODES[_known_mode(padding_mode)]
    rh, rw = kh // 2, kw // 2
    H, W = x.shape[2:]
    largest = {"reflect": (H - 1, W - 1), "circular": (H, W)}.get(mode, (rh, rw))
    if rh > largest[0] or rw > largest[1]:
        raise ValueError(
            f"expected {mode} padding of at most {largest} pixels for a {H} x {W} image, got {(rh, rw)} from kernel "
            f"{(kh, kw)}: use a smaller kernel or padding_mode='zeros'"
        )
    return F.pad(x, (rw, rw, rh, rh), mode=mode)
