r"""The two dynamic filtering layers of De Brabandere et al. 2016, "Dynamic Filter Networks", section 3.2.

They hold no learned weights: another network writes the filters, for every sample (dynamic convolution) or for every
sample and pixel (dynamic local filtering). Both are cross-correlations (no flip), stride 1, output the size of the
input.

Letters: B samples, C channels, O output channels, H x W pixels, G groups, (Kh, Kw) an odd kernel with radii
rh = Kh // 2 and rw = Kw // 2. Taps run row-major: k = u * Kw + v is the pixel at dy_k = u - rh, dx_k = v - rw.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    y, _ = _local_filter(padded, filters.unflatten(1, (groups, kh, kw)), softmax)
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
    kh, kw = _odd_pair(tuple(filters.shape[3:]))
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


# The operator behind dynamic_local_filter, and its gradients, one tile of filters at a time.
#
# A tile is some samples x groups x all taps x some rows: small enough to stay in cache while several cheap elementwise
# passes run over it, large enough that the cost of calling them disappears. From here on, shapes are
# x (B, G, C, H+2rh, W+2rw), filters (B, G, Kh, Kw, H, W), y (B, G, C, H, W), with C channels in each of G groups.
#
# Softmax as in flash attention: e_k = exp(f_k - m), m = max_k f_k, s = sum_k e_k, p_k = e_k / s. Only m and s are kept
# for the backward pass, which forms e again. Powers of two: torch.exp2 takes a third of torch.exp's time on CPU.

_LOG2E = 1.4426950408889634  # log2(e)


@torch.library.custom_op("lightning_meta::local_filter", mutates_args=())
def _local_filter(x: Tensor, filters: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Return y and, with softmax, stats (2, B, G, H, W): -m * log2(e) and s."""
    y, stats = _new_outputs(x, filters, softmax)
    dtype = _sum_dtype(x, filters)
    windows = _windows(x.to(dtype), filters)
    e_scratch, product_scratch, _ = _scratch(filters, dtype)
    for n, g, rows in _tiles(filters):
        e = _taps(filters[n, g, ..., rows, :], e_scratch)
        window, y_tile = windows[n, g, ..., rows, :], y[n, g, :, rows]
        product = _part(product_scratch, e)
        if softmax:
            minus_m, s = stats[:, n, g, rows]
            torch.mul(e.amax((2, 3)), -_LOG2E, out=minus_m)
            e = _exp(e, minus_m, e_scratch)
            torch.sum(e, (2, 3), out=s)
        sums = [torch.mul(e, window[:, :, c], out=product).sum((2, 3)) for c in range(x.shape[2])]
        y_sum = torch.stack(sums, 2)
        y_tile.copy_(y_sum / s.unsqueeze(2) if softmax else y_sum)
    return y, stats


