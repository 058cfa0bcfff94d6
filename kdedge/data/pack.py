"""`kdedge data pack`: every image decoded once, into one file that any run reads as it needs it.

N images, C channels, H and W pixels.
"""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from kdedge.data.packfile import read_packed
from kdedge.data.packpart import Block, Part
from kdedge.data.parallel import Progress, stream_threads
from kdedge.data.source import PARTS, Source, check_unreadable, usual_px
from kdedge.errors import DataError
from kdedge_device.preprocess import ImageUnreadable, Preprocess

__all__ = ["PackReport", "open_packed", "pack", "require_new"]


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


def require_new(out: Path) -> None:
    """DataError where something lies at `out`."""
    if out.exists() or out.is_symlink():
        raise DataError(f"{out} exists and was not touched. Choose another name with --out, or remove it.")


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
    require_new(out)
    side = px or usual_px(source.kind, min(source.native_px))
    planes = channels or source.channels
    preprocess = Preprocess(side, side, planes, "short-side-crop", (0.0,) * planes, (1.0,) * planes)
    warnings = (*source.warnings, *filter(None, [source.remark(preprocess)]))
    source.require_packed(preprocess)
    try:
        with Part(out, source, preprocess) as part:
            kept = part.go_on(progress)
            part.check_space()
            with closing(stream_threads(partial(_decode, source, preprocess), part.missing(), workers)) as blocks:
                for block in blocks:
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


def _decode(source: Source, preprocess: Preprocess, indices: range) -> Block:
    pixels = np.empty((len(indices), preprocess.channels, preprocess.height, preprocess.width), dtype=np.uint8)
    good, bad = 0, []
    for index in indices:
        try:
            pixels[good] = source.images.read(index, preprocess).transpose(2, 0, 1)
            good += 1
        except ImageUnreadable as error:
            bad.append((source.ids[index], error.reason))
    return Block(pixels[:good], hashlib.sha256(pixels[:good].data).hexdigest(), tuple(bad))


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


def open_packed(path: Path, spec: str, max_unreadable_fraction: float) -> Source:
    """The source that was packed, its images read from `path`.

    Its fingerprint is that of the source, since at the size it is packed with its pixels are the same by value: splits,
    weights and records of both agree. DataError where the file is damaged, cut or of a newer kdedge.
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
