r"""The operator behind dynamic_local_filter, and its gradients.

Letters: B samples, G groups of C channels each, H x W pixels, (Kh, Kw) an odd kernel with radii rh and rw. Shapes:
x (B, G, C, H + 2rh, W + 2rw), padded; filters (B, G, Kh, Kw, H, W); y (B, G, C, H, W).

Softmax as in flash attention: e_k = exp(f_k - m), m = max_k f_k, s = sum_k e_k, p_k = e_k / s. The forward pass saves
only m and s, and the backward pass recomputes e from them. They are saved as stats (2, B, G, H, W): -m * log2(e) and s,
in the dtype of the sums; stats is empty without softmax.

Let x_c(k) be the image shifted by tap k. The gradients are
    grad_f_k = p_k (sum_c grad_y_c x_c(k) - sum_c grad_y_c y_c)        without softmax: sum_c grad_y_c x_c(k)
    grad_x_c[i + u, j + v] += p_k[i, j] grad_y_c[i, j]                  without softmax: f_k instead of p_k

There are three implementations, each with ``forward`` and ``backward``: Triton kernels for GPUs, C++ for large tensors
on a CPU if there is a compiler, and PyTorch for all else.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_meta.dynamic_filters.ops import local_filter_native, local_filter_plain

WORTH_BUILDING = 2**20  # compile the C++ implementation from this many filter elements on


@torch.library.custom_op("lightning_meta::local_filter", mutates_args=())
def local_filter(x: Tensor, filters: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Return y and stats."""
    y, stats = _new_outputs(x, filters, softmax)
    if y.numel():
        _implementation(x, filters).forward(x, filters, y, stats)
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
    """Return the gradients of x and filters; a gradient that is not needed is empty."""
    grad_x, grad_filters = _new_gradients(x, filters, need_x, need_filters)
    if not softmax:
        stats = x.new_empty(0, dtype=_sum_dtype(x, filters))
    needed = grad_x if need_x else None, grad_filters if need_filters else None
    if not grad_y.numel():  # a sum over nothing
        grad_x.zero_(), grad_filters.zero_()
    else:
        _implementation(x, filters).backward(grad_y, x, filters, y, stats, *needed)
    return grad_x, grad_filters


def _implementation(x: Tensor, filters: Tensor) -> ModuleType:
    """Return the implementation to use.

    It depends on size and machine only, so a resumed run uses the same one; small inputs never trigger compilation.
    """
    dtype = _sum_dtype(x, filters)
    fast = _triton() if x.is_cuda else local_filter_native
    large = x.is_cuda or filters.numel() >= WORTH_BUILDING
    return fast if large and fast and fast.serves(filters, dtype) else local_filter_plain


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from lightning_meta.dynamic_filters.ops import local_filter_triton
    except ImportError:
        return None
    return local_filter_triton


def _sum_dtype(x: Tensor, filters: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, filters.dtype), torch.float32)


def _new_outputs(x: Tensor, filters: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    B, G, _, _, H, W = filters.shape
    y = x.new_empty((B, G, x.shape[2], H, W))
    return y, x.new_empty((2, B, G, H, W) if softmax else (0,), dtype=_sum_dtype(x, filters))


def _new_gradients(x: Tensor, filters: Tensor, need_x: bool, need_filters: bool) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else (0,))
    return grad_x, torch.empty_like(filters) if need_filters else filters.new_empty(0)


local_filter.register_fake(_new_outputs)
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


local_filter.register_autograd(_gradients, setup_context=_keep)


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_y, x, filters, _, _, ctx.softmax, *ctx.needs = inputs
    ctx.save_for_backward(grad_y, x, filters)


def _second_gradients(ctx: Any, v_x: Tensor, v_f: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of <v_x, grad_x> + <v_f, grad_f>, computed by operators that are differentiable again.

    This sum equals <grad_y, F(v_x, p) + F(x, dp)>, where F filters without softmax and dp = p (v_f - sum_k p_k v_f_k)
    is the change of the probabilities p if the logits change by v_f (without softmax: p = f, dp = v_f). F is linear in
    each of its inputs.
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
    g_y = local_filter(v_x, p, False)[0] + local_filter(x, dp, False)[0]
    return g_y, g_x, g_f, None, None, None, None, None


_local_filter_backward.register_autograd(_second_gradients, setup_context=_keep_for_second)
