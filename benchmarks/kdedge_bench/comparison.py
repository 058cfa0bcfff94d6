"""`kdedge compare`: is the new run as accurate and as fast as the base?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdedge.errors import BudgetFailed, RunError
from kdedge.runs import Run
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.formats import milliseconds, percent
from kdedge_bench.records import Record, flags, latency, machine_name
from kdedge_bench.stats import PairedDifference, paired_difference
from kdedge_bench.table import artifact_label, summarize

__all__ = ["CompareFailed", "compare"]


class CompareFailed(BudgetFailed):
    """A budget was exceeded; `document` is what `compare` would have returned."""

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        super().__init__(message)
        self.document = document


@dataclass(frozen=True)
class Side:
    """One of the two runs, by the artifact it ships."""

    facts: Facts
    artifact: str
    accuracy: float | None
    record: Record | None

    @property
    def p90_ms(self) -> float | None:
        return latency(self.record, "compute").get("p90")

    def to_json(self) -> dict[str, Any]:
        threads = self.record["conditions"].get("threads") if self.record else None
        return {
            "run": self.facts.name, "artifact": self.artifact, "accuracy": self.accuracy, "latency_ms_p90": self.p90_ms,
            "threads": threads, "machine": machine_name(self.record) if self.record else None,
            "flags": flags(self.record) if self.record else [],
        }  # fmt: skip


def compare(base: Path, new: Path, max_drop: float | None = None, max_slower: float | None = None) -> dict[str, Any]:
    """Accuracy drop in points and slowdown of p90 as a fraction, of what `new` ships against what `base` ships.

    A budget of None is not checked. The point estimate decides; the interval says how sure that is.
    CompareFailed where a budget is exceeded. RunError where a budget is given and its number was not measured:
    what nobody measured does not pass.
    """
    old, young = _side(base), _side(new)
    paired = _paired(old, young)
    drop = _drop(old, young, paired)
    slower, why_not = _slower(old, young)
    if max_drop is not None and drop is None:
        raise RunError(_no_accuracy(old, young))
    if max_slower is not None and slower is None:
        raise RunError(f"The latencies cannot be compared: {why_not}")
    failures = []
    if max_drop is not None and drop is not None and drop > max_drop + 1e-9:
        failures.append(f"it loses {drop:.2f} points of accuracy, more than the {max_drop:g} allowed")
    if max_slower is not None and slower is not None and slower > max_slower + 1e-9:
        failures.append(f"its p90 is {100 * slower:.1f} % slower, more than the {100 * max_slower:g} % allowed")
    document = {
        "schema": 1,
        "base": old.to_json(),
        "new": young.to_json(),
        "drop_points": drop,
        "drop_interval": [-100 * paired.high, -100 * paired.low] if paired else None,
        "images": paired.images if paired else None,
        "only_base_right": paired.only_base if paired else None,
        "only_new_right": paired.only_new if paired else None,
        "mcnemar_p": paired.p_value if paired else None,
        "slower_fraction": slower,
        "max_drop": max_drop,
        "max_slower": max_slower,
        "passed": not failures,
    }
    document["text"] = _text(old, young, document, why_not)
    if failures:
        raise CompareFailed(
            f"{young.facts.name} does not stand the comparison with {old.facts.name}: {' and '.join(failures)}.",
            document,
        )
    return document


def _side(path: Path) -> Side:
    if not path.is_dir():
        raise RunError(f"{path} is no folder. Expected a run folder, as made by kdedge train-recipe.")
    in_run = path.name == Run(path.parent).bundle_path.name and Run(path.parent).manifest_path.is_file()
    facts = read_facts(Run(path.parent if in_run else path))
    row = summarize(facts).best
    if row is None:
        raise RunError(f"The run {path} has nothing to compare: it has no trained student. Expected a finished run.")
    return Side(facts, row.key, row.accuracy, facts.record(row.key))


def _right_by_id(side: Side) -> dict[str, bool]:
    """Image id -> is it right, for the test images of known class."""
    artifact = side.artifact
    if side.facts.logits(artifact) is None and artifact == "fp32":
        artifact = "student"
    right, labels, ids = side.facts.right(artifact), side.facts.test_labels, side.facts.predictions.get("test_id")
    if right is None or labels is None or ids is None:
        return {}
    return dict(zip(map(str, ids[labels >= 0]), map(bool, right), strict=True))


def _paired(base: Side, new: Side) -> PairedDifference | None:
    """The difference on the images that both were tested on; None where there are none."""
    before, after = _right_by_id(base), _right_by_id(new)
    shared = [name for name in before if name in after]
    if not shared:
        return None
    return paired_difference(np.array([before[name] for name in shared]), np.array([after[name] for name in shared]))


def _drop(base: Side, new: Side, paired: PairedDifference | None) -> float | None:
    if paired is not None:
        return -100 * paired.difference
    both_predicted = "test_id" in base.facts.predictions and "test_id" in new.facts.predictions
    if both_predicted or base.accuracy is None or new.accuracy is None:  # other test images are another exam
        return None
    return 100 * (base.accuracy - new.accuracy)


def _no_accuracy(base: Side, new: Side) -> str:
    for side in (base, new):
        if side.accuracy is None:
            what = f"{side.facts.name} has no test accuracy"
            return f"The accuracies cannot be compared: {what}. Expected a run with a test split."
    return (
        f"The accuracies cannot be compared: {base.facts.name} and {new.facts.name} share no test image. "
        "Expected two runs on the same data."
    )


def _slower(base: Side, new: Side) -> tuple[float | None, str]:
    """p90 of new over that of base, less 1; or None and the reason."""
    for side in (base, new):
        if not side.p90_ms:
            what = f"{side.facts.name} has no measured latency of {artifact_label(side.artifact)}"
            return None, f"{what}. Measure it: kdedge bench {side.facts.run.path}"
    before, after = base.to_json(), new.to_json()
    for key, told in (("machine", "on {}"), ("threads", "with {} thread(s)")):
        if before[key] != after[key]:
            one, other = told.format(before[key]), told.format(after[key])
            return None, f"one was measured {one}, the other {other}. Measure both alike: kdedge bench."
    return after["latency_ms_p90"] / before["latency_ms_p90"] - 1, ""


def _text(base: Side, new: Side, document: dict[str, Any], why_not: str) -> str:
    lines = []
    for name, side in (("base", base), ("new", new)):
        unstable = f" ({', '.join(flags(side.record))})" if side.record and flags(side.record) else ""
        lines.append(
            f"{name:4}  {side.facts.name}, {artifact_label(side.artifact)}: accuracy {percent(side.accuracy, 2)}, "
            f"p90 {milliseconds(side.p90_ms)} ms{unstable}"
        )
    drop, interval = document["drop_points"], document["drop_interval"]
    if drop is None:
        lines.append("Accuracy: not comparable.")
    elif interval is None:
        lines.append(f"Accuracy drop: {drop:.2f} points (no predictions on the same images, so no interval).")
    else:
        lines.append(
            f"Accuracy drop: {drop:.2f} points (95 % interval {interval[0]:.2f} to {interval[1]:.2f}, "
            f"{document['images']} images, McNemar p = {document['mcnemar_p']:.3g})."
        )
    slower = document["slower_fraction"]
    lines.append(
        f"p90 slower by: {100 * slower:.1f} %." if slower is not None else f"Latency: not comparable, {why_not}"
    )
    return "\n".join(lines)
