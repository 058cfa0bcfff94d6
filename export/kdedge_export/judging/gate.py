"""What ships on a target: the fastest file that decides as FP32 does, measured; else FP32. Pure functions of numbers.

A gate has two sides, and both must hold. *Accuracy*, on the gate split alone: the file is expected to lose at most
`--max-drop` points, and labels, where there are any, are not sure of more (agreement.py). *Speed*, on the target:
faster than FP32. The point estimate decides what ships; the intervals say how sure that is, and that is the verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdedge_export.judging.agreement import Agreement, Points, agreement
from kdedge_export.judging.latency import Speedup

__all__ = [
    "Agreement",
    "Candidate",
    "Decision",
    "Judgement",
    "agreement",
    "fill_in",
    "gate_document",
    "judge",
]

Verdict = Literal["pass", "fail", "cannot tell", "undecided"]
SCHEMA = 1


@dataclass(frozen=True)
class Candidate:
    """A file that could ship instead of FP32. `name`: of the artifact. `speedup` None: not measured on the target."""

    name: str
    precision: Literal["int8", "fp16"]
    agreement: Agreement
    speedup: Speedup | None = None


@dataclass(frozen=True)
class Judgement:
    """`holds`: both sides of the gate, by their point estimates. `why`: of this candidate, without its subject."""

    candidate: Candidate
    verdict: Verdict
    holds: bool
    why: str
    doubt: str | None = None

    def to_json(self) -> dict[str, Any]:
        each = self.candidate
        measured = each.speedup.to_json() if each.speedup else {"speedup": None, "speedup_interval": None, "rounds": 0}
        found = {"precision": each.precision, "verdict": self.verdict, "holds": self.holds, **measured}
        return found | {"agreement": each.agreement.to_json()}


@dataclass(frozen=True)
class Decision:
    """What ships on `target`, and why. `verdict` is on the file that was asked for, the first of `judged`."""

    target: str
    shipped: Literal["fp32", "fp16", "int8"]
    artifact: str
    verdict: Verdict
    why: str
    warning: str | None
    max_drop_points: float
    judged: tuple[Judgement, ...] = ()

    @property
    def speedup(self) -> float | None:
        """Of the file that was asked for, whatever ships."""
        found = self.judged[0].candidate.speedup if self.judged else None
        return found.value if found else None

    @property
    def drop_points(self) -> float | None:
        return self.judged[0].candidate.agreement.drop_points if self.judged else None

    def to_json(self) -> dict[str, Any]:
        """The target's entry in gate.json."""
        asked = self.judged[0].to_json() if self.judged else {}
        interval = self.judged[0].candidate.agreement.drop_interval_points if self.judged else None
        return {
            "shipped": self.shipped,
            "artifact": self.artifact,
            "verdict": self.verdict,
            "speedup": self.speedup,
            "speedup_interval": asked.get("speedup_interval"),
            "drop_points": self.drop_points,
            "drop_points_interval": list(interval) if interval else None,
            "max_drop_points": self.max_drop_points,
            "why": self.why,
            "warning": self.warning,
            "agreement": asked.get("agreement"),
            "candidates": {each.candidate.name: each.to_json() for each in self.judged},
        }


def judge(target: str, candidates: Sequence[Candidate], max_drop_points: float) -> Decision:
    """Decide for one target. Candidates come in the order in which they were asked for; without any, FP32 ships."""
    judged = tuple(_judge_one(each, max_drop_points) for each in candidates)
    if not judged:
        why = "FP32 is shipped, because no INT8 file was asked for."
        return Decision(target, "fp32", "fp32", "undecided", why, None, max_drop_points)
    asked = judged[0]
    fitting = [each for each in judged if each.holds]
    chosen = max(fitting, key=lambda each: _speed(each.candidate)) if fitting else None
    if chosen is not None and chosen is not asked and asked.holds:
        asked = _overtaken(asked, chosen)
    verdict: Verdict = asked.verdict
    if all(each.speedup is None for each in candidates):
        verdict = "undecided"
    others = [each for each in (asked, *judged[1:]) if each.candidate is not (chosen or asked).candidate]
    said = "; ".join(f"{_title(each.candidate)} {each.why}" for each in others)
    more = f". Not shipped: {said}" if said else ""
    if chosen is None:
        why = f"FP32 is shipped on {target}, because {_title(asked.candidate)} {asked.why}{more}."
        return Decision(target, "fp32", "fp32", verdict, why, None, max_drop_points, (asked, *judged[1:]))
    title, doubt = _title(chosen.candidate), chosen.doubt
    why = f"{title} is shipped on {target}: it {chosen.why}{f'; {doubt}' if doubt else ''}{more}."
    warning = f"{title} is shipped on the point estimate: {doubt}." if doubt else None
    name, precision = chosen.candidate.name, chosen.candidate.precision
    return Decision(target, precision, name, verdict, why, warning, max_drop_points, (asked, *judged[1:]))


