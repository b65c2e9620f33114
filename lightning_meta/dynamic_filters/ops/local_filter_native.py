"""Build local_filter.cpp, if there is a C++ compiler, and call it. For the letters see ``local_filter.py``."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.nn import native

_SOURCE = Path(__file__).with_name("local_filter.cpp")


class _Filtering(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filters", "y", "stats", "grad_y", "grad_x", "grad_filters")),
        *((name, ctypes.c_int64) for name in ("B", "G", "C", "Kh", "Kw", "H", "W", "rows", "row_size")),
        *((name, ctypes.c_int64 * 5) for name in ("of_filters", "of_gradient")),
    ]


def serves(filters: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the library has functions for such filters and sums in ``dtype``."""
    layouts = strides(filters), strides(torch.empty_like(filters, device="meta"))
    side_by_side = all(layout is not None and 1 in (layout[2], layout[4]) for layout in layouts)  # taps or pixels
    return side_by_side and hasattr(_library(), _name("forward", filters, dtype))


def strides(filters: Tensor) -> tuple[int, ...] | None:
    """Return the strides of samples, groups, taps, rows and columns; None if taps have no single stride."""
    kh, kw = filters.shape[2:4]
    b, g, u, v, h, w = filters.stride()
    return (b, g, u if kw == 1 else v, h, w) if min(kh, kw) == 1 or u == kw * v else None


def forward(x: Tensor, filters: Tensor, y: Tensor, stats: Tensor) -> None:
    """See ``local_filter_plain.forward``."""
    dtype = stats.dtype
    found = y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    _call("forward", x, filters, found, stats)
    if found is not y:
        y.copy_(found)


def backward(
    grad_y: Tensor,
    x: Tensor,
    filters: Tensor,
    y: Tensor,
    stats: Tensor,
    grad_x: Tensor | None,
    grad_filters: Tensor | None,
) -> None:
    """See ``local_filter_plain.backward``.

    Rows are split into parts that add to separate gradients of x: parts can run in parallel and the order of the sums
    does not depend on the number of threads.
    """
    kh, H = filters.shape[2], filters.shape[4]
    rows = min(H, max(16, 2 * kh))
    slabs = None
    if grad_x is not None:
        row_size = x.shape[-1] + 16
        slabs = x.new_zeros(-(-H // rows), *x.shape[:3], rows + kh - 1, row_size, dtype=stats.dtype)
    y = y.to(stats.dtype).contiguous()
    _call("backward", x, filters, y, stats.contiguous(), grad_y, slabs, grad_filters, rows)
    if slabs is not None and grad_x is not None:
        total = grad_x.zero_() if grad_x.dtype == stats.dtype else torch.zeros_like(grad_x, dtype=stats.dtype)
        for part, slab in enumerate(slabs):
            to = total[..., part * rows : (part + 1) * rows + kh - 1, :]
            to += slab[..., : to.shape[-2], : to.shape[-1]]
        if total is not grad_x:
            grad_x.copy_(total)


def _call(
    verb: str,
    x: Tensor,
    filters: Tensor,
    y: Tensor,
    stats: Tensor,
    grad_y: Tensor | None = None,
    grad_x: Tensor | None = None,
    grad_filters: Tensor | None = None,
    rows: int = 0,
) -> None:
    x, grad_y = x.to(stats.dtype).contiguous(), grad_y if grad_y is None else grad_y.to(stats.dtype).contiguous()
    B, G, kh, kw, H, W = filters.shape
    tensors = x, filters, y, stats, grad_y, grad_x, grad_filters
    filtering = _Filtering(
        *(None if tensor is None else tensor.data_ptr() or None for tensor in tensors),
        *(B, G, x.shape[2], kh, kw, H, W, rows, 0 if grad_x is None else grad_x.shape[-1]),
        *((0,) * 5 if t is None else strides(t) for t in (filters, grad_filters)),
    )
    getattr(_library(), _name(verb, filters, stats.dtype))(ctypes.byref(filtering))


def _name(verb: str, filters: Tensor, dtype: torch.dtype) -> str:
    return f"{verb}_{dtype}_{filters.dtype}".replace("torch.", "")


@functools.cache
def _library() -> ctypes.CDLL | None:
    return native.library(_SOURCE)
