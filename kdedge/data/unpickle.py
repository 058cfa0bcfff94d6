"""Reading the CIFAR pickles without the power of pickle.

A pickle is a program. This reader lets it build bytes, str, int, list and dict, and numpy arrays of whole numbers;
whatever else it names is refused before it is called. Arrays are rebuilt here from their bytes, so that not even
numpy's own unpickling code sees what the file says.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdedge.errors import DataError

__all__ = ["read_pickle"]

_INTEGERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode("ascii", "replace") if isinstance(name, bytes) else name
        if text not in _INTEGERS:
            raise pickle.UnpicklingError(f"an array of {text!r}, not of whole numbers")
        self.value = np.dtype(str(text))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii", "replace") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"an array with byte order {order!r}")
        self.value = self.value.newbyteorder(">" if order == ">" else "<")  # "|": one byte, where it does not matter


class _Bytes:
    """Stands for _codecs.encode and, without arguments, for bytes: so Python 3 writes bytes in old protocols.

    A class, since a pickle can set the attributes of a function it can name.
    """

    def __init__(self, text: str = "", encoding: object = "latin1") -> None:
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
        self.value = text.encode("latin1")

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("bytes with a state")


class _Array:
    """Stands for the array that numpy's `_reconstruct` begins and its `__setstate__` fills."""

    def __init__(self, *_: object) -> None:
        self.value: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        content = raw.value if isinstance(raw, _Bytes) else raw
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of objects")
        flat = np.frombuffer(content, dtype=dtype.value)
        self.value = flat.reshape(tuple(int(n) for n in shape), order="F" if fortran else "C")


_KNOWN: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused") from None


def _plain(value: Any) -> Any:
    """Stand-ins replaced by their arrays, byte keys by text; anything but the allowed types is refused."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without content")
        return value.value
    if isinstance(value, _Bytes):
        return value.value
    if isinstance(value, dict):
        return {_text(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) in (bytes, str, int):
        return value
    raise pickle.UnpicklingError(f"a value of type {type(value).__name__}")


def _text(key: object) -> str:
    plain = key.value if isinstance(key, _Bytes) else key
    if isinstance(plain, bytes):
        return plain.decode("latin1")
    if isinstance(plain, str):
        return plain
    raise pickle.UnpicklingError(f"a key of type {type(key).__name__}")


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in `path`, its keys as str; values are bytes, str, int, lists, dicts and integer arrays.

    DataError for anything else, and nothing of it is run.
    """
    try:
        document = _plain(_Restricted(io.BytesIO(path.read_bytes()), encoding="bytes").load())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle may raise anything: IndexError, KeyError, MemoryError ...
        raise DataError(
            f"{path} was refused: {error}. Expected a CIFAR batch: a pickled dict of bytes, str, int, lists and "
            "integer arrays. Delete it and let kdedge fetch the official one."
        ) from None
    if not isinstance(document, dict):
        raise DataError(f"{path} was refused: it holds a {type(document).__name__}. Expected a pickled dict.")
    return document
