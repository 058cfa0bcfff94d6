"""Raw arrays from files of strangers: .npy and .npz without pickles, and without believing what their headers say.

numpy's own reader evaluates a header as Python, and allocates what it claims. Here a header has to match one form, and
its size has to be that of the data behind it. Python 3.8, numpy and the standard library.
"""

import os
import re
import struct
import zipfile
from typing import Any, BinaryIO, Dict, NamedTuple, Sequence, Tuple

import numpy as np

from kdedge_device.failures import Failure
from kdedge_device.images import MAX_PIXELS, ImageUnreadable

__all__ = ["ArraysUnreadable", "read_npy", "read_npz", "why_no_image"]

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 4096
_MAX_MEMBERS = 1000
_CHUNK = 1 << 20
_HEADER = re.compile(
    rb"\{\s*'descr'\s*:\s*'(?P<descr>[^']*)'\s*,\s*'fortran_order'\s*:\s*(?P<fortran>True|False)\s*,"
    rb"\s*'shape'\s*:\s*\((?P<shape>[0-9L, ]*)\)\s*,?\s*\}\s*"
)
_PLAIN = re.compile(rb"[<>|=]?(?:b1|[iu][1248]|f[248])")


class ArraysUnreadable(Failure):
    """`path` cannot be read as arrays, and `reason` says why in half a sentence."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"Cannot read the arrays of {path}: {reason}")
        self.path = path
        self.reason = reason


class _Refused(Exception):
    """Half a sentence on what is wrong."""


class _Header(NamedTuple):
    dtype: "np.dtype[Any]"
    shape: Tuple[int, ...]
    fortran: bool
    header_bytes: int

    @property
    def data_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size  # Python's own numbers: numpy's would overflow
        return count


def why_no_image(image: "np.ndarray[Any, Any]") -> str:
    """Why an array is no image, in half a sentence; an empty string where it is one."""
    found = f"it has type {image.dtype} and shape {image.shape}; uint8 [h, w], [h, w, 1] or [h, w, 3] was expected"
    if image.dtype != np.uint8:
        return found
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)) or 0 in image.shape:
        planes = image.ndim == 3 and image.shape[0] in (1, 3)
        return found + (". Channels come last: transpose it by (1, 2, 0)" if planes else "")
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        return f"it has {image.shape[0] * image.shape[1] / 1e6:.0f} megapixels; the limit is {MAX_PIXELS / 1e6:.0f}"
    return ""


def read_npy(path: str) -> "np.ndarray[Any, Any]":
    """The image in an .npy file, of any size. Raises ImageUnreadable."""
    try:
        with _opened(path) as file:
            header = _read_header(file, os.fstat(file.fileno()).st_size)
            _require_memory(header.data_bytes)
            image = _read_data(file, header)
        why = why_no_image(image)
    except _Refused as error:
        why = str(error)
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise ImageUnreadable(path, why)
    return image


def read_npz(path: str, names: Sequence[str], optional: Sequence[str] = ()) -> "Dict[str, np.ndarray[Any, Any]]":
    """The arrays of these names in an .npz file, those of `optional` where they are there. Raises ArraysUnreadable."""
    try:
        with _opened(path) as file, zipfile.ZipFile(file) as archive:
            return _members(archive, names, optional)
    except _Refused as error:
        raise ArraysUnreadable(path, str(error)) from None
    except Exception as error:  # zipfile and zlib raise a dozen kinds on damaged data, NotImplementedError among them
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ArraysUnreadable(path, f"it is no whole .npz file ({what})") from None


def _members(
    archive: zipfile.ZipFile, names: Sequence[str], optional: Sequence[str]
) -> "Dict[str, np.ndarray[Any, Any]]":
    entries = archive.infolist()
    if len(entries) > _MAX_MEMBERS:
        raise _Refused(f"it has {len(entries)} members; at most {_MAX_MEMBERS} were expected")
    known = {entry.filename: entry for entry in entries}
    if len(known) < len(entries):
        raise _Refused("it has two members of one name")
    missing = [name for name in names if name + ".npy" not in known]
    if missing:
        there = ", ".join(sorted(name[:-4] for name in known if name.endswith(".npy"))) or "none"
        raise _Refused("it has no array '{}'; it has {}".format("', '".join(missing), there))
    wanted = {name: known[name + ".npy"] for name in [*names, *optional] if name + ".npy" in known}
    _require_memory(sum(entry.file_size for entry in wanted.values()))
    return {name: _member(archive, name, entry) for name, entry in wanted.items()}


def _member(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> "np.ndarray[Any, Any]":
    try:
        with archive.open(entry) as file:
            array = _read_data(file, _read_header(file, entry.file_size))
            if file.read(1):  # also where zipfile compares the checksum
                raise _Refused("there is more behind its data")
            return array
    except _Refused as error:
        raise _Refused(f"its array '{name}' cannot be used: {error}") from None


def _opened(path: str) -> BinaryIO:
    if not os.path.exists(path):
        raise _Refused("there is no such file")
    if not os.path.isfile(path):
        raise _Refused("it is no file")
    return open(path, "rb")


def _read_header(file: Any, size: int) -> _Header:
    """The header of an array whose file, or member, has `size` bytes in all; they have to be what it claims."""
    start = file.read(len(_MAGIC) + 2)
    if start[: len(_MAGIC)] != _MAGIC or len(start) < len(_MAGIC) + 2:
        raise _Refused(f"it is no .npy array (it starts with {start!r})")
    if start[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise _Refused(f"it has version {start[6]}.{start[7]}; 1.0 or 2.0 was expected")
    width, form = (2, "<H") if start[6] == 1 else (4, "<I")
    length = file.read(width)
    count = struct.unpack(form, length)[0] if len(length) == width else _MAX_HEADER + 1
    text = file.read(min(count, _MAX_HEADER))
    match = _HEADER.fullmatch(text) if len(text) == count else None
    if match is None:
        raise _Refused(f"its header is not one that numpy writes ({text[:40]!r})")
    if not _PLAIN.fullmatch(match["descr"]):
        objects = "holds Python objects (pickled), which are never loaded" if b"O" in match["descr"] else ""
        raise _Refused(
            "it " + (objects or "has type {!r}; plain numbers were expected".format(match["descr"].decode()))
        )
    header = _Header(
        np.dtype(match["descr"].decode()), _shape(match["shape"]), match["fortran"] == b"True", 8 + width + count
    )
    if header.header_bytes + header.data_bytes != size:
        raise _Refused(
            f"it should hold {header.data_bytes} bytes, as its shape {header.shape} says, and holds "
            f"{size - header.header_bytes}"
        )
    return header


def _shape(text: bytes) -> Tuple[int, ...]:
    sizes = [part.strip(b" L") for part in text.split(b",")]
    sizes = sizes[:-1] if sizes[-1] == b"" else sizes  # (3,), and () too
    if len(sizes) > 8 or not all(size.isdigit() and len(size) < 19 for size in sizes):
        raise _Refused(f"its shape ({text[:40].decode()}) is none")
    return tuple(int(size) for size in sizes)


def _read_data(file: Any, header: _Header) -> "np.ndarray[Any, Any]":
    array = np.empty(header.data_bytes // header.dtype.itemsize, header.dtype)
    view = array.view(np.uint8).data
    at = 0
    while at < len(view):
        count = file.readinto(view[at : at + _CHUNK])
        if not count:
            raise _Refused(f"it ends after {at} of {len(view)} bytes")
        at += count
    try:
        return array.reshape(header.shape, order="F" if header.fortran else "C")
    except ValueError as error:  # nothing, times more than numpy counts to
        raise _Refused(f"its shape {header.shape} is none ({error})") from None


def _require_memory(wanted: int) -> None:
    """Half of the machine's memory at most: a small file can claim to unpack to any size."""
    try:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # not on every system
        limit = 4 << 30
    if wanted > limit:
        raise _Refused(f"it takes {wanted >> 20} MiB; half of this machine's memory, {limit >> 20} MiB, is the limit")
