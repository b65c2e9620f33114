"""The operator behind dynamic_local_filter as Triton kernels. For the letters see ``local_filter.py``.

A program holds all taps of a part of a row of pixels in registers, (BLOCK, TAPS), so the forward pass reads the filters
once. The backward pass reads them twice, mostly from cache: for the gradient of the filters by output pixels, and for
the gradient of x by input pixels, where each pixel of x sums over all taps that read it in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_meta.dynamic_filters.ops.local_filter_native import strides

_LOG2E = tl.constexpr(1.4426950408889634)  # log2(e)
_LARGEST = 1024  # more taps do not fit in registers


@triton.jit
def _forward(
    x, filters, y, stats, planes, G, H, W, of_b, of_g, of_k, of_h, of_w,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(W, BLOCK)
    row = tl.program_id(0) // blocks
    plane, i = (row // H).to(tl.int64), row % H
    j = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[:, None]
    k = tl.arange(0, TAPS)[None, :]
    valid = (j < W) & (k < KH * KW)
    taps = filters + plane // G * of_b + plane % G * of_g + i * of_h + j * of_w + k * of_k
    e = tl.load(taps, valid, other=-float("inf") if SOFTMAX else 0.0).to(tl.float32)
    pixel = plane * H * W + i * W + j
    s = 1.0
    if SOFTMAX:
        minus_m = -_LOG2E * tl.max(e, 1, keep_dims=True)
        e = tl.exp2(e * _LOG2E + minus_m)
        s = tl.sum(e, 1, keep_dims=True)
        tl.store(stats + pixel, minus_m, j < W)
        tl.store(stats + planes * H * W + pixel, s, j < W)
    width = W + KW - 1
    for c in range(C):
        window = x + ((plane * C + c) * (H + KH - 1) + i + k // KW) * width + j + k % KW
        total = tl.sum(e * tl.load(window, valid, other=0.0).to(tl.float32), 1, keep_dims=True)
        tl.store(y + (plane * C + c) * H * W + i * W + j, total / s, j < W)


@triton.jit
def _backward(
    grad_y, x, filters, y, stats, grad_x, grad_filters, planes, G, H, W, of_b, of_g, of_k, of_h, of_w,
    to_b, to_g, to_k, to_h, to_w,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SOFTMAX: tl.constexpr,
    NEED_X: tl.constexpr, NEED_FILTERS: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    height, width = H + KH - 1, W + KW - 1
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    plane, i = (row // height).to(tl.int64), row % height
    j = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[:, None]
    k = tl.arange(0, TAPS)[None, :]
    filters += plane // G * of_b + plane % G * of_g + k * of_k
    sums = stats + planes * H * W
    nothing = -float("inf") if SOFTMAX else 0.0
    if NEED_FILTERS:  # for the pixel (i, j) of y
        inside = (i < H) & (j < W)
        valid = inside & (k < KH * KW)
        pixel = i * W + j
        e = tl.load(filters + i * of_h + j * of_w, valid, other=nothing).to(tl.float32)
        s = 1.0
        if SOFTMAX:
            e = tl.exp2(e * _LOG2E + tl.load(stats + plane * H * W + pixel, inside, other=0.0))
            s = tl.load(sums + plane * H * W + pixel, inside, other=1.0)
        gradient = tl.zeros((BLOCK, TAPS), tl.float32)
        for c in range(C):
            channel = (plane * C + c) * H * W + pixel
            to_y = tl.load(grad_y + channel, inside, other=0.0).to(tl.float32) / s
            window = tl.load(x + ((plane * C + c) * height + i + k // KW) * width + j + k % KW, valid, other=0.0)
            window = window.to(tl.float32)
            if SOFTMAX:
                window -= tl.load(y + channel, inside, other=0.0).to(tl.float32)
            gradient += to_y * window
        if SOFTMAX:
            gradient *= e
        target = grad_filters + plane // G * to_b + plane % G * to_g + i * to_h + j * to_w + k * to_k
        tl.store(target, gradient, valid)
    if NEED_X:  # for the pixel (i, j) of x: tap k of the output pixel k // KW above and k % KW to the left reads it
        above, left = i - k // KW, j - k % KW
        valid = (above >= 0) & (above < H) & (left >= 0) & (left < W) & (k < KH * KW)
        pixel = above * W + left
        p = tl.load(filters + above * of_h + left * of_w, valid, other=nothing).to(tl.float32)
        if SOFTMAX:
            p = tl.exp2(p * _LOG2E + tl.load(stats + plane * H * W + pixel, valid, other=0.0))
            p /= tl.load(sums + plane * H * W + pixel, valid, other=1.0)
        for c in range(C):
            to_y = tl.load(grad_y + (plane * C + c) * H * W + pixel, valid, other=0.0).to(tl.float32)
            total = tl.sum(p * to_y, 1, keep_dims=True)
            tl.store(grad_x + ((plane * C + c) * height + i) * width + j, total, j < width)


def serves(filters: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernels can compute with such filters and sums in ``dtype``."""
    known = strides(filters) and strides(torch.empty_like(filters, device="meta"))
    return known is not None and dtype == torch.float32 and filters.shape[2] * filters.shape[3] <= _LARGEST


def forward(x: Tensor, filters: Tensor, y: Tensor, stats: Tensor) -> None:
    """See ``local_filter_plain.forward``."""
    B, G, kh, kw, H, W = filters.shape
    block = _block(kh * kw)
    programs = B * G * H * triton.cdiv(W, block["BLOCK"])
    with torch.cuda.device_of(x):
        _forward[(programs,)](
            *(x.contiguous(), filters, y, stats, B * G, G, H, W, *strides(filters)),
            *(x.shape[2], kh, kw, stats.numel() > 0),
            **block,
        )


def backward(
    grad_y: Tensor,
    x: Tensor,
    filters: Tensor,
    y: Tensor,
    stats: Tensor,
    grad_x: Tensor | None,
    grad_filters: Tensor | None,
) -> None:
    """See ``local_filter_plain.backward``."""
    B, G, kh, kw, H, W = filters.shape
    block = _block(kh * kw)
    programs = B * G * x.shape[3] * triton.cdiv(x.shape[4], block["BLOCK"])
    with torch.cuda.device_of(x):
        _backward[(programs,)](
            *(grad_y.contiguous(), x.contiguous(), filters, y.contiguous(), stats.contiguous(), grad_x, grad_filters),
            *(B * G, G, H, W, *strides(filters)),
            *((0,) * 5 if grad_filters is None else strides(grad_filters)),
            *(x.shape[2], kh, kw, stats.numel() > 0, grad_x is not None, grad_filters is not None),
            **block,
        )


def _block(taps: int) -> dict[str, int]:
    """Return launch options: as many pixels per program as need about 32 registers per thread for their taps."""
    size = triton.next_power_of_2(taps)
    block = min(128, max(8, 4096 // size))
    return {"BLOCK": block, "TAPS": size, "num_warps": max(1, block * size // 1024)}
