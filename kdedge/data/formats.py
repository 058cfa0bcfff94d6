"""The file formats of the known sets: IDX, CIFAR batches, SVHN's MATLAB files, STL-10's binaries.

Nothing in them is executed, and a damaged file is a DataError that names it.
"""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdedge.data.unpickle import read_pickle
from kdedge.errors import DataError

__all__ = ["read_cifar", "read_idx", "read_stl10", "read_svhn"]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The uint8 array in an IDX file, or in PATH.gz. DataError where it is missing, cut or of another type."""
    packed = path.with_name(path.name + ".gz")
    try:
        raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path if path.exists() else packed} cannot be read: {error}. Expected an IDX file.") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(
            f"{path} is no IDX file of bytes: it starts with {raw[:4]!r}. Delete it, and it is downloaded again."
        )
    axes = raw[3]
    shape = tuple(np.frombuffer(raw, ">u4", count=axes, offset=4).tolist()) if len(raw) >= 4 + 4 * axes else (0,)
    if len(raw) != 4 + 4 * axes + int(np.prod(shape, dtype=object)):
        raise DataError(f"{path} is cut or damaged: {len(raw)} bytes do not hold an array of {shape}. Fetch it again.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_cifar(paths: Sequence[Path], key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 [n, 32, 32, 3] and labels of CIFAR batches, by the restricted unpickler; `key` names their labels."""
    pixels, labels = [], []
    for path in paths:
        batch = read_pickle(path)
        data, numbers = batch.get("data"), batch.get(key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise DataError(
                f"{path} has no 'data' of uint8 [n, 3072]. Delete it and let kdedge fetch the official one."
            )
        if not isinstance(numbers, list) or len(numbers) != len(data) or not all(isinstance(n, int) for n in numbers):
            raise DataError(f"{path} has no list '{key}' with one whole number an image. Fetch the official one.")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
    return np.ascontiguousarray(np.concatenate(pixels)), np.array(labels, dtype=np.int64)


def read_svhn(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 [n, 32, 32, 3] and labels of an SVHN .mat file, where the digit 0 is written as class 10."""
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
        pixels, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # scipy raises anything on a damaged file
        raise DataError(f"{path} cannot be read as a MATLAB file with X and y: {error}. Fetch it again.") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2:] != (3, len(labels)):
        raise DataError(
            f"{path} has X {pixels.shape} and y {labels.shape}; uint8 [h, w, 3, n] and n labels were expected."
        )
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), np.where(labels == 10, 0, labels)


def read_stl10(path: Path) -> NDArray[np.uint8]:
    """uint8 [n, 96, 96, 3], mapped from the file and not read: the unlabeled part alone has 2.8 GB."""
    size = 96 * 96 * 3
    if path.stat().st_size == 0 or path.stat().st_size % size:
        raise DataError(f"{path} has {path.stat().st_size} bytes, no multiple of {size}: it is cut. Fetch it again.")
    mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    return mapped.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # columns first in the file
