"""Builds hyper_lstm.cpp where there is a C++ compiler, and calls it."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("hyper_lstm.cpp")
_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX512"],
}
_OF_KEPT = ["kept_h", "kept_c", "gates", "tanh_c", "normal", "rstd"]
_OF_BOTH = ["x", "products", "z", "scale", "norm", "mask", "h", "c", "out"]  # as hyper_lstm._step takes them
_OF_BACKWARD = ["to_x", "to_products", "to_z", "grad_norm", "grad_scale"]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_OF_KEPT, *_OF_BOTH, *_OF_BACKWARD)),
        *((name, ctypes.c_int64) for name in ("n", "H", "Z", "row_size", "parts")),
    ]


def steps(like: Tensor, products: torch.dtype) -> tuple[Callable[..., None], Callable[..., None], int] | None:
    """``hyper_lstm``'s ``_step`` and ``_step_backward`` as compiled, and into how many parts they split the samples.

    Args:
        like: Of the device and dtype of all but the products with x and h.
        products: Their dtype.

    Returns:
        None where they cannot be had: no CPU, no compiler, or other dtypes.
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
    """Built once, and kept in the user's cache; the compiler is the one that CXX names, else c++."""
    torch_folder, capability = Path(torch.__file__).parent, torch.backends.cpu.get_cpu_capability()
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *("-O3", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"),
        *_FLAGS.get(capability, []),
        f"-DCPU_CAPABILITY={capability}",
        *("-isystem", f"{torch_folder / 'include'}", str(_SOURCE)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    key = hashlib.sha256(repr((command, torch.__version__, _SOURCE.read_bytes())).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_meta"
        built = cache / f"hyper_lstm-{key}.so"
        if not built.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # of several processes, each builds its own
                made = Path(folder) / built.name
                subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
                made.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no compiler, no home, or it does not build
        return None
