"""golden.npz: a few images and the logits that each artifact gave for them when it was exported.

n images, H x W x C as the network takes them, K classes.
"""

from typing import Any, Dict, Sequence

import numpy as np

from kdedge_device.arrays import ArraysUnreadable, read_npz
from kdedge_device.failures import CorruptFailure
from kdedge_device.preprocess import Preprocess

__all__ = ["read_golden"]


def read_golden(
    path: str, preprocess: Preprocess, classes: int, names: Sequence[str]
) -> "Dict[str, np.ndarray[Any, Any]]":
    """`images` uint8 [n, H, W, C] and float [n, K] for those of `names` that are there; CorruptFailure for all else."""
    try:
        found = read_npz(path, ["images"], names)
    except ArraysUnreadable as error:
        raise CorruptFailure(f"{error}. Copy the bundle again.") from None
    images = found["images"]
    shape = (preprocess.height, preprocess.width, preprocess.channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or not len(images):
        raise CorruptFailure(
            f"{path} has images of type {images.dtype} and shape {list(images.shape)}; uint8 [n, {shape[0]}, "
            f"{shape[1]}, {shape[2]}] was expected. Copy the bundle again."
        )
    for name in names:
        logits = found.get(name)
        if logits is not None and (logits.dtype.kind != "f" or logits.shape != (len(images), classes)):
            raise CorruptFailure(
                f"{path} has {name} of type {logits.dtype} and shape {list(logits.shape)}; floats "
                f"[{len(images)}, {classes}] were expected. Copy the bundle again."
            )
    return found
