"""Who learns from what, and who is asked at the end: labeled, unlabeled, val, test, calibration, gate.

Draws go by sha256(seed, purpose, id), not by a generator's stream: the same on every machine and numpy version,
independent of the order in which files were found, and nested (40 labels are among the 80 of the same seed).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdedge.data.source import Indices, Source
from kdedge.data.words import counted, first_few
from kdedge.errors import DataError

__all__ = ["SPLIT_NAMES", "Splits", "export_splits", "make_splits"]

_SCHEMA = 1
_CALIBRATION_IMAGES = 512
_GATE_IMAGES = 1000
_VAL_FRACTION = 0.2  # of the labelled images of each class
_VAL_AT_LEAST = 10  # a class; with fewer, val would choose by chance
SPLIT_NAMES = ("labeled", "unlabeled", "val", "test", "calibration", "gate")


@dataclass(frozen=True, eq=False)
class Splits:
    """Indices into a source, int64. `labeled`, `unlabeled`, `val` and `test` ascend; the other two are in drawn order.

    labeled <= unlabeled (FixMatch learns from both views of a labelled image too). calibration and gate are drawn from
    unlabeled and share no image; val and test share none with any other. `truth` [N] is for reports only: nothing may
    learn from truth of images that are not in labeled. `labels` is the N asked for (val included), None for all.
    `leaks` are the images of unlabeled that val or test has too; `lookalikes` counts those that are nearly there and
    were left in, being too many for accidents (`leaks.without_leaks`).
    """

    labeled: Indices
    unlabeled: Indices
    val: Indices
    test: Indices
    calibration: Indices
    gate: Indices
    truth: NDArray[np.int64]
    labels: int | None
    seed: int
    test_is_val: bool = False
    warnings: tuple[str, ...] = ()
    leaks: tuple[dict[str, Any], ...] = ()
    lookalikes: int = 0

    def indices(self) -> dict[str, Indices]:
        """Split name -> indices."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: found[name] for name in SPLIT_NAMES}

    def to_json(self, source: Source) -> dict[str, Any]:
        """The document of splits.json."""
        used = np.concatenate(list(self.indices().values()))
        left_out = np.setdiff1d(np.arange(len(source)), used)
        return {
            "schema": _SCHEMA,
            "data": source.spec,
            "name": source.name,
            "fingerprint": source.fingerprint,
            "classes": list(source.classes),
            "labels": self.labels,
            "seed": self.seed,
            "test_is_val": self.test_is_val,
            "images": len(source),
            "unreadable": [identity for identity, _ in source.unreadable],
            "warnings": list(self.warnings),
            "leaks": list(self.leaks),
            "lookalikes": self.lookalikes,
            "left_out": [source.ids[i] for i in left_out],
            "splits": {name: _split_json(source, indices) for name, indices in self.indices().items()},
        }

    @staticmethod
    def from_json(document: Any, source: Source) -> "Splits":
        """The splits of `document` in a source opened anew; DataError where the two do not belong together."""
        splits = _checked(document)
        _same_images(document, splits, source)
        index = {identity: i for i, identity in enumerate(source.ids)}
        arrays = {name: _array(index[identity] for identity in splits[name]["ids"]) for name in SPLIT_NAMES}
        return Splits(
            **arrays,
            truth=source.labels,
            labels=document["labels"],
            seed=document["seed"],
            test_is_val=document["test_is_val"],
            warnings=tuple(document["warnings"]),
            leaks=tuple(document.get("leaks", ())),  # runs of 0.1.0 have none
            lookalikes=document.get("lookalikes", 0),
        )


def _array(values: Iterable[int]) -> Indices:
    return np.array(list(values), dtype=np.int64)


def _split_json(source: Source, indices: Indices) -> dict[str, Any]:
    ids = [source.ids[i] for i in indices]
    return {"count": len(ids), "sha256": _hash(ids), "indices": indices.tolist(), "ids": ids}


def _hash(ids: Sequence[str]) -> str:
    """sha256 of the ids in code-point order, one a line: the same for the same set of images."""
    return hashlib.sha256("".join(f"{identity}\n" for identity in sorted(ids)).encode()).hexdigest()


