"""The operator behind dynamic_local_filter in plain PyTorch, one tile of filters at a time.

It runs wherever no faster implementation does. For the letters see ``local_filter.py``.

A tile is some samples x some groups x all taps x some rows. It is small enough to stay in cache during several cheap
elementwise passes, and large enough that the overhead of calling them does not matter.

Exponentials are powers of two: on a CPU torch.exp2 takes a third of the time of torch.exp.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_LOG2E = 1.4426950408889634  # log2(e)


def forward(x: Tensor, filters: Tensor, y: Tensor, stats: Tensor) -> None:
    """Fill y and stats."""
    dtype = stats.dtype
    windows = _windows(x.to(dtype), filters)
    e_scratch, product_scratch, _ = _scratch(filters, dtype)
    for n, g, rows in _tiles(filters):
        e = _taps(filters[n, g, ..., rows, :], e_scratch)
        window, y_tile = windows[n, g, ..., rows, :], y[n, g, :, rows]
        product = _part(product_scratch, e)
        if stats.numel():
            minus_m, s = stats[:, n, g, rows]
            torch.mul(e.amax((2, 3)), -_LOG2E, out=minus_m)
            e = _exp(e, minus_m, e_scratch)
            torch.sum(e, (2, 3), out=s)
        sums = [torch.mul(e, window[:, :, c], out=product).sum((2, 3)) for c in range(x.shape[2])]
        y_sum = torch.stack(sums, 2)
        y_tile.copy_(y_sum / s.unsqueeze(2) if stats.numel() else y_sum)


def backward(
    grad_y: Tensor,
    x: Tensor,
    filters: Tensor,
    y: Tensor,
    stats: Tensor,
    grad_x: Tensor | None,
    grad_filters: Tensor | None,
) -> None:
    """Fill the gradients that are not None. grad_y is divided by s, which is cheaper than dividing every tap by it."""
    dtype = stats.dtype
    total = None
    if grad_x is not None:
        total = grad_x.zero_() if grad_x.dtype == dtype else torch.zeros_like(grad_x, dtype=dtype)
    windows = _windows(x.to(dtype), filters)
    e_scratch, product_scratch, row_scratch = _scratch(filters, dtype)
    for n, g, rows in _tiles(filters):
        e = _taps(filters[n, g, ..., rows, :], e_scratch)
        grad = grad_y[n, g, :, rows].to(dtype)
        product = _part(product_scratch, e)
        centre = torch.zeros((), dtype=dtype, device=x.device)
        if stats.numel():
            minus_m, s = stats[:, n, g, rows]
            e = _exp(e, minus_m, e_scratch)
            grad = grad / s.unsqueeze(2)
            centre = (grad * y[n, g, :, rows]).sum(2).neg_()[:, :, None, None]
        grads = grad[:, :, :, None, None].unbind(2)  # one per channel, (n, g, 1, 1, h, W)
        if grad_filters is not None:
            window, out = windows[n, g, ..., rows, :], grad_filters[n, g, ..., rows, :]
            t = out if _is_plain(out, dtype) else product
            for c, grad_c in enumerate(grads):
                torch.addcmul(t if c else centre, window[:, :, c], grad_c, out=t)
            if stats.numel():
                t.mul_(e)
            if t is not out:
                out.copy_(t)
        if total is not None:
            for c, grad_c in enumerate(grads):
                torch.mul(e, grad_c, out=product)
                kh, h = e.shape[2], e.shape[4]
                # Zeros follow each row and each plane. Shortening the stride over v by one element therefore shifts
                # tap v by v pixels to the right, and shortening the stride over u by one row shifts it u rows down.
                taps = product_scratch[: e.shape[0], : e.shape[1], ..., :h, :]
                by_row = row_scratch[: e.shape[0], : e.shape[1], :, : h + kh - 1]
                by_row[..., h:, :] = 0
                torch.sum(_skewed(taps, 3, 1), 3, out=by_row[..., :h, :])
                total[n, g, c, rows.start : rows.stop + kh - 1] += _skewed(by_row, 2, x.shape[-1]).sum(2)
    if grad_x is not None and total is not None and total is not grad_x:
        grad_x.copy_(total)


def _skewed(t: Tensor, dim: int, by: int) -> Tensor:
    """Return a view of t whose stride along ``dim`` is shorter by ``by`` elements."""
    stride = list(t.stride())
    stride[dim] -= by
    return t.as_strided(t.shape, stride, t.storage_offset())


def _taps(tile: Tensor, scratch: Tensor) -> Tensor:
    """Return the filters of a tile as planes in the dtype of the sums; copy them only if necessary."""
    return tile if _is_plain(tile, scratch.dtype) else _part(scratch, tile).copy_(tile)


def _exp(f: Tensor, minus_m: Tensor, scratch: Tensor) -> Tensor:
    return torch.add(minus_m[:, :, None, None], f, alpha=_LOG2E, out=_part(scratch, f)).exp2_()


def _is_plain(tile: Tensor, dtype: torch.dtype) -> bool:
    return tile.dtype == dtype and tile.stride()[-2:] == (tile.shape[-1], 1)


def _windows(x: Tensor, filters: Tensor) -> Tensor:
    """Return a view of x, (B, G, C, Kh, Kw, H, W): what tap (u, v) of every pixel reads."""
    H, W = filters.shape[-2:]
    return x.contiguous().unfold(3, H, 1).unfold(4, W, 1)


def _tiles(filters: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Split (B, G, Kh, Kw, H, W) into slices of samples, groups and rows, the largest first."""
    B, G, kh, kw, H, W = filters.shape
    # Elements per tile: few enough to stay in cache on a CPU, enough to launch few kernels on CUDA.
    budget = 350_000 if filters.device.type == "cpu" else 2**19
    blocks = min(H, -(-H * W * kh * kw // budget))
    h = -(-H // blocks)  # blocks of equal height
    g = min(G, max(1, budget // (kh * kw * W * H)))
    n = min(B, max(1, budget // (kh * kw * W * H * G)))
    for b in range(0, B, n):
        for group in range(0, G, g):
            for row in range(0, H, h):
                yield slice(b, min(b + n, B)), slice(group, min(group + g, G)), slice(row, min(row + h, H))


def _scratch(filters: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate buffers for all tiles: allocating new memory for each would take longer than the sums."""
    samples, groups, rows = next(_tiles(filters))
    n, g, kh, kw, h, W = filters[samples, groups, ..., rows, :].shape
    # Planes are 16 elements apart: at distances of 2^n they would share cache sets, and transposing took 5x longer.
    e = filters.new_empty((n, g, kh, kw, h * W + 16), dtype=dtype)[..., : h * W].unflatten(-1, (h, W))
    product = filters.new_empty((n, g, kh, kw, h, W + kw - 1), dtype=dtype)
    product[..., W:] = 0
    by_row = filters.new_empty((n, g, kh, h + kh - 1, W + kw - 1), dtype=dtype)
    return e, product, by_row


def _part(scratch: Tensor, tile: Tensor) -> Tensor:
    n, g, _, _, h, W = tile.shape
    return scratch[:n, :g, ..., :h, :W]
