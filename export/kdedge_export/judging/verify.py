"""Proof of the files that ship: what each says of the same images, beside what FP32 says. Pure functions of logits.

It decides nothing: it is made of test images, after every choice. N images, K classes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.errors import BugError, ExportError
from kdedge.intervals import wilson
from kdedge_device.preprocess import Preprocess
from kdedge_export.judging.divergence import Divergence
from kdedge_export.judging.gate import Agreement, agreement

__all__ = ["ClassChange", "FileProof", "LogitError", "Proof", "collect", "prove"]

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Run = Callable[[npt.NDArray[np.float32]], Logits]
REFERENCE = "fp32"
BATCH = 32
TOLD_CLASSES = 3


@dataclass(frozen=True)
class LogitError:
    """Difference to FP32's logits: the largest and the root mean square, also as shares of the span of FP32's."""

    max: float
    rms: float
    max_of_span: float
    rms_of_span: float
    sqnr_db: float | None  # None: equal to the last bit


@dataclass(frozen=True)
class ClassChange:
    """FP32 gives the class to `given` images, of which `left` get another from this file; `joined` come from others.

    `right_before`, `right_after`: of the `labeled` images that are of it, those FP32 and this file give it to.
    """

    name: str
    given: int
    left: int
    joined: int
    labeled: int
    right_before: int
    right_after: int


@dataclass(frozen=True)
class FileProof:
    """`top1`: share of labelled images that are right, with its 95 % Wilson interval. `classes`: those that changed."""

    name: str
    top1: float | None
    top1_interval: tuple[float, float] | None
    agreement: Agreement
    logit_error: LogitError
    classes: tuple[ClassChange, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "top1_interval": list(self.top1_interval) if self.top1_interval else None,
            "agreement": self.agreement.to_json(),
            "logit_error": asdict(self.logit_error),
            "classes": [asdict(each) for each in self.classes],
        }


@dataclass(frozen=True)
class Proof:
    """`layers`: for INT8 files, where they leave their float file."""

    split: str
    images: int
    files: tuple[FileProof, ...]
    layers: Mapping[str, Divergence] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the manifest, or a file of its own."""
        return {
            "reference": REFERENCE,
            "split": self.split,
            "images": self.images,
            "files": {each.name: each.to_json() for each in self.files},
            "layers": {name: each.to_json() for name, each in self.layers.items()},
        }

    def text(self) -> str:
        """A table, a line for each file, then what its worst classes and its first layer to diverge are."""
        rows = [("", "top-1", "agrees with FP32", "logits off by (rms, largest)")]
        rows += [_row(each) for each in self.files]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for each in self.files:
            worst = [told for change in each.classes if (told := _loss(change, each.top1 is not None))]
            if worst:
                lines.append(f"{each.name} loses most in: {', '.join(worst[:TOLD_CLASSES])}")
            if each.name in self.layers:
                lines.append(f"{each.name}: {self.layers[each.name].text()}")
        return "\n".join(lines)


def collect(
    runs: Sequence[tuple[str, Run]],
    chunks: Iterable[npt.NDArray[np.uint8]],
    preprocess: Preprocess,
) -> dict[str, Logits]:
    """float32 [N, K] of each of `runs` (name, float32 [n, C, H, W] -> logits) over chunks of uint8 [n, H, W, C].

    Each chunk is normalised once and few images are in memory at a time; that holds of the logits too.
    """
    parts: dict[str, list[Logits]] = {name: [] for name, _ in runs}
    for images in chunks:
        for start in range(0, len(images), BATCH):
            batch = preprocess.normalize(images[start : start + BATCH])
            for name, run in runs:
                parts[name].append(np.asarray(run(batch), dtype=np.float32))
    return {name: np.concatenate(found) if found else np.zeros((0, 0), np.float32) for name, found in parts.items()}


