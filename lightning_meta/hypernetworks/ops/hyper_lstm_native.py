"""Builds hyper_lstm.cpp if a C++ compiler is available, and calls it."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_meta.nn import native

_SOURCE = Path(__file__).with_name("hyper_lstm.cpp")
_OF_KEPT = ["kept_h", "kept_c", "gates", "tanh_c", "normal", "rstd"]
_OF_BOTH = ["x", "products", "z", "scale", "norm", "mask", "h", "c", "out"]  # as hyper_lstm._step takes them
_OF_BACKWARD = ["to_x", "to_products", "to_z", "grad_norm", "grad_scale"]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_OF_KEPT, *_OF_BOTH, *_OF_BACKWARD)),
        *((name, ctypes.c_int64) for name in ("n", "H", "Z", "row_size", "parts")),
    ]


def steps(like: Tensor, products: torch.dtype) -> tuple[Callable[..., None], Callable[..., None], int] | None:
    """Return compiled forms of ``hyper_lstm``'s ``_step`` and ``_step_backward``, and their number of threads.

    Args:
        like: A tensor with the device and dtype of everything except the products with x and h.
        products: Dtype of those products.

    Returns:
        None if there is no compiler, the device is not a CPU, or the dtypes are not supported.
    """
    library, parts = _library() if like.device.type == "cpu" else None, torch.get_num_threads()
    names = (f"{name}_{like.dtype}_{products}".replace("torch.", "") for name in ("step", "step_backward"))
    found = [getattr(library, name, None) for name in names]
    return None if None in found else (*(functools.partial(_call, function, parts) for function in found), parts)


def _call(function: Callable[[object], None], parts: int, kept: tuple[Tensor, ...], *tensors: Tensor | None) -> None:
    x, _, _, scale, *_ = tensors
    step = _Step(
        *(None if tensor is None else tensor.data_ptr() for tensor in (*kept, *tensors)),
        n=x.shape[1],
        H=x.shape[2],
        Z=0 if scale is None else scale.shape[1],
        row_size=x.stride(1),
        parts=parts,
    )
    function(ctypes.byref(step))


@functools.cache
def _library() -> ctypes.CDLL | None:
    return native.library(_SOURCE)
