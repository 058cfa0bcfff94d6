"""`kdedge compare`: is the new run, bundle or folder of records as accurate and as fast as the base?

A budget fails where the interval of the loss lies wholly beyond it, and passes where none of it does. Between the two
nobody knows: *cannot tell*, with what would.
"""

from pathlib import Path
from typing import Any

import numpy as np

from kdedge.errors import BudgetFailed, RunError
from kdedge.intervals import newcombe
from kdedge_bench.formats import milliseconds, percent
from kdedge_bench.records import flags, power_mode
from kdedge_bench.sides import Side, matched, read_side
from kdedge_bench.slowdown import Slowdown, Verdict, judge, repeats_wanted, slowdown
from kdedge_bench.stats import PairedDifference, paired_difference
from kdedge_bench.table import artifact_label

__all__ = ["CompareFailed", "compare"]


class CompareFailed(BudgetFailed):
    """A budget was exceeded; `document` is what `compare` would have returned."""

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        super().__init__(message)
        self.document = document


def compare(
    base: Path,
    new: Path,
    max_drop: float | None = None,
    max_slower: float | None = None,
    artifact: str | None = None,
) -> dict[str, Any]:
    """Accuracy drop in points and slowdown of p90 as a fraction, each with its 95 % interval and a verdict.

    Either side is a run, a bundle or a folder of records; what each ships is compared, or `artifact` of both. A budget
    of None is not judged. CompareFailed where a verdict is *fail*. RunError where a budget is given and its number was
    not measured: what nobody measured does not pass.
    """
    old, young = matched(read_side(base, artifact), read_side(new, artifact))
    paired = _paired(old, young)
    drop, interval = _drop(old, young, paired)
    slower, why_not = _slower(old, young)
    if max_drop is not None and drop is None:
        raise RunError(_no_accuracy(old, young))
    if max_slower is not None and slower is None:
        raise RunError(f"The latencies cannot be compared: {why_not}")
    verdicts = _verdicts(drop, interval, max_drop, slower, max_slower)
    document = {
        "schema": 1,
        "base": old.to_json(),
        "new": young.to_json(),
        "drop_points": drop,
        "drop_interval": list(interval) if interval else None,
        "images": paired.images if paired else None,
        "only_base_right": paired.only_base if paired else None,
        "only_new_right": paired.only_new if paired else None,
        "mcnemar_p": paired.p_value if paired else None,
        "slower_fraction": slower.fraction if slower else None,
        "slower_interval": [slower.low, slower.high] if slower and slower.low is not None else None,
        "repeats": slower.repeats if slower else None,
        "repeats_wanted": repeats_wanted(slower, max_slower or 0.0)
        if slower and verdicts["latency"] == "cannot tell"
        else None,
        "in_turn": slower.paired if slower else None,
        "max_drop": max_drop,
        "max_slower": max_slower,
        "verdicts": verdicts,
        "passed": "fail" not in verdicts.values(),
    }
    failures = _failures(document)
    document["text"] = _text(old, young, document, why_not)
    if failures:
        told = " and ".join(failures)
        raise CompareFailed(f"{young.name} does not stand the comparison with {old.name}: {told}.", document)
    return document


def _verdicts(
    drop: float | None,
    interval: tuple[float, float] | None,
    max_drop: float | None,
    slower: Slowdown | None,
    max_slower: float | None,
) -> dict[str, Verdict | None]:
    """None where no budget was given."""
    found: dict[str, Verdict | None] = {"accuracy": None, "latency": None}
    if max_drop is not None and drop is not None:
        low, high = interval or (None, None)
        found["accuracy"] = judge(low, high, max_drop)
    if max_slower is not None and slower is not None:
        found["latency"] = judge(slower.low, slower.high, max_slower)
    return found


def _paired(base: Side, new: Side) -> PairedDifference | None:
    """The difference on the images that both were tested on; None where there are none."""
    shared = [name for name in base.right if name in new.right]
    if not shared:
        return None
    return paired_difference(
        np.array([base.right[name] for name in shared]), np.array([new.right[name] for name in shared])
    )


def _drop(base: Side, new: Side, paired: PairedDifference | None) -> tuple[float | None, tuple[float, float] | None]:
    """Points lost, and their interval where one can be made: image by image, else by the numbers of images."""
    if paired is not None:
        return 0.0 - 100 * paired.difference, (-100 * paired.high, -100 * paired.low)
    other = base.exam is not None and new.exam is not None and base.exam != new.exam
    if other or (base.right and new.right) or base.accuracy is None or new.accuracy is None:
        return None, None  # other images are another exam
    drop = 100 * (base.accuracy - new.accuracy)
    if not base.images or not new.images:
        return drop, None
    low, high = newcombe((base.accuracy, base.images), (new.accuracy, new.images))
    return drop, (100 * low, 100 * high)