def _judge_one(each: Candidate, budget: float) -> Judgement:
    found, speed = each.agreement, each.speedup
    if found.drop_interval_points is None:
        lack = "cannot be compared with FP32: there are no gate images"
        return Judgement(each, "cannot tell" if speed else "undecided", False, lack)
    most = found.drop_interval_points[1]
    told = _told(found)
    if speed is None:
        kept = "" if found.within(budget) else f", where {budget:g} is allowed"
        return Judgement(each, "undecided", False, f"has not been timed there yet; it {told}{kept}")
    # FP16 gives up digits for speed alone, so a tie is no reason to. On x86 ONNX Runtime computes it in FP32 anyway.
    faster = speed.value >= 1.0 if each.precision == "int8" else speed.low > 1.0
    fast = f"runs at {_times(speed.value)} the speed of FP32 ({_interval((speed.low, speed.high))})"
    if not found.within(budget):
        sure = found.surely_beyond(budget) or speed.high < 1.0
        joint = "though it" if speed.value >= 1.0 else "and"
        why = f"{told}, where {budget:g} is allowed, {joint} {fast}"
        return Judgement(each, "fail" if sure else "cannot tell", False, why)
    if not faster:
        return Judgement(each, "fail" if speed.high < 1.0 else "cannot tell", False, f"{fast}, though it {told}")
    doubts = []
    if speed.low < 1.0:
        doubts.append(f"{speed.rounds} rounds cannot tell whether it is faster")
    if most > budget:
        doubts.append(f"so few images cannot rule out a drop above {budget:g}")
    doubt = " and ".join(doubts) or None
    return Judgement(each, "cannot tell" if doubt else "pass", True, f"{fast}, and {told}", doubt)


def _overtaken(asked: Judgement, chosen: Judgement) -> Judgement:
    """The file that was asked for holds, but another float file is faster: beaten, surely or by the point."""
    ours, theirs = asked.candidate.speedup, chosen.candidate.speedup
    sure = ours is not None and theirs is not None and theirs.low > ours.high
    return Judgement(asked.candidate, "fail" if sure else "cannot tell", False, asked.why)


def _speed(candidate: Candidate) -> float:
    return candidate.speedup.value if candidate.speedup else 0.0


def _title(candidate: Candidate) -> str:
    return candidate.precision.upper()


def _times(speedup: float) -> str:
    """Two digits, or as many as tell a near tie from a tie."""
    return f"{speedup:.2f} times" if abs(speedup - 1) >= 0.005 else f"{speedup:.4f} times"


def _interval(ends: Points) -> str:
    return f"95 % interval {ends[0]:.2f} to {ends[1]:.2f}"


def _told(found: Agreement) -> str:
    ends = _interval(found.drop_interval_points or (0.0, 0.0))
    changed = f"{found.disagreement_points:.2f} of 100 gate images get another class than from FP32"
    told = f"is expected to lose {found.drop_points:.2f} points ({ends}): {changed} ({found.images} images"
    if found.accuracy_drop_points is None:
        return f"{told})"
    drop, (low, high) = found.accuracy_drop_points, found.accuracy_interval_points or (0.0, 0.0)
    return f"{told}; {found.labeled_images} labels say {drop:+.2f}, {low:+.2f} to {high:+.2f})"


def gate_document(decisions: Sequence[Decision], measured: str) -> dict[str, Any]:
    """gate.json: an entry for each target; `shipped` on top is that of the target `measured` on this machine."""
    entries = {each.target: each for each in decisions}
    targets = {name: each.to_json() for name, each in entries.items()}
    return {"schema": SCHEMA, "shipped": entries[measured].shipped, "targets": targets}


def fill_in(document: Mapping[str, Any], target: str, speedups: Mapping[str, Speedup]) -> dict[str, Any]:
    """gate.json with `target` decided anew, now that its files were timed there; what else its entry says is kept.

    `speedups`: by artifact. Of two files of one precision a target runs one (TensorRT up to 10 `trt`, from 11 on
    `trt-fp16`): where one is timed, one that is not has no say. KeyError where the document has no such target or no
    such candidate.
    """
    entry = document["targets"][target]
    unknown = set(speedups) - set(entry["candidates"])
    if unknown:
        raise KeyError(f"{sorted(unknown)} are no candidates for {target}")
    candidates = [
        Candidate(name, each["precision"], Agreement.from_json(each["agreement"]), speedups.get(name) or _timed(each))
        for name, each in entry["candidates"].items()
    ]
    run = {each.precision for each in candidates if each.speedup}
    decided = judge(
        target, [each for each in candidates if each.speedup or each.precision not in run], entry["max_drop_points"]
    ).to_json()
    decided["candidates"] = {**entry["candidates"], **decided["candidates"]}
    return {**document, "targets": {**document["targets"], target: {**entry, **decided}}}


def _timed(entry: Mapping[str, Any]) -> Speedup | None:
    if entry["speedup"] is None:
        return None
    low, high = entry["speedup_interval"]
    return Speedup(entry["speedup"], low, high, entry["rounds"])
