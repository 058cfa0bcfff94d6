"""The file that `kdedge data pack` writes: decoded images, and all that the source knew of them.

    0      what it is, schema, where the header lies, sha256 of the header
    4096   uint8 [N, C, H, W], plain, so that any program can map it
    then   labels, parts, ids, blocks and their sha256; then the header, in JSON

C, H, W order: a batch is then what a network reads, and nothing is transposed while it trains. Images are read by
`preadv` and not through a memory map: nothing read so counts as memory of this process, a file that was cut under a
run is a sentence and not a dead process, and the disk is told of all images of a batch beforehand, where a map makes
it wait for one page after the other (`python -m kdedge_bench.pack_memory` measures both).

N images, n of them, C channels, H and W pixels.
"""

import hashlib
import json
import math
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess

__all__ = ["PIXELS_AT", "SCHEMA", "Ids", "Packed", "PackedImages", "encode_tail", "is_packed", "read_at", "read_packed"]

SCHEMA = 1
PIXELS_AT = 4096  # a page: the pixels can be mapped as they lie
_MAGIC = b"kdedge packed\r\n\x1a"
_PREAMBLE = struct.Struct("<16sIIQQ32s")  # magic, schema, 0, where the header begins, its bytes, its sha256
_TABLES = ("labels", "part", "block_ends", "block_sha256", "ids")
_ADVISE = getattr(os, "posix_fadvise", None)  # macOS has none
_AGAIN = "Pack it again: kdedge data pack SPEC --out FILE."


