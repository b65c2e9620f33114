r"""The two dynamic filtering layers of De Brabandere et al. 2016, "Dynamic Filter Networks", section 3.2.

The layers have no learned weights: another network generates the filters, one filter bank per sample (dynamic
convolution) or one filter per sample and pixel (dynamic local filtering). Both layers compute cross-correlations (the
filters are not flipped) with stride 1, and the output has the size of the input.

Letters: B samples, C channels, O output channels, H x W pixels, G groups, (Kh, Kw) an odd kernel with radii
rh = Kh // 2 and rw = Kw // 2. Taps are in row-major order: tap k = u * Kw + v reads the pixel at offset dy_k = u - rh,
dx_k = v - rw.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.dynamic_filters.ops.local_filter import local_filter
from lightning_meta.nn.transforms import is_transformed

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

    With ``softmax=False`` the taps are used as given, :math:`p = f`.

    A custom operator computes this and its gradients of every order in reverse mode. It never stores all probabilities
    (only gradients of gradients need them), so its memory grows with the filters and not with channels times taps.
    Inside transforms of ``torch.func`` and in forward-mode differentiation :func:`eager_local_filter` runs instead.

    Differs from the paper: all channels of a group share a filter; the paper also sums over channels.

    Args:
        x: Images (B, C, H, W) of any floating dtype. Autocast does not change their dtype.
        filters: Logits (or taps, if ``softmax`` is False), (B, groups * Kh * Kw, H, W), contiguous or channels_last.
            Their dtype may differ from that of ``x``; sums are accumulated in float32 or better.
        kernel_size: Odd kernel size, ``K`` or ``(Kh, Kw)``.
        softmax: Normalise the filters over their taps, so that each output pixel is a convex combination of its window.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: Number of channel groups. Each has its own filters; ``groups=C`` gives each channel its own.

    Returns:
        Filtered images (B, C, H, W) in the dtype of ``x``.

    Raises:
        ValueError: If a shape, the kernel size, the padding mode or the number of groups is not valid.

    Example:
        A filter with all its weight on its last tap reads the pixel below and to the right:

        >>> import torch
        >>> from lightning_meta.dynamic_filters.layers import dynamic_local_filter
        >>> x = torch.arange(9.0).view(1, 1, 3, 3)
        >>> taps = torch.zeros(1, 9, 3, 3)
        >>> taps[:, 8] = 1
        >>> dynamic_local_filter(x, taps, kernel_size=3, softmax=False)[0, 0]
        tensor([[4., 5., 0.],
                [7., 8., 0.],
                [0., 0., 0.]])
    """
    if is_transformed():
        return eager_local_filter(x, filters, kernel_size, softmax=softmax, padding_mode=padding_mode, groups=groups)
    padded, f = _padded_and_grouped(x, filters, kernel_size, padding_mode, groups)
    y, _ = local_filter(padded, f, softmax)
    return y.flatten(1, 2)


def eager_local_filter(
    x: Tensor,
    filters: Tensor,
    kernel_size: int | tuple[int, int],
    *,
    softmax: bool = True,
    padding_mode: str = "zeros",
    groups: int = 1,
) -> Tensor:
    r"""Compute :func:`dynamic_local_filter` by its definition, one tap after another.

    .. math:: G(i, j) = F_\theta(i, j) * I(i, j)

    :math:`F_\theta(i, j)` is the filter of pixel (i, j) and :math:`I(i, j)` the window of the image around it. Plain
    PyTorch operations only: it runs on every device and can be differentiated in every mode, but it is slower and needs
    more memory. Arguments, result and errors are those of :func:`dynamic_local_filter`.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.layers import dynamic_local_filter, eager_local_filter
        >>> x, logits = torch.randn(2, 3, 8, 8), torch.randn(2, 25, 8, 8)
        >>> torch.allclose(eager_local_filter(x, logits, 5), dynamic_local_filter(x, logits, 5), atol=1e-5)
        True
    """
    padded, f = _padded_and_grouped(x, filters, kernel_size, padding_mode, groups)
    kh, kw, H, W = f.shape[2:]
    dtype = torch.promote_types(torch.promote_types(x.dtype, filters.dtype), torch.float32)
    p = f.flatten(2, 3)  # (B, G, Kh * Kw, H, W)
    p = p.softmax(2, dtype=dtype) if softmax else p.to(dtype)
    y = padded.new_zeros((), dtype=dtype)
    for k in range(kh * kw):
        u, v = divmod(k, kw)
        y = y + p[:, :, k, None] * padded[..., u : u + H, v : v + W]  # (B, G, C / G, H, W)
    return y.flatten(1, 2).to(x.dtype)