def _checked(document: Any) -> dict[str, dict[str, Any]]:
    """The "splits" of a document whose form and hashes are right."""
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise DataError("splits.json has no integer 'schema'. It was not written by kdedge, or was altered.")
    if document["schema"] > _SCHEMA:
        raise DataError(
            f"splits.json has schema {document['schema']}; this kdedge reads up to {_SCHEMA}. Update kdedge."
        )
    try:
        splits = {name: dict(document["splits"][name]) for name in SPLIT_NAMES}
        for key in ("fingerprint", "classes", "labels", "seed", "test_is_val", "unreadable", "warnings"):
            document[key]
        altered = [name for name in SPLIT_NAMES if _hash(splits[name]["ids"]) != splits[name]["sha256"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"splits.json lacks or misspells {error}. It was altered; restore it, or train anew.") from None
    if altered:
        raise DataError(
            f"splits.json was altered: the ids of {', '.join(altered)} do not match their sha256. Restore it."
        )
    return splits


def _same_images(document: dict[str, Any], splits: dict[str, dict[str, Any]], source: Source) -> None:
    """DataError that names what is missing, new or changed."""
    known = {identity for split in splits.values() for identity in split["ids"]}
    known |= set(document.get("left_out", ()))
    before, now = set(document["unreadable"]), set(source.ids)
    missing = sorted(known - now)
    new = sorted(now - known - before)
    if list(source.classes) != document["classes"]:
        raise DataError(
            f"{source.name} has the classes {first_few(source.classes, 8)}; the run was made with "
            f"{first_few(document['classes'], 8)}. Restore the data, or train anew."
        )
    if missing or new:
        found = [f"{counted(len(missing), 'image')} missing: {first_few(missing)}"] if missing else []
        found += [f"{counted(len(new), 'image')} new: {first_few(new)}"] if new else []
        raise DataError(
            f"{source.spec} no longer holds the images of the run ({'; '.join(found)}). Expected the same files. "
            "Restore them, or train anew in another folder."
        )
    if source.fingerprint != document["fingerprint"]:
        raise DataError(
            f"{source.spec} has the file names of the run, but other contents or labels (fingerprint "
            f"{source.fingerprint[:12]}, {document['fingerprint'][:12]} was expected). Restore the data, or train "
            "anew."
        )


def _drawn(source: Source, indices: Indices, seed: int, purpose: str) -> Indices:
    """`indices` in an order drawn by seed and purpose."""
    digests = np.empty((len(indices), 4), dtype=">u8")  # sha256 as four numbers: a million are 32 MB, not 200
    for row, i in enumerate(indices):
        digests[row] = np.frombuffer(hashlib.sha256(f"{seed}\n{purpose}\n{source.ids[i]}".encode()).digest(), ">u8")
    return indices[np.lexsort(digests.T[::-1])]


def make_splits(source: Source, labels: int | None = None, seed: int = 0) -> Splits:
    """Draw the splits; `labels` None is the source's default, and where it has none every label is kept.

    With a number of labels val is carved from them, and the source's own val part beside a test part is left out:
    the number counts every labelled image that is used.

    DataError where `labels` does not divide among the classes, or a class is too small: it names the nearest N.
    """
    wanted = source.default_labels if labels is None else labels
    train = np.flatnonzero(source.part == "train")
    by_class = [_drawn(source, train[source.labels[train] == c], seed, "label") for c in range(len(source.classes))]
    _check_trainable(source, by_class)
    if wanted is not None:
        _check_labels(source, wanted, by_class)
        by_class = [members[: wanted // len(by_class)] for members in by_class]
    test_is_val = source.test_is_val
    own_val = np.flatnonzero(source.part == "val")
    test = own_val if test_is_val else np.flatnonzero(source.part == "test")
    if len(own_val) and not test_is_val and wanted is None:
        val = own_val
    else:
        by_class, val = _carve_val(by_class)
    labeled = np.sort(np.concatenate(by_class))
    pool = np.setdiff1d(np.flatnonzero((source.part == "train") | (source.part == "unlabeled")), val)
    calibration, gate = export_splits(source, pool, seed)
    return Splits(
        labeled=labeled,
        unlabeled=pool,
        val=val,
        test=test,
        calibration=calibration,
        gate=gate,
        truth=source.labels,
        labels=wanted,
        seed=seed,
        test_is_val=test_is_val,
        warnings=_notes(source, labeled, pool, test, unused_val=0 if test_is_val or wanted is None else len(own_val)),
    )


def _carve_val(by_class: Sequence[Indices]) -> tuple[list[Indices], Indices]:
    """(labelled images left, val): a fifth of each class where that is enough in every class, else none."""
    sizes = [int(_VAL_FRACTION * len(members)) for members in by_class]
    if min(sizes) < _VAL_AT_LEAST:
        return list(by_class), _array([])
    val = np.concatenate([members[:size] for members, size in zip(by_class, sizes, strict=True)])
    return [members[size:] for members, size in zip(by_class, sizes, strict=True)], np.sort(val)


def export_splits(source: Source, pool: Indices, seed: int = 0) -> tuple[Indices, Indices]:
    """(calibration, gate) drawn from `pool`, disjoint. A pool too small for both gives a third to calibration."""
    drawn = _drawn(source, pool, seed, "export")
    if len(drawn) >= _CALIBRATION_IMAGES + _GATE_IMAGES:
        return drawn[:_CALIBRATION_IMAGES], drawn[_CALIBRATION_IMAGES : _CALIBRATION_IMAGES + _GATE_IMAGES]
    third = min(_CALIBRATION_IMAGES, max(1, len(drawn) // 3))
    return drawn[:third], drawn[third : third + _GATE_IMAGES]


def _check_trainable(source: Source, by_class: Sequence[Indices]) -> None:
    if not any(len(members) for members in by_class):
        raise DataError(
            f"{source.name} has no labelled training image ({_counts(source)}). Expected some in labeled/CLASS/ or "
            "train/CLASS/."
        )
    if len(by_class) < 2:
        raise DataError(
            f"{source.name} has one class, '{source.classes[0]}'. Expected at least two: a classifier of one has "
            "nothing to learn."
        )


def _counts(source: Source) -> str:
    return ", ".join(f"{part}: {count:,}" for part, count in source.counts().items() if count)


def _check_labels(source: Source, labels: int, by_class: Sequence[Indices]) -> None:
    """DataError with the nearest number of labels that works."""
    classes = len(by_class)
    smallest = min(range(classes), key=lambda c: len(by_class[c]))
    most = len(by_class[smallest]) * classes
    if labels % classes == 0 and classes <= labels <= most:
        return
    nearest = min(max(classes, classes * round(labels / classes)), most)
    if labels > most:
        why = (
            f"the smallest class, '{source.classes[smallest]}', has "
            f"{counted(len(by_class[smallest]), 'labelled training image')}, so at most {classes} x "
            f"{len(by_class[smallest])} = {most} can be drawn evenly"
        )
    elif labels < classes:
        why = f"there are {classes} classes, and each needs at least one"
    else:
        why = f"it cannot be divided evenly among {classes} classes"
    raise DataError(
        f"{labels} labels do not work for {source.name}: {why}. The nearest number that works is {nearest}: --labels "
        f"{nearest}."
    )


def _notes(source: Source, labeled: Indices, pool: Indices, test: Indices, unused_val: int) -> tuple[str, ...]:
    notes = []
    if unused_val:
        notes.append(
            f"The {counted(unused_val, 'image')} of val/ are left out: --labels counts every labelled image that is "
            "used, and val is carved from those. Without --labels, val/ is used."
        )
    if len(pool) == len(labeled):
        notes.append(
            "Every training image keeps its label, so there is nothing unlabeled to learn from. Give --labels N to "
            "keep N labels, or add an unlabeled/ folder."
        )
    if not len(test):
        notes.append(
            f"{source.name} has no test images, so no test accuracy can be reported. Add a test/ folder for one."
        )
    return tuple(notes)
