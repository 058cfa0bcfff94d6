"""From a list of files with their class and part to a source.

Headers are read, what is unreadable is left out, and sizes are known.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdedge.data.files import FileHeader, ImageFile, Member, read_file_header
from kdedge.data.parallel import run_threads
from kdedge.data.source import PARTS, SMALL_PX, FileImages, Source, check_unreadable, fingerprint_of
from kdedge.data.words import counted, first_few
from kdedge.errors import BugError, DataError, did_you_mean

__all__ = ["Entry", "build_source"]

_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F"})


@dataclass(frozen=True)
class Entry:
    """One image file. `label` is a class name, or None where it is not known.

    `header` is what is known of the file beforehand: nothing, its header, or why it cannot be read. What lies in a tar
    comes with it, from the tar's index.
    """

    id: str
    file: ImageFile
    label: str | None
    part: str
    header: FileHeader | str | None = None


def build_source(
    name: str,
    spec: str,
    entries: Sequence[Entry],
    max_unreadable_fraction: float,
    warnings: Sequence[str] = (),
    ignored: Sequence[str] = (),
    default_labels: int | None = None,
    declared: Sequence[str] = (),
) -> Source:
    """`declared` are class folders; one without a single image is an error. DataError where nothing can be read."""
    ordered = sorted(entries, key=lambda entry: entry.id.encode("utf-8", "surrogateescape"))
    headers = run_threads(_header, ordered)
    bad = [(_shown(e.id), h) for e, h in zip(ordered, headers, strict=True) if isinstance(h, str)]
    sentence = check_unreadable(name, bad, len(ordered), max_unreadable_fraction)
    good = [(e, h) for e, h in zip(ordered, headers, strict=True) if isinstance(h, FileHeader)]
    kept, found = [e for e, _ in good], [h for _, h in good]
    classes = _classes(name, kept, declared)
    number = {label: index for index, label in enumerate(classes)}
    labels = np.array([-1 if e.label is None else number[e.label] for e in kept], dtype=np.int64)
    part = np.array([e.part for e in kept], dtype="<U9")
    ids = tuple(e.id for e in kept)
    height, width = int(np.median([h.height for h in found])), int(np.median([h.width for h in found]))
    flip, flip_note = _flip(classes)
    notes = [*warnings, sentence, flip_note, *_part_notes(part, labels, classes)]
    return Source(
        name=name,
        spec=spec,
        classes=classes,
        ids=ids,
        labels=labels,
        part=part,
        channels=1 if all(h.mode in _GREY_MODES for h in found) else 3,
        native_px=(height, width),
        kind="small" if min(height, width) <= SMALL_PX else "photo",
        flip_allowed=flip,
        images=FileImages(tuple(e.file for e in kept)),
        fingerprint=fingerprint_of(classes, ids, labels, part, np.array([h.bytes for h in found], "<i8").tobytes()),
        default_labels=default_labels,
        warnings=tuple(note for note in notes if note),
        unreadable=tuple(bad),
        ignored=tuple(_shown(path) for path in ignored),
        max_unreadable_fraction=max_unreadable_fraction,
    )


def _header(entry: Entry) -> FileHeader | str:
    if _shown(entry.id) != entry.id:
        return "its name is not valid UTF-8"  # it could not be written into splits.json
    if entry.header is not None:
        return entry.header
    if isinstance(entry.file, Member):
        raise BugError(f"{entry.id} lies in a tar and came without its header")
    return read_file_header(entry.file)


def _shown(name: str) -> str:
    """`name` as it can be printed and written, bytes that are no UTF-8 escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _classes(name: str, kept: Sequence[Entry], declared: Sequence[str]) -> tuple[str, ...]:
    """Class names in code-point order: those of the training images, which all others must be among."""
    taught = {e.label for e in kept if e.part == "train" and e.label is not None}
    everywhere = {e.label for e in kept if e.label is not None}
    empty = sorted(set(declared) - taught)
    if taught and empty:
        raise DataError(
            f"{name} has {counted(len(empty), 'class folder')} without a readable training image: {first_few(empty)}. "
            "Expected at least one image a class. Add images, or remove the folder."
        )
    unknown = sorted(everywhere - taught)
    if taught and unknown:
        sample = next(e for e in kept if e.label == unknown[0])
        raise DataError(
            f"{sample.id} is of class '{unknown[0]}', which has no training image in {name}; its {len(taught)} "
            f"classes are {first_few(sorted(taught), 8)}.{did_you_mean(unknown[0], taught)} Rename the class, or add "
            "training images."
        )
    return tuple(sorted(taught or everywhere))


def _flip(classes: Sequence[str]) -> tuple[bool, str]:
    """Whether a mirrored image keeps its class, judged by the names; and the sentence that says so where not."""
    if classes and all(len(label) == 1 for label in classes):
        return False, "The classes are single characters, so images are not mirrored in training."
    sides = [label for label in classes if "left" in label.lower() or "right" in label.lower()]
    if sides:
        return False, f"Class names hold left or right ({first_few(sides)}), so images are not mirrored in training."
    return True, ""


def _part_notes(part: NDArray[np.str_], labels: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    notes = []
    counts = Counter(part.tolist())
    if counts["val"] and not counts["test"]:
        notes.append("There is no test part: val is used as the test, and reported as such.")
    for name in PARTS[2:]:
        missing = [label for i, label in enumerate(classes) if not ((part == name) & (labels == i)).any()]
        if counts[name] and missing:
            of = counted(len(missing), "class", "classes")
            notes.append(f"The {name} part has no image of {of}: {first_few(missing)}.")
    return notes