def prove(
    logits: Mapping[str, Logits],
    labels: Labels,
    classes: Sequence[str],
    split: str = "test",
    layers: Mapping[str, Divergence] | None = None,
) -> Proof:
    """Compare each of `logits` [N, K] with those of "fp32"; `labels` [N], -1 where the class is not known.

    BugError where FP32 is not among them or a shape differs, ExportError where a logit is not finite.
    """
    if REFERENCE not in logits:
        raise BugError(f"nothing to compare with: the logits are those of {sorted(logits)}")
    base = logits[REFERENCE]
    for name, each in logits.items():
        if each.shape != base.shape or len(each) != len(labels):
            raise BugError(f"{name} has logits {each.shape} for {len(labels)} images; FP32 has {base.shape}")
        wrong = int((~np.isfinite(each).all(axis=1)).sum()) if each.size else 0
        if wrong:
            raise ExportError(
                f"{name} gives logits that are not finite for {wrong} of {len(each)} images; finite ones were "
                "expected. Its ranges or its FP16 form do not fit this model; export without that file."
            )
    files = tuple(_prove(name, base, each, labels, classes) for name, each in logits.items())
    return Proof(split, len(labels), files, dict(layers or {}))


def _prove(name: str, base: Logits, found: Logits, labels: Labels, classes: Sequence[str]) -> FileProof:
    known = labels >= 0
    top1, interval = None, None
    if known.any():
        top1 = float((found.argmax(1) == labels)[known].mean())
        interval = wilson(top1, int(known.sum()))
    changes = _changes(base, found, labels, classes) if len(base) else ()
    return FileProof(name, top1, interval, agreement(base, found, labels), _logit_error(base, found), changes)


def _logit_error(base: Logits, found: Logits) -> LogitError:
    if not base.size:
        return LogitError(0.0, 0.0, 0.0, 0.0, None)
    error = found.astype(np.float64) - base
    largest, rms = float(np.abs(error).max()), float(np.sqrt(np.square(error).mean()))
    span = max(float(base.max() - base.min()), 1e-12)
    power = float(np.square(base, dtype=np.float64).mean())
    sqnr = 10 * math.log10(power / rms**2) if rms > 0 and power > 0 else None
    return LogitError(largest, rms, largest / span, rms / span, sqnr)


def _changes(base: Logits, found: Logits, labels: Labels, classes: Sequence[str]) -> tuple[ClassChange, ...]:
    """Classes for which an image changed, those that lost most first."""
    before, after, count = base.argmax(1), found.argmax(1), len(classes)
    known = labels >= 0

    def of(values: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(values[chosen], minlength=count)

    everything = np.ones(len(before), bool)
    columns = (
        of(before, everything),
        of(before, before != after),
        of(after, before != after),
        of(labels, known),
        of(labels, known & (before == labels)),
        of(labels, known & (after == labels)),
    )
    changes = [ClassChange(classes[k], *(int(column[k]) for column in columns)) for k in range(count)]
    changed = [each for each in changes if each.left or each.joined or each.right_before != each.right_after]
    return tuple(sorted(changed, key=lambda each: (each.right_after - each.right_before, -each.left)))


def _loss(change: ClassChange, labeled: bool) -> str:
    """What a class lost: right answers where labels are known, else images that now get another class."""
    lost, total = change.left, change.given
    if labeled:
        lost, total = change.right_before - change.right_after, change.labeled
    return f"{change.name} {lost} of {total}" if lost > 0 else ""


def _row(each: FileProof) -> tuple[str, str, str, str]:
    if each.name == REFERENCE:
        agrees, off = "-", "-"
    else:
        error, differ = each.logit_error, each.agreement.disagreement_points
        agrees = "-" if differ is None else f"{100 - differ:.2f} %"
        off = f"{error.rms_of_span:.2%}, {error.max_of_span:.2%} of their span"
    return each.name, "-" if each.top1 is None else f"{each.top1:.4f}", agrees, off