@torch.library.custom_op("lightning_meta::local_filter_backward", mutates_args=())
def _local_filter_backward(
    grad_y: Tensor,
    x: Tensor,
    filters: Tensor,
    y: Tensor,
    stats: Tensor,
    softmax: bool,
    need_x: bool,
    need_filters: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the filters; one that is not needed is empty.

    With x_c(k) the image shifted by tap k:
        grad_f_k = p_k (sum_c grad_y_c x_c(k) - sum_c grad_y_c y_c)        raw taps: sum_c grad_y_c x_c(k)
        grad_x_c[i + u, j + v] += p_k[i, j] grad_y_c[i, j]                  raw taps: f_k for p_k
    The 1 / s of p_k = e_k / s goes with grad_y, a plane per channel instead of one per tap.
    """
    dtype = _sum_dtype(x, filters)
    grad_x, grad_filters = _new_gradients(x.to(dtype), filters, need_x, need_filters)
    grad_x.zero_()
    windows = _windows(x.to(dtype), filters)
    e_scratch, product_scratch, row_scratch = _scratch(filters, dtype)
    for n, g, rows in _tiles(filters):
        e = _taps(filters[n, g, ..., rows, :], e_scratch)
        grad = grad_y[n, g, :, rows].to(dtype)
        product = _part(product_scratch, e)
        centre = torch.zeros((), dtype=dtype, device=x.device)
        if softmax:
            minus_m, s = stats[:, n, g, rows]
            e = _exp(e, minus_m, e_scratch)
            grad = grad / s.unsqueeze(2)
            centre = (grad * y[n, g, :, rows]).sum(2).neg_()[:, :, None, None]
        grads = grad[:, :, :, None, None].unbind(2)  # one per channel, (n, g, 1, 1, h, W)
        if need_filters:
            window, out = windows[n, g, ..., rows, :], grad_filters[n, g, ..., rows, :]
            t = out if _is_plain(out, dtype) else product
            for c, grad_c in enumerate(grads):
                torch.addcmul(t if c else centre, window[:, :, c], grad_c, out=t)
            if softmax:
                t.mul_(e)
            if t is not out:
                out.copy_(t)
        if need_x:
            for c, grad_c in enumerate(grads):
                torch.mul(e, grad_c, out=product)
                kh, h = e.shape[2], e.shape[4]
                # Zeros follow each row and each plane of rows. So with the stride over v one element short, tap v is
                # read v pixels to the right, and with the stride over u one row short, u rows further down.
                taps = product_scratch[: e.shape[0], : e.shape[1], ..., :h, :]
                by_row = row_scratch[: e.shape[0], : e.shape[1], :, : h + kh - 1]
                by_row[..., h:, :] = 0
                torch.sum(_skewed(taps, 3, 1), 3, out=by_row[..., :h, :])
                grad_x[n, g, c, rows.start : rows.stop + kh - 1] += _skewed(by_row, 2, x.shape[-1]).sum(2)
    return grad_x.to(x.dtype), grad_filters


def _skewed(t: Tensor, dim: int, by: int) -> Tensor:
    """View of t in which a step along dim is shorter by some elements."""
    stride = list(t.stride())
    stride[dim] -= by
    return t.as_strided(t.shape, stride, t.storage_offset())


def _taps(tile: Tensor, scratch: Tensor) -> Tensor:
    """The filters of one tile as planes of the dtype that sums are kept in; copied only where they are not."""
    return tile if _is_plain(tile, scratch.dtype) else _part(scratch, tile).copy_(tile)


def _exp(f: Tensor, minus_m: Tensor, scratch: Tensor) -> Tensor:
    return torch.add(minus_m[:, :, None, None], f, alpha=_LOG2E, out=_part(scratch, f)).exp2_()


def _is_plain(tile: Tensor, dtype: torch.dtype) -> bool:
    return tile.dtype == dtype and tile.stride()[-2:] == (tile.shape[-1], 1)


def _sum_dtype(x: Tensor, filters: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, filters.dtype), torch.float32)


def _windows(x: Tensor, filters: Tensor) -> Tensor:
    """View of x as (B, G, C, Kh, Kw, H, W): tap (u, v) of every pixel. Costs no memory."""
    H, W = filters.shape[-2:]
    return x.contiguous().unfold(3, H, 1).unfold(4, W, 1)


def _tiles(filters: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cut (B, G, Kh, Kw, H, W) into slices of samples, groups and rows, the largest first."""
    B, G, kh, kw, H, W = filters.shape
    budget = 350_000 if filters.device.type == "cpu" else 2**19  # elements: stays in cache; on CUDA, fewer launches
    blocks = min(H, -(-H * W * kh * kw // budget))
    h = -(-H // blocks)  # blocks of equal height
    g = min(G, max(1, budget // (kh * kw * W * H)))
    n = min(B, max(1, budget // (kh * kw * W * H * G)))
    for b in range(0, B, n):
        for group in range(0, G, g):
            for row in range(0, H, h):
                yield slice(b, min(b + n, B)), slice(group, min(group + g, G)), slice(row, min(row + h, H))


def _scratch(filters: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for any tile, used again and again: fresh memory would cost more than the sums."""
    n, g, rows = next(_tiles(filters))
    n, g, kh, kw, h, W = filters[n, g, ..., rows, :].shape
    # 16 elements more than a plane: planes 2^n apart would share cache sets, and transposing them took 5x longer.
    e = filters.new_empty((n, g, kh, kw, h * W + 16), dtype=dtype)[..., : h * W].unflatten(-1, (h, W))
    product = filters.new_empty((n, g, kh, kw, h, W + kw - 1), dtype=dtype)
    product[..., W:] = 0
    rows = filters.new_empty((n, g, kh, h + kh - 1, W + kw - 1), dtype=dtype)
    return e, product, rows


def _part(scratch: Tensor, tile: Tensor) -> Tensor:
    n, g, _, _, h, W = tile.shape
    return scratch[:n, :g, ..., :h, :W]


def _new_outputs(x: Tensor, filters: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    B, G, _, _, H, W = filters.shape
    y = x.new_empty((B, G, x.shape[2], H, W))
    return y, x.new_empty((2, B, G, H, W) if softmax else (0,), dtype=_sum_dtype(x, filters))


def _new_gradients(x: Tensor, filters: Tensor, need_x: bool, need_filters: bool) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else (0,))
    return grad_x, torch.empty_like(filters) if need_filters else filters.new_empty(0)


_local_filter.register_fake(_new_outputs)
_local_filter_backward.register_fake(
    lambda grad_y, x, filters, y, stats, softmax, need_x, need_filters: _new_gradients(x, filters, need_x, need_filters)
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, filters, ctx.softmax = inputs
    y, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(x, filters, y, stats)


def _gradients(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    found = _local_filter_backward(grad_y, *ctx.saved_tensors, ctx.softmax, *needs)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None


_local_filter.register_autograd(_gradients, setup_context=_keep)


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_y, x, filters, _, _, ctx.softmax, *ctx.needs = inputs
    ctx.save_for_backward(grad_y, x, filters)


def _second_gradients(ctx: Any, v_x: Tensor, v_f: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of <v_x, grad_x> + <v_f, grad_f>, from operators that can be differentiated again.

    That sum is <grad_y, F(v_x, p) + F(x, dp)> with F the filter with raw taps and dp = p (v_f - sum_k p_k v_f_k), the
    change of the probabilities p when the logits change by v_f (raw taps: p = f, dp = v_f). F is linear in each input.
    """
    grad_y, x, filters = ctx.saved_tensors
    v_x = v_x if ctx.needs[0] else torch.zeros_like(x)
    v_f = v_f if ctx.needs[1] else torch.zeros_like(filters)
    p, dp = filters, v_f
    if ctx.softmax:
        p = filters.flatten(2, 3).softmax(2, dtype=_sum_dtype(x, filters)).view_as(filters)
        mean_v = (p * v_f).sum((2, 3), keepdim=True)
        dp = p * (v_f - mean_v)

    def gradients(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        return _local_filter_backward(grad_y, x, taps, grad_y, grad_y.new_empty(0), False, True, True)

    g_x, g_dp = gradients(x, dp)
    _, g_f = gradients(v_x, p)
    if ctx.softmax:
        g_p = g_f + g_dp * (v_f - mean_v) - v_f * (g_dp * p).sum((2, 3), keepdim=True)
        g_f = (p * (g_p - (p * g_p).sum((2, 3), keepdim=True))).to(filters.dtype)
    g_y = _local_filter(v_x, p, False)[0] + _local_filter(x, dp, False)[0]
    return g_y, g_x, g_f, None, None, None, None, None


_local_filter_backward.register_autograd(_second_gradients, setup_context=_keep_for_second)
