"""What an image file says of itself without being decoded, and whether it can be decoded."""

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from kdedge_device.preprocess import ImageUnreadable, Preprocess, read_header

__all__ = [
    "FileHeader",
    "ImageFile",
    "Member",
    "encoded",
    "image_suffixes",
    "read_content_header",
    "read_file_header",
    "thumbnail",
    "why_undecodable",
]

_TAIL_BYTES = 4096
_MOST_BYTES = 2**30  # of an image in a tar: a header that lies must not take all memory
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


class Member(NamedTuple):
    """An image file inside a tar, which is read where it lies."""

    tar: Path
    offset: int
    size: int

    def content(self) -> bytes:
        """ImageUnreadable where the tar cannot be read or was cut, and where the image is absurdly large."""
        if self.size > _MOST_BYTES:
            raise ImageUnreadable(str(self.tar), f"it has {self.size:,} bytes, more than an image can have")
        try:
            with self.tar.open("rb", buffering=0) as file:
                found = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise ImageUnreadable(str(self.tar), error.strerror or str(error)) from None
        if len(found) != self.size:
            raise ImageUnreadable(str(self.tar), f"{self.tar} ends before it")
        return found


ImageFile: TypeAlias = Path | Member


def encoded(file: ImageFile) -> Path | bytes:
    """What Pillow opens."""
    return file.content() if isinstance(file, Member) else file


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


def read_content_header(content: bytes) -> FileHeader | str:
    """As `read_file_header`, of a file in memory."""
    if not content:
        return "the file is empty"
    try:
        header = read_header(content)
        if _lacks_end(content[:8], content[-_TAIL_BYTES:]):
            _PROBE.decode(content)
    except ImageUnreadable as error:
        return error.reason
    return FileHeader(header.height, header.width, header.mode, len(content))


def _looks_cut(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(max(0, size - _TAIL_BYTES))
        return _lacks_end(start, file.read())


def _lacks_end(start: bytes, tail: bytes) -> bool:
    return any(start.startswith(begin) and end not in tail for begin, end in _ENDS)


def why_undecodable(file: ImageFile) -> str:
    """An empty string, or half a sentence on why the pixels cannot be decoded. JPEG is decoded at 1/8 size."""
    try:
        _PROBE.decode(encoded(file))
    except ImageUnreadable as error:
        return error.reason
    return ""


def thumbnail(source: Path | bytes) -> Any:
    """uint8 [32, 32] grey, proportions lost; raises ImageUnreadable."""
    return _PROBE.decode(source)[:, :, 0]