def _padded_and_grouped(
    x: Tensor, filters: Tensor, kernel_size: int | tuple[int, int], padding_mode: str, groups: int
) -> tuple[Tensor, Tensor]:
    """Check the arguments of local filtering and reshape the tensors as ``local_filter`` takes them."""
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
    return padded, filters.unflatten(1, (groups, kh, kw))


def dynamic_convolution(x: Tensor, filters: Tensor, padding_mode: str = "zeros", *, softmax: bool = False) -> Tensor:
    r"""Convolve every sample with its own filter bank (De Brabandere et al. 2016, section 3.2).

    .. math:: y[b,o,i,j] = \sum_{c,u,v} f[b,o,c,u,v] \, x[b,c, i + u - r_h, j + v - r_w]

    Args:
        x: Images (B, C, H, W) of any floating dtype. Autocast does not change their dtype.
        filters: Filter banks (B, O, C, Kh, Kw) with odd Kh and Kw, of any floating dtype.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        softmax: Normalise each Kh x Kw kernel over its taps.

    Returns:
        Convolved images (B, O, H, W) in the dtype of ``x``.

    Raises:
        ValueError: If a shape, the kernel size or the padding mode is not valid.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.layers import dynamic_convolution
        >>> dynamic_convolution(torch.randn(2, 3, 8, 8), torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 8, 8])
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
        # One convolution of B groups convolves B samples, side by side as B * C channels, with B filter banks.
        y = F.conv2d(padded.reshape(1, B * C, *padded.shape[2:]), weight.reshape(B * O, C, kh, kw), groups=B)
    return y.view(B, O, H, W)


def expected_displacement(filters: Tensor, kernel_size: int | tuple[int, int], softmax: bool = True) -> Tensor:
    r"""Return the optical flow that local filters imply: the centre of mass of each filter (section 4).

    .. math:: (dx, dy)[b,i,j] = \sum_k p[b,k,i,j] \, (dx_k, dy_k)

    The displacement points to where a pixel comes *from*: if dx is positive, the content was to the right and moved
    left.

    Args:
        filters: Logits (or taps, if ``softmax`` is False), (B, Kh * Kw, H, W).
        kernel_size: Odd kernel size, ``K`` or ``(Kh, Kw)``.
        softmax: Normalise the filters over their taps.

    Returns:
        Displacements (B, 2, H, W) in pixels, in float32 or better: channel 0 is dx, channel 1 is dy.

    Raises:
        ValueError: If the kernel size is even or the number of taps is not Kh * Kw.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.layers import expected_displacement
        >>> taps = torch.zeros(1, 9, 1, 1)
        >>> taps[:, 2] = 1  # the upper right tap
        >>> expected_displacement(taps, kernel_size=3, softmax=False).flatten()
        tensor([ 1., -1.])
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
    # Use products and sums instead of einsum, which autocast would compute in bfloat16.
    return torch.stack([(p.sum(1) * dx[:, None, None]).sum(1), (p.sum(2) * dy[:, None, None]).sum(1)], 1)


class DynamicLocalFilter(nn.Module):
    """Dynamic local filtering layer: filters every pixel with its own filter. It has no learned weights.

    See :func:`dynamic_local_filter` for the equation, shapes and errors.

    Args:
        kernel_size: Odd kernel size, ``K`` or ``(Kh, Kw)``.
        softmax: Normalise the filters over their taps.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: Number of channel groups; each has its own filters.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.layers import DynamicLocalFilter
        >>> DynamicLocalFilter(9)(torch.randn(2, 3, 16, 16), torch.randn(2, 81, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
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
    """Dynamic convolution layer: convolves every sample with its own filter bank. It has no learned weights.

    See :func:`dynamic_convolution` for the equation, shapes and errors.

    Args:
        kernel_size: Odd kernel size, ``K`` or ``(Kh, Kw)``, of the filters that ``forward`` takes.
        softmax: Normalise each kernel over its taps.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.layers import DynamicConv2d
        >>> DynamicConv2d(3)(torch.randn(2, 3, 8, 8), torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 8, 8])
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
