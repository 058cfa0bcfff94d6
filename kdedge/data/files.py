"""What an image file says of itself without being decoded, and whether it can be decoded."""

import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdedge_device.preprocess import ImageUnreadable, Preprocess, read_header

__all__ = ["FileHeader", "image_suffixes", "read_file_header", "thumbnail", "why_undecodable"]

_TAIL_BYTES = 4096
# What a whole file has near its end; cameras and sites append a little behind it.
_ENDS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND"))
# Formats that are drawings (EPS is run by Ghostscript), films or weather maps, which Pillow names but does not decode.
_NOT_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})
_PROBE = Preprocess(height=32, width=32, channels=1, resize="squash", mean=(0.0,), std=(1.0,))


@dataclass(frozen=True)
class FileHeader:
    height: int
    width: int
    mode: str  # Pillow's name
    bytes: int


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes, with the dot, of the image formats Pillow reads."""
    from PIL import Image

    return frozenset(
        suffix.lower()
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_PIXELS
    )


def read_file_header(path: Path) -> FileHeader | str:
    """Size and mode, or half a sentence on why the file cannot be used. Reads the first and last few thousand bytes;
    the whole of a JPEG or PNG only where it looks cut off.
    """
    try:
        found = path.stat()  # follows links
        if not stat.S_ISREG(found.st_mode):
            return "it is not a regular file"  # opening a pipe would wait forever
        if found.st_size == 0:
            return "the file is empty"
        header = read_header(path)
        if _looks_cut(path, found.st_size):
            reason = why_undecodable(path)
            if reason:
                return reason
    except ImageUnreadable as error:
        return error.reason
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return error.strerror or str(error)
    return FileHeader(header.height, header.width, header.mode, found.st_size)


def _looks_cut(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    return any(start.startswith(begin) and end not in tail for begin, end in _ENDS)


def why_undecodable(path: Path) -> str:
    """An empty string, or half a sentence on why the pixels cannot be decoded. JPEG is decoded at 1/8 size."""
    try:
        _PROBE.decode(path)
    except ImageUnreadable as error:
        return error.reason
    return ""


def thumbnail(path: Path) -> Any:
    """uint8 [32, 32] grey, proportions lost; raises ImageUnreadable."""
    return _PROBE.decode(path)[:, :, 0]
