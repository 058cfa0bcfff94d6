"""`kdedge data pack`: every image decoded once, into one file that any run reads as it needs it.

A pack is written under FILE.part, with FILE.part.log beside it: what it is of, and a line for each block. Both are
there until the pack is whole; then the file takes its name. A pack that was stopped or killed checks what it has by
the hashes of the log, and goes on behind it.

N images, C channels, H and W pixels.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import NDArray

from kdedge.data.packfile import PIXELS_AT, SCHEMA, encode_tail, read_at, read_packed
from kdedge.data.parallel import Progress, stream_threads
from kdedge.data.source import PARTS, Source, check_unreadable, usual_px
from kdedge.errors import DataError
from kdedge_device.preprocess import ImageUnreadable, Preprocess

__all__ = ["PackReport", "open_packed", "pack"]

_BLOCK_BYTES = 2**18  # what is hashed at once: the first image read of a block waits for all of it
_SPARE_BYTES = 64  # an image: label, part, id, its share of a block's hash


@dataclass(frozen=True)
class PackReport:
    """What was packed. `kept` images were there already, from a pack that was stopped."""

    path: Path
    shape: tuple[int, int, int, int]
    bytes: int
    kept: int
    unreadable: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    fingerprint: str
    counts: dict[str, int]  # images of each part


@dataclass(frozen=True)
class _Block:
    """Some images in a row of the source: pixels [n, C, H, W] of those that can be decoded, and why others cannot."""

    pixels: NDArray[np.uint8]
    sha256: str
    bad: tuple[tuple[str, str], ...]


def pack(
    source: Source,
    out: Path,
    *,
    px: int | None = None,
    channels: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Decode every image of `source` to px x px with `channels`, as `Source.load` does, and write `out`.

    Without `px` the size that a run would choose, without `channels` those of the source. Images that cannot be decoded
    are left out. DataError where `out` exists, the disk is full, another pack writes to it, or too many are unreadable.
    """
    if out.exists() or out.is_symlink():
        raise DataError(f"{out} exists and was not touched. Choose another name with --out, or remove it.")
    side = px or usual_px(source.kind, min(source.native_px))
    planes = channels or source.channels
    preprocess = Preprocess(side, side, planes, "short-side-crop", (0.0,) * planes, (1.0,) * planes)
    warnings = (*source.warnings, *filter(None, [source.remark(preprocess)]))
    source.require_packed(preprocess)
    try:
        with _Part(out, source, preprocess) as part:
            kept = part.go_on(progress)
            part.check_space()
            for block in stream_threads(partial(_decode, source, preprocess), part.missing(), workers):
                part.write(block)
                if progress is not None:
                    progress(part.tried, len(source))
            packed = _without(source, part.bad, warnings)
            size = part.finish(packed)
    except OSError as error:
        raise DataError(
            f"Cannot write {out}: {error.strerror or error}. Anything packed so far is kept in {out}.part; free some "
            "space, or make the folder writable, and run the same command again: it goes on there."
        ) from error
    shape = (len(packed), planes, side, side)
    return PackReport(out, shape, size, kept, packed.unreadable, packed.warnings, packed.fingerprint, packed.counts())


def _decode(source: Source, preprocess: Preprocess, indices: range) -> _Block:
    pixels = np.empty((len(indices), preprocess.channels, preprocess.height, preprocess.width), dtype=np.uint8)
    good, bad = 0, []
    for index in indices:
        try:
            pixels[good] = source.images.read(index, preprocess).transpose(2, 0, 1)
            good += 1
        except ImageUnreadable as error:
            bad.append((source.ids[index], error.reason))
    return _Block(pixels[:good], hashlib.sha256(pixels[:good].data).hexdigest(), tuple(bad))


def _without(source: Source, bad: Sequence[tuple[str, str]], warnings: tuple[str, ...]) -> Source:
    """`source` without images that cannot be decoded, as `Source.decodable` leaves them out."""
    if not bad:
        return replace(source, warnings=warnings)
    sentence = check_unreadable(
        source.name, bad, len(source), source.max_unreadable_fraction, already=source.unreadable
    )
    gone = {identity for identity, _ in bad}
    keep = np.array([identity not in gone for identity in source.ids])
    return replace(
        source,
        ids=tuple(identity for identity in source.ids if identity not in gone),
        labels=source.labels[keep],
        part=source.part[keep],
        unreadable=(*source.unreadable, *bad),
        warnings=(*warnings, sentence),
    )


@final
class _Part:
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

    def __enter__(self) -> "_Part":
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._pixels: BinaryIO = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(self._pixels, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._pixels.close()
            raise DataError(f"Another kdedge packs into {self.out}. Wait for it, or choose another --out.") from None
        return self

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
        with self.log_path.open("w", encoding="utf-8") as log:
            for text in (self._identity(), *self.lines):
                log.write(json.dumps(text) + "\n")
        return self.images

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

    def write(self, block: _Block) -> None:
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


def open_packed(path: Path, spec: str, max_unreadable_fraction: float) -> Source:
    """The source that was packed, its images read from `path`.

    Its fingerprint is that of the source: at the size it is packed with, its pixels are the same by value, so a run
    of the one can be resumed with the other. DataError where the file is damaged, cut or of a newer kdedge.
    """
    packed = read_packed(path)
    header = packed.header
    height, width = header["native_px"]
    return Source(
        name=header["name"],
        spec=spec,
        classes=tuple(header["classes"]),
        ids=packed.ids,
        labels=packed.labels,
        part=np.array(PARTS, dtype="<U9")[packed.part],
        channels=header["channels"],
        native_px=(height, width),
        kind=header["kind"],
        flip_allowed=header["flip_allowed"],
        images=packed.images,
        fingerprint=header["fingerprint"],
        default_labels=header["default_labels"],
        warnings=tuple(header["warnings"]),
        unreadable=tuple((identity, reason) for identity, reason in header["unreadable"]),
        ignored=tuple(header["ignored"]),
        max_unreadable_fraction=max_unreadable_fraction,
    )
