"""A packed file while it is made: FILE.part and FILE.part.log.

The log says what the pack is of and has a line for each block, written after its pixels. Both are there until the pack
is whole; then the file takes its name. What a pack left that was stopped or killed is checked by the hashes of its log.

N images, C channels, H and W pixels.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import NDArray

from kdedge.data.packfile import PIXELS_AT, SCHEMA, encode_tail, read_at
from kdedge.data.parallel import Progress
from kdedge.data.source import PARTS, Source
from kdedge.errors import DataError, RunError
from kdedge.runs import sync_folder, write_bytes
from kdedge_device.preprocess import Preprocess

__all__ = ["Block", "Part"]

_BLOCK_BYTES = 2**18  # what is hashed at once: the first image read of a block waits for all of it
_LINE_BYTES = 2**16  # the most of the log's first line
_SPARE_BYTES = 64  # an image: label, part, id, its share of a block's hash


@dataclass(frozen=True)
class Block:
    """Some images in a row of the source: pixels [n, C, H, W] of those that can be decoded, and why others cannot."""

    pixels: NDArray[np.uint8]
    sha256: str
    bad: tuple[tuple[str, str], ...]


@final
class Part:
    """FILE.part and its log, locked while this process writes them."""

    def __init__(self, out: Path, source: Source, preprocess: Preprocess) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.part")
        self.log_path = out.with_name(f"{out.name}.part.log")
        self.source, self.preprocess = source, preprocess
        self.image_bytes = preprocess.channels * preprocess.height * preprocess.width
        self.in_block = max(1, _BLOCK_BYTES // self.image_bytes)
        self.lines: list[list[Any]] = []  # [images, sha256, [[id, why not], ...]] of each block
        self.images = 0

    @property
    def bad(self) -> list[tuple[str, str]]:
        return [(identity, reason) for line in self.lines for identity, reason in line[2]]

    @property
    def tried(self) -> int:
        return min(len(self.lines) * self.in_block, len(self.source))

    def __enter__(self) -> "Part":
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink():
            raise self._foreign(self.path)
        if self._logged() is None and self.log_path.exists() and self.log_path.stat().st_size:
            raise self._foreign(self.log_path)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._pixels: BinaryIO = os.fdopen(os.open(self.path, flags, 0o666), "r+b")
        try:
            self._require_mine()
        except BaseException:
            self._pixels.close()
            raise
        return self

    def _require_mine(self) -> None:
        """Lock FILE.part; DataError where another process has it, and where it or its log is not of this pack."""
        import fcntl  # not on Windows, where everything else of this room works

        busy = DataError(f"Another kdedge packs into {self.out}. Wait for it, or choose another --out.")
        try:
            fcntl.flock(self._pixels, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise busy from None
        mine = os.fstat(self._pixels.fileno())
        if self.out.exists():  # its pack ended between our look and our lock: what is locked may be the whole file
            raise DataError(f"{self.out} was made meanwhile and was not touched.")
        if not self.path.exists() or not os.path.samestat(mine, self.path.stat()):
            raise busy
        logged = self._logged()
        if not stat.S_ISREG(mine.st_mode) or (mine.st_size and logged is None):
            raise self._foreign(self.path)
        if mine.st_size and logged != self._identity():
            raise DataError(
                f"{self.path} is what a stopped pack of other images, or at another --px or --channels, has left, and "
                f"was not touched. Go on with that one, remove {self.path}, or choose another --out."
            )

    def _foreign(self, path: Path) -> DataError:
        return DataError(f"{path} is no pack of kdedge and was not touched. Move it, or choose another --out.")

    def __exit__(self, *_: object) -> None:
        self._pixels.close()

    def go_on(self, progress: Progress | None) -> int:
        """Check what a pack of the same images left, drop what is not whole; the number of images kept."""
        lines = self._old_lines()
        for line in lines:
            content = bytearray(line[0] * self.image_bytes)
            try:
                read_at(self._pixels.fileno(), self.path, self._end(), memoryview(content))
            except DataError:  # shorter than its log: the machine went down
                break
            if hashlib.sha256(content).hexdigest() != line[1]:
                break
            self._count(line)
            if progress is not None:
                progress(self.tried, len(self.source))
        self._pixels.truncate(self._end())
        self._pixels.seek(self._end())
        self._keep_log()
        return self.images

    def _keep_log(self) -> None:
        """The log as it should be, before the first pixel; not written again where it is: a full disk may be why the
        pack was stopped, and must not cost what is kept.
        """
        content = "".join(json.dumps(text) + "\n" for text in (self._identity(), *self.lines)).encode()
        if self.log_path.is_file() and self.log_path.read_bytes() == content:
            return
        try:
            write_bytes(self.log_path, content)
        except RunError as error:  # its advice is for a training
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    def _logged(self) -> dict[str, Any] | None:
        """What the log says that the pack is of; None where it is missing or not written by kdedge."""
        if not self.log_path.is_file():  # opening a pipe would wait forever
            return None
        try:
            with self.log_path.open("rb") as log:
                found = json.loads(log.readline(_LINE_BYTES))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.keys() >= self._identity().keys() else None

    def _old_lines(self) -> list[list[Any]]:
        """Blocks that the log tells of, where it is of these images; the last line may be torn."""
        try:
            texts = self.log_path.read_text(encoding="utf-8").splitlines()
            if json.loads(texts[0]) != self._identity():
                return []
        except (OSError, ValueError, IndexError):
            return []
        lines: list[list[Any]] = []
        with contextlib.suppress(ValueError):
            for text in texts[1:]:
                count, digest, bad = json.loads(text)
                lines.append([count, digest, bad])
        return lines

    def _identity(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "fingerprint": self.source.fingerprint,
            "images": len(self.source),
            "preprocess": self.preprocess.to_json(),
            "in_block": self.in_block,
        }

    def _end(self) -> int:
        return PIXELS_AT + self.images * self.image_bytes

    def _count(self, line: list[Any]) -> None:
        self.lines.append(line)
        self.images += int(line[0])

    def missing(self) -> list[range]:
        """Indices of the source, block by block, that are not packed yet."""
        starts = range(self.tried, len(self.source), self.in_block)
        return [range(start, min(start + self.in_block, len(self.source))) for start in starts]

    def check_space(self) -> None:
        """DataError before anything is decoded, where the rest cannot fit."""
        wanted = (len(self.source) - self.tried) * (self.image_bytes + _SPARE_BYTES)
        free = shutil.disk_usage(self.out.parent).free
        if wanted > free:
            raise DataError(
                f"{self.out} needs {wanted / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free on that disk. Free "
                "some space, choose another --out, or a smaller --px."
            )

    def write(self, block: Block) -> None:
        """Pixels first, then the line that tells of them."""
        self._pixels.write(block.pixels.data)
        self._pixels.flush()
        line = [len(block.pixels), block.sha256, block.bad]
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self._count(line)

    def finish(self, packed: Source) -> int:
        """Header and tables behind the pixels; then the file takes its name. Its bytes."""
        counts = np.array([line[0] for line in self.lines if line[0]], dtype="<i8")
        tables = {
            "labels": packed.labels.astype("<i8").tobytes(),
            "part": np.array([PARTS.index(part) for part in packed.part], dtype=np.uint8).tobytes(),
            "block_ends": np.cumsum(counts).astype("<i8").tobytes(),
            "block_sha256": b"".join(bytes.fromhex(line[1]) for line in self.lines if line[0]),
            "ids": "\0".join(packed.ids).encode(),
        }
        start, tail = encode_tail(_header(packed, self.preprocess), tables, self._end())
        self._pixels.seek(self._end())
        self._pixels.write(tail)
        self._pixels.seek(0)
        self._pixels.write(start)
        self._pixels.flush()
        os.fsync(self._pixels.fileno())
        if self.out.exists():
            raise DataError(f"{self.out} was made meanwhile and is not touched; the pack is whole in {self.path}.")
        self.path.replace(self.out)
        sync_folder(self.out.parent)
        self.log_path.unlink(missing_ok=True)
        return self.out.stat().st_size


def _header(source: Source, preprocess: Preprocess) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": source.name,
        "spec": source.spec,
        "shape": [len(source), preprocess.channels, preprocess.height, preprocess.width],
        "preprocess": preprocess.to_json(),
        "classes": source.classes,
        "channels": source.channels,
        "native_px": source.native_px,
        "kind": source.kind,
        "flip_allowed": source.flip_allowed,
        "default_labels": source.default_labels,
        "fingerprint": source.fingerprint,
        "warnings": source.warnings,
        "unreadable": source.unreadable,
        "ignored": source.ignored,
    }
