"""Photographs that come with installed packages, from which the stand-ins for natural images are made."""

import numpy as np

from lightning_meta.sources import image_files

_NAMES = {"train": ("china", "flower"), "val": ("minduka",), "test": ("grace_hopper",)}


def grey_photographs() -> dict[str, list[np.ndarray]]:
    """Return grey photographs, uint8 (H, W), for each split. No photograph is in two splits."""
    photographs = image_files.bundled_photographs()
    return {split: [image_files.grey(photographs[name]) for name in names] for split, names in _NAMES.items()}