def _no_accuracy(base: Side, new: Side) -> str:
    for side in (base, new):
        if side.accuracy is None:
            what = f"{side.name} has no test accuracy"
            return f"The accuracies cannot be compared: {what}. Expected a run with a test split."
    return (
        f"The accuracies cannot be compared: {base.name} and {new.name} share no test image. "
        "Expected two runs on the same data."
    )


def _slower(base: Side, new: Side) -> tuple[Slowdown | None, str]:
    """p90 of new beside that of base; or None and the reason."""
    for side in (base, new):
        if not side.p90_ms:
            what = f"{side.name} has no measured latency of {artifact_label(side.artifact)}"
            return None, f"{what}. Measure it: kdedge bench {side.path}"
    before, after = base.to_json(), new.to_json()
    for key, told in (("machine", "on {}"), ("threads", "with {} thread(s)"), ("batch", "at batch {}")):
        if before[key] != after[key]:
            one, other = told.format(before[key]), told.format(after[key])
            return None, f"one was measured {one}, the other {other}. Measure both alike: kdedge bench."
    modes = [power_mode(side.record) or "unknown" for side in (base, new) if side.record]
    if len(set(modes)) > 1:
        told = f"in power mode {modes[0]}, the other in power mode {modes[1]}"
        return None, f"one was measured {told}. Measure both alike: kdedge bench."
    in_turn = base.session is not None and base.session == new.session
    paired = in_turn and len(base.p90_by_round_ms) == len(new.p90_by_round_ms)
    return slowdown(base.p90_by_round_ms, new.p90_by_round_ms, paired), ""


def _failures(document: dict[str, Any]) -> list[str]:
    verdicts, found = document["verdicts"], []
    if verdicts["accuracy"] == "fail":
        drop, low = document["drop_points"], document["drop_interval"][0]
        allowed = f"more than the {document['max_drop']:g} allowed"
        found.append(f"it loses {drop:.2f} points of accuracy, at least {low:.2f}, {allowed}")
    if verdicts["latency"] == "fail":
        slower, low = document["slower_fraction"], document["slower_interval"][0]
        allowed = f"more than the {100 * document['max_slower']:g} % allowed"
        found.append(f"its p90 is {100 * slower:.1f} % slower, at least {100 * low:.1f} %, {allowed}")
    return found


def _text(base: Side, new: Side, document: dict[str, Any], why_not: str) -> str:
    lines = []
    for name, side in (("base", base), ("new", new)):
        runtime = side.to_json()["runtime"]
        notes = ([runtime] if runtime and runtime != side.runtime else []) + (flags(side.record) if side.record else [])
        noted = f" ({', '.join(notes)})" if notes else ""
        lines.append(
            f"{name:4}  {side.name}, {artifact_label(side.artifact)}: accuracy {percent(side.accuracy, 2)}, "
            f"p90 {milliseconds(side.p90_ms)} ms{noted}"
        )
    return "\n".join([*lines, _accuracy_line(document), _latency_line(document, why_not)])


def _accuracy_line(document: dict[str, Any]) -> str:
    drop, interval = document["drop_points"], document["drop_interval"]
    if drop is None:
        return "Accuracy: not comparable."
    if interval is None:
        return f"Accuracy drop: {drop:.2f} points (of how many images nobody wrote down, so no interval)." + _verdict(
            document, "accuracy", "compare runs that have their predictions.npz"
        )
    ends = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
    images = document["images"]
    how = f"{images} images, McNemar p = {document['mcnemar_p']:.3g}" if images else "not image by image"
    return f"Accuracy drop: {drop:.2f} points ({ends}, {how})." + _verdict(
        document, "accuracy", "more test images would tell"
    )


def _latency_line(document: dict[str, Any], why_not: str) -> str:
    slower, interval = document["slower_fraction"], document["slower_interval"]
    if slower is None:
        return f"Latency: not comparable, {why_not}"
    repeats = f"{document['repeats']} repeat(s)" + (" in turn" if document["in_turn"] else "")
    ends = f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %, " if interval else ""
    wanted = document["repeats_wanted"]
    more = f"about {wanted} repeats in turn would tell: kdedge bench BASE NEW --repeats {wanted}"
    hopeless = "the difference is as large as the budget, and a thousand repeats would not tell"
    hint = more if wanted else hopeless
    if not document["in_turn"]:
        hint = f"measured on two occasions, which may differ by as much; {hint}"
    return f"p90 slower by: {100 * slower:.1f} % ({ends}{repeats})." + _verdict(document, "latency", hint)


def _verdict(document: dict[str, Any], what: str, hint: str) -> str:
    found = document["verdicts"][what]
    if found is None:
        return ""
    budget = f"{document['max_drop']:g} points" if what == "accuracy" else f"{100 * document['max_slower']:g} %"
    told = {"pass": "Within", "fail": "Beyond", "cannot tell": "Cannot tell whether it is within"}[found]
    return f" {told} the {budget} allowed{'; ' + hint if found == 'cannot tell' else ''}."
