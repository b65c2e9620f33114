"""Dynamic local filtering, forward and backward, against the bytes it must move.

The bound is the time of those bytes at the bandwidth of a large copy, measured between the rows of the same run:
forward reads filters and x and writes y, backward reads filters, x and the gradient of y and writes two gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import parse, peak_bytes, report, seconds
from lightning_meta.dynamic_filters.layers import dynamic_local_filter

SETTINGS = [(16, 1, 64, 9), (8, 3, 128, 11)]  # B, C, H = W, K


def by_unfold(x: Tensor, f: Tensor, K: int) -> Tensor:
    B, C, H, W = x.shape
    windows = F.unfold(x, K, padding=K // 2).view(B, C, K * K, H, W)
    return (windows * f.softmax(1).unsqueeze(1)).sum(2)


def by_taps(x: Tensor, f: Tensor, K: int) -> Tensor:
    H, W = x.shape[2:]
    padded = F.pad(x, (K // 2,) * 4)
    taps = f.softmax(1).unsqueeze(1).unbind(2)
    return sum(p * padded[..., k // K : k // K + H, k % K : k % K + W] for k, p in enumerate(taps))


def measure(B: int, C: int, H: int, K: int, device: str, repeats: int) -> list[dict]:
    x = torch.randn(B, C, H, H, device=device, requires_grad=True)
    f = torch.randn(B, K * K, H, H, device=device)
    grad_y = torch.randn_like(x)
    channels_last = f.contiguous(memory_format=torch.channels_last)
    rows = {
        "ours, contiguous": (dynamic_local_filter, f),
        "ours, channels_last": (dynamic_local_filter, channels_last),
        "ours, bf16 filters": (dynamic_local_filter, f.bfloat16()),
        "unfold": (by_unfold, f),
        "autograd over taps": (by_taps, f),
    }
    functions = {}
    for name, (function, filters) in rows.items():
        filters = filters.detach().requires_grad_()
        functions[name] = lambda y=function, f=filters: torch.autograd.grad(y(x, f, K), (x, f), grad_y)
    peaks = {name: peak_bytes(function, device) for name, function in functions.items()}  # warms up, too
    source = torch.ones(64 * 2**20, device=device)
    target = torch.ones_like(source)
    copies, times = [], {name: [] for name in functions}
    for _ in range(repeats):  # interleaved, so that a busy moment hits all of them
        copies.append(seconds(lambda: target.copy_(source), device))
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    bandwidth = 2 * source.nbytes / min(copies)
    result = []
    for name, (_, filters) in rows.items():
        bound = (3 * filters.nbytes + 6 * x.nbytes) / bandwidth
        result.append(
            {
                "setting": f"{B}x{C}x{H}x{H}, {K}x{K}",
                "form": name,
                "ms": 1e3 * min(times[name]),
                "x bound": min(times[name]) / bound,
                "x ours": min(times[name]) / min(times["ours, contiguous"]),
                "peak MiB": peaks[name] / 2**20,
                "filters' gradient MiB": filters.nbytes / 2**20,
                "copy GB/s": bandwidth / 1e9,
            }
        )
    return result


def main(arguments: list[str]) -> None:
    options = parse("local_filtering", __doc__, arguments)
    rows = [row for setting in SETTINGS for row in measure(*setting, options.device, options.repeats)]
    report("local_filtering", rows, options)
