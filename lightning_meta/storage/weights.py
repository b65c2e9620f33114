"""Trained weights as ``.safetensors`` files with metadata: how to find, read and write them.

The metadata hold ``notes`` (JSON: the module's class and hyper-parameters, steps, seconds, data, seed, commit) and a
``fingerprint`` of the notes and all weights. Weights that several layers share are stored once.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.storage.atomic import atomic_write
from lightning_meta.storage.names import PACKAGE

_NOTES = {"class_path": str, "hyper_parameters": dict, "steps": int, "seconds": int, "shared": dict}
_MORE = "checkpoint/"  # prefix of the tensors that a checkpoint holds beside the module's state


def shipped() -> dict[str, Path]:
    """Return the weight files of the package by name; each paper has its own folder."""
    return {path.stem: path for path in sorted(PACKAGE.glob("*/weights/*.safetensors"))}


def find(weights: str | Path) -> Path:
    """Return the file of a model's name; a path is returned as it is.

    Raises:
        InputError: If it is neither.
    """
    path = Path(weights)
    if path.suffix in (".ckpt", ".safetensors") or path.is_file():
        return path
    if str(weights) not in shipped():
        raise InputError(f"no weights {weights}: give {', '.join(shipped())} or the path of a .ckpt or .safetensors")
    return shipped()[str(weights)]


def read(path: str | Path) -> dict[str, Any]:
    """Read a weight file as a checkpoint dict. It can be tested, but training cannot resume from it. No code can run.

    Raises:
        InputError: If the file does not exist, is damaged, or is not a weight file.
    """
    if not Path(path).is_file():
        raise InputError(f"no file {path}: check the path")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        notes = json.loads(metadata["notes"])
        if wrong := [name for name, kind in _NOTES.items() if type(notes[name]) is not kind]:
            raise TypeError(f"its {wrong[0]} is {notes[wrong[0]]!r:.40}")
        if notes["steps"] < 0:
            raise ValueError(f"its steps are {notes['steps']}")
        intact = metadata["fingerprint"] == _fingerprint(notes, tensors)
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        tensors |= {name: tensors[first] for name, first in notes["shared"].items()}
    except Exception as error:  # there is an exception for every way in which a file can be broken
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path} is not weights of this application or is damaged ({reason}): get it anew") from error
    if not intact:
        raise InputError(f"{path} is damaged, its fingerprint is not that of its weights and notes: get it anew")
    if bad:
        raise InputError(f"{path}: {bad[0]} has values that are not finite: get the file or train anew")
    return {name.removeprefix(_MORE): tensor for name, tensor in tensors.items() if name.startswith(_MORE)} | {
        "state_dict": {name: tensor for name, tensor in tensors.items() if not name.startswith(_MORE)},
        "hyper_parameters": notes["hyper_parameters"] | {"_class_path": notes["class_path"]},
        "global_step": notes["steps"],
        "callbacks": {"Timer": {"time_elapsed": {"train": notes["seconds"]}}},
        "schedule": {"batch": notes["steps"], "carries": []},
    }


def write(path: str | Path, checkpoint: dict[str, Any], record: dict[str, Any]) -> None:
    """Write a checkpoint's weights, in float32, with their metadata; the file is written atomically.

    Args:
        path: File to write; it ends in ``.safetensors``.
        checkpoint: A checkpoint from ``read_checkpoint``.
        record: The ``results.json`` of a test of this checkpoint.

    Raises:
        InputError: If checkpoint and record come from different runs, the command line did not write the checkpoint,
            or the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"cannot write weights to {path}: choose a name that ends in .safetensors")
    try:
        options = dict(checkpoint["hyper_parameters"])
        class_path = options["_class_path"]
        options = {name: value for name, value in options.items() if not name.startswith("_")}
        options = json.loads(json.dumps(options))
        seconds = round(checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the checkpoint does not name its model ({error!r}): give one that fit wrote") from error
    for name, ours in {"steps": checkpoint["global_step"], "seconds": seconds, "model": options}.items():
        if record.get(name) != ours:
            raise InputError(
                f"the record belongs to another checkpoint: its {name} is {record.get(name)} and should be {ours}; "
                "run test with this checkpoint first"
            )
    more = {f"{_MORE}{name}": value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    first: dict[Any, str] = {}
    tensors, shared = {}, {}
    for name, tensor in (checkpoint["state_dict"] | more).items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        if place in first:
            shared[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous()
    notes = {"class_path": class_path, "hyper_parameters": options, "shared": shared, "seconds": seconds}
    notes |= {name: record.get(name) for name in ("steps", "data", "seed", "commit")}
    metadata = {"notes": json.dumps(notes), "fingerprint": _fingerprint(notes, tensors)}
    with atomic_write(path) as part:
        part.write_bytes(save(tensors, metadata))


def _fingerprint(notes: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
