"""How healthy pseudo labels are: what is kept, how much of it is right, and whether one class takes over.

Everything is read off one table of counts [4, K], which adds up over steps:

    row 0   images given each class, kept or not
    row 1   those of them that are kept, by weight
    row 2   those kept whose true class is known
    row 3   those known that are right

The truth is for reports only; no loss reads it. U unlabeled images of a batch, M images of a validation split,
K classes.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from kdedge.intervals import wilson

__all__ = [
    "COUNTS",
    "Alarm",
    "SliceHealth",
    "Tally",
    "collapse",
    "counts_line",
    "pseudo_label_logs",
    "slice_health",
    "summary",
]

COUNTS = "pseudo_label_counts"
"""The entry of `Step.logs` that is summed from one logged line to the next; all others are those of the last step."""

_SURE_Z = 3.0  # standard errors between chance and an alarm
_TAKES_OVER_AFTER = 0.1  # of the steps of a stage; before, the easy class comes first and means nothing
_VANISHED_AFTER = 0.5  # a hard class may come late
_VANISHED_BELOW = 0.1  # of the class's share of the labels
_ENOUGH = 100  # kept labels for each class there is; with fewer the next look sees these too
_NAMED = 5  # vanished classes in one sentence


def pseudo_label_logs(label_U: Tensor, weight_U: Tensor, truth_U: Tensor, classes: int) -> dict[str, Tensor]:
    """The counts [4, K] of one batch. `truth` is -1 where unknown."""
    weight_U = weight_U.detach().float()
    known_U = weight_U * (truth_U >= 0)
    rows_4U = torch.stack([torch.ones_like(weight_U), weight_U, known_U, known_U * (label_U == truth_U)])
    return {COUNTS: torch.zeros(4, classes, device=label_U.device).index_add_(1, label_U, rows_4U)}


def counts_line(counts_4K: Tensor) -> dict[str, Any]:
    """Counts as what is logged; empty where there are none.

    Shares of nothing are NaN, logged as null. `pseudo_label_precision` [K] is the right share of the known labels of
    each class, `pseudo_label_known` [K] how many those are; both are None where no truth is known at all.
    """
    given_K, kept_K, known_K, right_K = counts_4K.to("cpu", copy=True)  # the caller's begin at zero again
    if not given_K.any():
        return {}
    known = bool(known_K.any())
    return {
        "kept_fraction": kept_K.sum() / given_K.sum(),
        "pseudo_label_histogram": kept_K / kept_K.sum().clamp(min=1e-12),
        "pseudo_label_accuracy": right_K.sum() / known_K.sum(),
        "pseudo_label_precision": right_K / known_K if known else None,
        "pseudo_label_known": known_K if known else None,
    }


@dataclass(frozen=True)
class SliceHealth:
    """An evaluation on a labeled slice that is never trained on: the accuracy that chooses, and what else to log."""

    accuracy: float
    logs: dict[str, Any] = field(default_factory=dict)


def slice_health(logits_MK: Tensor, labels_M: Tensor, threshold: float | None) -> SliceHealth:
    """Accuracy, and how good the labels are that a `threshold` on the highest probability would keep.

    Images of unknown class (-1) are left out. A stage without pseudo labels has no threshold, and logs nothing.
    """
    known_M = labels_M >= 0
    logits_MK, labels_M = logits_MK[known_M].float(), labels_M[known_M]
    if not len(labels_M):
        return SliceHealth(0.0)
    confidence_M, label_M = torch.softmax(logits_MK, dim=1).max(1)
    accuracy = float((label_M == labels_M).double().mean())
    if threshold is None:
        return SliceHealth(accuracy)
    counts = pseudo_label_logs(label_M, confidence_M >= threshold, labels_M, logits_MK.shape[1])[COUNTS]
    return SliceHealth(accuracy, {f"val_{name}": value for name, value in counts_line(counts).items()})


@dataclass(frozen=True)
class Alarm:
    """`sentence` says what has happened to the pseudo labels of `classes`, and what to try."""

    classes: tuple[int, ...]
    sentence: str


_TRY = (
    "Unless the unlabeled images really are so, try the method's thresholds.policy=freematch or "
    "thresholds.alignment=true, or label more images."
)


def collapse(
    counts_4K: Tensor,
    labeled_K: Tensor,
    unlabeled_images: int,
    done_fraction: float,
    names: Sequence[str] = (),
    told: Collection[int] = (),
) -> list[Alarm]:
    """What is wrong with the kept labels, compared with the labeled images of each class (a long tail is no collapse).

    A class takes over when the others together get less than half of their share of the labels; a class vanishes
    when it gets less than a tenth of its own. Both have to hold for the near end of a Wilson interval of 3 standard
    errors, in which an image that was drawn twice counts once. `done_fraction` of the stage's steps are behind us;
    of the classes in `told` nothing is said again.
    """
    given, kept, labeled = float(counts_4K[0].sum()), float(counts_4K[1].sum()), float(labeled_K.sum())
    if not kept or not labeled:
        return []
    share_K, prior_K = (counts_4K[1] / kept).tolist(), (labeled_K / labeled).tolist()
    distinct = kept * min(1.0, unlabeled_images / given)
    taking, vanished = [], []
    for k, (share, prior) in enumerate(zip(share_K, prior_K, strict=True)):
        low, high = wilson(share, distinct, _SURE_Z)
        if low > (1 + prior) / 2 and done_fraction > _TAKES_OVER_AFTER and k not in told:
            taking.append(k)
        if high < _VANISHED_BELOW * prior and done_fraction > _VANISHED_AFTER and k not in told:
            vanished.append(k)

    def alarm(what: str, classes: list[int]) -> Alarm:
        of_kept, of_labels = (_percent(sum(shares[k] for k in classes)) for shares in (share_K, prior_K))
        shares = f"{of_kept} of the kept pseudo labels and {of_labels} of the labels"
        return Alarm(tuple(classes), f"{what}: {_listed(classes, names)} with {shares}. {_TRY}")

    alarms = [alarm("One class takes over the pseudo labels", taking)] if taking else []
    if vanished:
        several = f"{len(vanished)} classes vanish" if len(vanished) > 1 else "One class vanishes"
        alarms.append(alarm(f"{several} from the pseudo labels", vanished))
    return alarms


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _listed(classes: Sequence[int], names: Sequence[str]) -> str:
    shown = ", ".join(names[k] if names else f"class {k}" for k in classes[:_NAMED])
    return f"{shown} and {len(classes) - _NAMED} more" if len(classes) > _NAMED else shown


@final
class Tally:
    """The counts of one stage since the last logged line and since the last look for a collapse, on the device.

    `tensors` and `alarmed` are all of its state: what a checkpoint keeps, so that a resumed run logs the same lines.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.tensors = {
            name: torch.zeros(4, classes, dtype=torch.float64, device=device) for name in ("logged", "watched")
        }
        self.alarmed: list[int] = []

    def add(self, logs: Mapping[str, Tensor]) -> None:
        if COUNTS in logs:
            for counts_4K in self.tensors.values():
                counts_4K += logs[COUNTS]

    def line(self) -> dict[str, Any]:
        """What is to be logged of the steps since the last call."""
        found = counts_line(self.tensors["logged"])
        self.tensors["logged"].zero_()
        return found

    def alarms(
        self, labeled_K: Tensor, unlabeled_images: int, done_fraction: float, names: Sequence[str] = ()
    ) -> list[Alarm]:
        """What `collapse` finds in the steps since the last call that saw enough; a class is told of once."""
        told, counts_4K = self.alarmed, self.tensors["watched"].cpu()
        found = collapse(counts_4K, labeled_K, unlabeled_images, done_fraction, names, told)
        if done_fraction <= _TAKES_OVER_AFTER or float(counts_4K[1].sum()) >= _ENOUGH * counts_4K.shape[1]:
            self.tensors["watched"].zero_()
        self.alarmed = told + [k for alarm in found for k in alarm.classes]
        return found

    def restore(self, tensors: Mapping[str, Tensor], alarmed: Sequence[int]) -> None:
        for name, counts_4K in self.tensors.items():
            counts_4K.copy_(tensors[name])
        self.alarmed = list(alarmed)


def summary(metrics_path: Path) -> dict[str, dict[str, Any]]:
    """The last logged pseudo labels of each stage that has some, and its alarms."""
    found: dict[str, dict[str, Any]] = {}
    for text in metrics_path.read_text(encoding="utf-8").splitlines() if metrics_path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off by a kill
        if "pseudo_label_histogram" not in line and "alarm" not in line:
            continue
        stage = found.setdefault(
            line["stage"], {"kept_fraction": None, "accuracy": None, "per_class_precision": None, "alarms": []}
        )
        if "alarm" in line:
            stage["alarms"].append({"step": line["step"], "sentence": line["alarm"]})
        else:
            stage["kept_fraction"] = line["kept_fraction"]
            stage["accuracy"] = line["pseudo_label_accuracy"]
            stage["per_class_precision"] = line.get("pseudo_label_precision")
    return found
