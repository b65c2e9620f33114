"""Dynamic local filtering, forward and backward, against the bytes it must move.

The lower bound is the time to move these bytes at the bandwidth of a large copy, which is measured between the rows of
the same run. Forward reads the filters and x and writes y; backward reads the filters, x and the gradient of y and
writes two gradients. On a GPU the batch is larger, so that the time of launching kernels does not count.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import parse, peak_bytes, report, seconds
from lightning_meta.dynamic_filters.layers import dynamic_local_filter

SETTINGS = [(16, 1, 64, 9), (8, 3, 128, 11)]  # B, C, H = W, K
LARGER_ON_GPU = 16  # times B


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
    half = x.detach().bfloat16().requires_grad_()
    channels_last = f.contiguous(memory_format=torch.channels_last)
    rows = {
        "ours, contiguous": (dynamic_local_filter, x, f),
        "ours, channels_last": (dynamic_local_filter, x, channels_last),
        "ours, bf16 filters": (dynamic_local_filter, x, f.bfloat16()),
        "ours, bf16 filters, channels_last": (dynamic_local_filter, x, channels_last.bfloat16()),
        "ours, bf16": (dynamic_local_filter, half, f.bfloat16()),
        "unfold": (by_unfold, x, f),
        "autograd over taps": (by_taps, x, f),
    }
    functions = {}
    for name, (function, images, filters) in rows.items():
        inputs = images, filters.detach().requires_grad_()
        grad_y = torch.randn_like(images)
        functions[name] = lambda y=function, inputs=inputs, to=grad_y: torch.autograd.grad(y(*inputs, K), inputs, to)
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
    for name, (_, images, filters) in rows.items():
        bound = (3 * filters.nbytes + 6 * images.nbytes) / bandwidth
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
    times = LARGER_ON_GPU if options.device == "cuda" else 1
    rows = [row for B, *setting in SETTINGS for row in measure(times * B, *setting, options.device, options.repeats)]
    report("local_filtering", rows, options)
