"""Compile our C++ sources on first use, if there is a compiler."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX512"],
}


def library(source: Path) -> ctypes.CDLL | None:
    """Compile a source file, which may include torch's headers, and load it. The result is kept in the user's cache.

    The compiler is that of the environment variable ``CXX``, or else ``c++``. It targets the CPU instructions that
    torch uses on this machine.

    Returns:
        The library, or None if there is no compiler, the cache cannot be written, or the source does not compile.
    """
    torch_folder, capability = Path(torch.__file__).parent, torch.backends.cpu.get_cpu_capability()
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *("-O3", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"),
        *_FLAGS.get(capability, []),
        f"-DCPU_CAPABILITY={capability}",
        *("-isystem", f"{torch_folder / 'include'}", str(source)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    key = hashlib.sha256(repr((command, torch.__version__, source.read_bytes())).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_meta"
        built = cache / f"{source.stem}-{key}.so"
        if not built.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:  # each process builds its own
                made = Path(folder) / built.name
                subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
                made.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None