class PackedImages:
    """Decoded images in a file, read as they are needed. Each block is hashed when first read, and then trusted.

    `block_ends` [B] are the rows at which blocks end, `block_sha256` [B, 32] what their pixels hash to.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int, int],
        block_ends: NDArray[np.int64],
        block_sha256: NDArray[np.uint8],
    ) -> None:
        self.path, self.shape, self.image_bytes = path, shape, math.prod(shape[1:])
        self._ends, self._sha256 = block_ends, block_sha256
        self._seen = np.zeros(len(block_ends), dtype=np.bool_)
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        _, channels, height, width = self.shape
        return height, width, channels

    def read_into(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Write image rows[i] into out[i]; `out` is uint8 [n, C, H, W], contiguous.

        DataError where the file cannot be read, was cut, or holds other pixels than were packed.
        """
        if not len(rows):
            return
        self._check_blocks(rows)
        view, size, places = out.data.cast("B"), self.image_bytes, rows.tolist()
        if (np.diff(rows) == 1).all():  # one piece of the file
            self._read(view, places[0])
            return
        self._announce([(row, 1) for row in sorted(places)])
        for number, row in enumerate(places):
            self._read(view[number * size : (number + 1) * size], row)

    def planes(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, C, H, W]."""
        out = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        self.read_into(indices, out)
        return out

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, h, w, C]."""
        return np.ascontiguousarray(self.planes(indices).transpose(0, 2, 3, 1))

    def read(self, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
        return preprocess.fit(self.rows(np.array([index]))[0])

    def _check_blocks(self, rows: NDArray[np.int64]) -> None:
        blocks = np.unique(np.searchsorted(self._ends, rows, side="right"))
        unseen = blocks[~self._seen[blocks]].tolist()
        starts = [int(self._ends[block - 1]) if block else 0 for block in unseen]
        counts = [int(self._ends[block]) - start for block, start in zip(unseen, starts, strict=True)]
        self._announce(list(zip(starts, counts, strict=True)))
        for block, start, count in zip(unseen, starts, counts, strict=True):
            content = np.empty(count * self.image_bytes, dtype=np.uint8)
            self._read(content.data, start)
            if hashlib.sha256(content.data).digest() != self._sha256[block].tobytes():
                raise DataError(
                    f"{self.path} is damaged: its images {start} to {start + count - 1} are not those that were packed "
                    f"(other sha256). {_AGAIN}"
                )
            self._seen[block] = True

    def _announce(self, pieces: list[tuple[int, int]]) -> None:
        """Tell the disk of all pieces (first row, rows) before waiting for the first."""
        if _ADVISE is not None:
            for start, count in pieces:
                offset = PIXELS_AT + start * self.image_bytes
                _ADVISE(self._handle, offset, count * self.image_bytes, os.POSIX_FADV_WILLNEED)

    def _read(self, out: memoryview, start: int) -> None:
        read_at(self._handle, self.path, PIXELS_AT + start * self.image_bytes, out)


@final
class Ids(Sequence[str]):
    """The ids of packed images as they lie in the file, one after the other with a zero byte between.

    Two words and its letters an image: as objects of their own they would take three times as much.
    """

    def __init__(self, text: bytes, count: int) -> None:
        self._text = text
        self._ends = np.append(np.flatnonzero(np.frombuffer(text, np.uint8) == 0), len(text))[:count]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # IndexError, and places from the end
        start = int(self._ends[place - 1]) + 1 if place else 0
        return self._text[start : int(self._ends[place])].decode()


@dataclass(frozen=True)
class Packed:
    """What a packed file holds: the header, the tables by name, and the images."""

    header: dict[str, Any]
    labels: NDArray[np.int64]
    part: NDArray[np.uint8]  # numbers of source.PARTS
    ids: Ids
    images: PackedImages


def is_packed(path: Path) -> bool:
    """Whether the file begins as `kdedge data pack` begins it; DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Expected a readable file.") from error


def read_at(handle: int, path: Path, offset: int, out: memoryview) -> None:
    """Fill `out` from `offset` on; DataError where the file ends before or cannot be read."""
    done = 0
    while done < len(out):
        try:
            got = os.preadv(handle, [out[done:]], offset + done)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}. Expected a readable file.") from error
        if not got:
            raise DataError(f"{path} is cut: it ends before byte {offset + len(out)}. {_AGAIN}")
        done += got


def encode_tail(header: dict[str, Any], tables: dict[str, bytes], begins_at: int) -> tuple[bytes, bytes]:
    """(what stands at the file's begin, what stands behind its pixels, from `begins_at` on)."""
    tail = b"".join(tables[name] for name in _TABLES)
    about = {
        "tables": {name: len(tables[name]) for name in _TABLES},
        "tables_sha256": hashlib.sha256(tail).hexdigest(),
    }
    text = json.dumps(header | about, allow_nan=False, ensure_ascii=False).encode()
    digest = hashlib.sha256(text).digest()
    return _PREAMBLE.pack(_MAGIC, SCHEMA, 0, begins_at + len(tail), len(text), digest), tail + text


def read_packed(path: Path) -> Packed:
    """The header and tables of `path`, checked; the pixels are checked block by block when they are read.

    DataError where the file is of a newer schema, cut or damaged.
    """
    try:
        with path.open("rb") as file:
            header, raw = _read_tail(path, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Expected a readable file.") from error
    count, channels, height, width = header["shape"]
    ends = np.frombuffer(raw["block_ends"], "<i8").astype(np.int64)
    digests = np.frombuffer(raw["block_sha256"], np.uint8).reshape(-1, 32)
    return Packed(
        header,
        np.frombuffer(raw["labels"], "<i8").astype(np.int64),
        np.frombuffer(raw["part"], np.uint8),
        Ids(raw["ids"], count),
        PackedImages(path, (count, channels, height, width), ends, digests),
    )


def _read_tail(path: Path, handle: int, size: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    start = bytearray(_PREAMBLE.size)
    read_at(handle, path, 0, memoryview(start))
    _, schema, _, offset, length, digest = _PREAMBLE.unpack(start)
    if schema < SCHEMA:
        raise DataError(f"{path} is packed by schema {schema}, which no kdedge wrote: it is damaged. {_AGAIN}")
    if schema > SCHEMA:
        raise DataError(f"{path} is packed by schema {schema}; this kdedge reads up to {SCHEMA}. Update kdedge.")
    if offset + length != size:
        raise DataError(f"{path} is cut or damaged: it has {size} bytes, and {offset + length} were packed. {_AGAIN}")
    text = bytearray(length)
    read_at(handle, path, offset, memoryview(text))
    if hashlib.sha256(text).digest() != digest:
        raise DataError(f"{path} is damaged: its header is not what was packed (other sha256). {_AGAIN}")
    header: dict[str, Any] = json.loads(text)
    tables, found = {}, hashlib.sha256()
    begin = offset - sum(header["tables"].values())
    for name in _TABLES:
        table = bytearray(header["tables"][name])
        read_at(handle, path, begin, memoryview(table))
        found.update(table)
        tables[name] = bytes(table)
        begin += len(table)
    if found.hexdigest() != header["tables_sha256"]:
        raise DataError(f"{path} is damaged: its list of images is not what was packed (other sha256). {_AGAIN}")
    return header, tables
