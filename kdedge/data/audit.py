"""`kdedge data check`: what is in a set and what is wrong with it."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdedge.data.duplicates import HASHABLE_PX, exact_groups, near_pairs, shrunk
from kdedge.data.files import ImageFile, encoded, thumbnail
from kdedge.data.parallel import Progress, run_threads
from kdedge.data.source import PARTS, ArrayImages, FileImages, PackedImages, Source
from kdedge.data.sources import open_source
from kdedge.data.words import counted
from kdedge_device.preprocess import ImageUnreadable, read_header

__all__ = ["check"]

_SCHEMA = 1
_LISTED = 200  # of each kind of finding; counts are always complete
_ROWS = 256  # images read at a time where they lie decoded
_THUMB = tuple[bytes, NDArray[np.uint8] | None, str, str]  # sha256, 32x32 grey, mode, why not


def check(
    spec: str, *, root: Path | None = None, max_unreadable_fraction: float = 0.05, progress: Progress | None = None
) -> dict[str, Any]:
    """Open, hash and decode every image of `spec`. Keys (all JSON):

    images, counts (part -> n), classes (class -> part -> n), unreadable [{file, reason}], unreadable_fraction,
    exact_duplicates [{ids, parts, labels}], near_duplicates [{ids, parts, labels, bits}] (null for images too small to
    tell), leaks (those of both kinds that lie across parts which must not share images), label_conflicts, modes
    (Pillow's name -> n), native_px, channels, ignored, warnings, problems (sentences; empty where all is well), ok.
    Lists are cut at 200 entries; `found` has the full counts.
    """
    source = open_source(spec, root=root, max_unreadable_fraction=1.0)
    if isinstance(source.images, FileImages):
        looked = run_threads(_look_at_file, source.images.files, None, progress)
    else:
        looked = _look_at_arrays(source.images, len(source))
    unreadable = list(source.unreadable) + [
        (identity, why) for identity, (_, _, _, why) in zip(source.ids, looked, strict=True) if why
    ]
    exact = [_finding(source, group) for group in exact_groups([digest for digest, _, _, _ in looked])]
    near = _near(source, looked)
    document = _counted(source) | {
        "unreadable": [{"file": identity, "reason": why} for identity, why in unreadable],
        "unreadable_fraction": len(unreadable) / (len(source) + len(source.unreadable)),
        "exact_duplicates": exact,
        "near_duplicates": near,
        "leaks": [found for found in [*exact, *(near or [])] if _leaks(found["parts"])],
        "label_conflicts": [found for found in exact if len({c for c in found["labels"] if c is not None}) > 1],
        "modes": dict(sorted(Counter(mode for _, _, mode, why in looked if not why).items())),
    }
    return _finished(document, max_unreadable_fraction)


def _look_at_file(file: ImageFile) -> _THUMB:
    try:
        content = encoded(file)
        digest = _digest(content)
        return digest, thumbnail(content), read_header(content).mode, ""
    except ImageUnreadable as error:
        return b"", None, "", error.reason
    except OSError as error:
        return b"", None, "", error.strerror or str(error)


def _digest(content: Path | bytes) -> bytes:
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _look_at_arrays(images: ArrayImages | PackedImages, count: int) -> list[_THUMB]:
    height, width, channels = images.image_shape
    mode = "L" if channels == 1 else "RGB"
    hashable = min(height, width) >= HASHABLE_PX
    found: list[_THUMB] = []
    for start in range(0, count, _ROWS):
        part = images.rows(np.arange(start, min(start + _ROWS, count)))
        thumbnails = shrunk(part) if hashable else [None] * len(part)
        for image, small in zip(part, thumbnails, strict=True):
            found.append((hashlib.sha256(image.data).digest(), small, mode, ""))
    return found


def _finding(source: Source, indices: Sequence[int]) -> dict[str, Any]:
    return {
        "ids": [source.ids[i] for i in indices],
        "parts": [str(source.part[i]) for i in indices],
        "labels": [source.classes[source.labels[i]] if source.labels[i] >= 0 else None for i in indices],
    }


def _near(source: Source, looked: Sequence[_THUMB]) -> list[dict[str, Any]] | None:
    """Pairs that are near but not exact duplicates; None for images too small to tell."""
    if source.readable_px < HASHABLE_PX:
        return None
    # One of each group of exact duplicates stands for all: they are told already.
    first = {digest: i for i, (digest, small, _, _) in reversed(list(enumerate(looked))) if small is not None}
    where = sorted(first.values())
    if not where:
        return []
    thumbnails = np.stack([small for i in where if (small := looked[i][1]) is not None])
    pairs = [(where[i], where[j], bits) for i, j, bits in near_pairs(thumbnails)]
    return [_finding(source, (i, j)) | {"bits": bits} for i, j, bits in pairs]


def _leaks(parts: Sequence[str]) -> bool:
    """Whether one image lies in two parts that must not share any; train and unlabeled may."""
    learned = {"train", "unlabeled"}
    return any(a != b and not {a, b} <= learned for a, b in combinations(parts, 2))


def _counted(source: Source) -> dict[str, Any]:
    classes = {
        label: {part: int(((source.labels == i) & (source.part == part)).sum()) for part in PARTS}
        for i, label in enumerate(source.classes)
    }
    return {
        "schema": _SCHEMA,
        "data": source.spec,
        "name": source.name,
        "images": len(source),
        "counts": source.counts(),
        "classes": classes,
        "channels": source.channels,
        "native_px": list(source.native_px),
        "fingerprint": source.fingerprint,
        "ignored": list(source.ignored),
        "warnings": list(source.warnings),
    }


def _finished(document: dict[str, Any], max_unreadable_fraction: float) -> dict[str, Any]:
    """Add full counts and problems, then cut the lists."""
    lists = ("unreadable", "exact_duplicates", "near_duplicates", "leaks", "label_conflicts", "ignored")
    found = {name: None if document[name] is None else len(document[name]) for name in lists}
    problems = []
    fraction = document["unreadable_fraction"]
    if fraction > max_unreadable_fraction:
        unreadable = counted(len(document["unreadable"]), "image")
        problems.append(f"{unreadable} cannot be read ({fraction:.1%}, more than {max_unreadable_fraction:.1%}).")
    if document["leaks"]:
        leaks = counted(len(document["leaks"]), "image")
        problems.append(f"{leaks}, the same or nearly, in two of train, val and test at once.")
    if document["label_conflicts"]:
        conflicts = counted(len(document["label_conflicts"]), "image")
        problems.append(f"{conflicts} there twice, with different labels.")
    cut = {name: None if document[name] is None else document[name][:_LISTED] for name in lists}
    return document | cut | {"found": found, "problems": problems, "ok": not problems}
