"""The verdict that a run was made for: what KD-FixMatch gains over each other way, over several seeds."""

from typing import Any

from kdedge.runs import read_json
from kdedge_bench.facts import Facts
from kdedge_bench.formats import DASH, count
from kdedge_bench.report_tables import Column, Table

__all__ = ["verdict"]


def verdict(facts: Facts) -> Table:
    """A row a way that was compared; no rows where the run lies in no folder of `kdedge verdict` that counts it in."""
    document = _document(facts)
    rows: list[dict[str, Any]] = []
    for name, found in (document.get("comparisons") or {}).items():
        accuracy = ((document.get("rows") or {}).get(name) or {}).get("test_accuracy") or {}
        low, high = found.get("interval_95") or (None, None)
        rows.append(
            {
                "way": name,
                "question": found.get("question"),
                "seeds": len(found.get("seeds") or []),
                "accuracy": accuracy.get("mean"),
                "accuracy_half_width": accuracy.get("half_width_95"),
                "gain_points": _points(found.get("mean")),
                "gain_low_points": _points(low),
                "gain_high_points": _points(high),
                "verdict": found.get("word"),
            }
        )
    columns = (
        Column("KD-FixMatch against", ("question", "way"), lambda question, way: str(question or way), text=True),
        Column("Its accuracy, %", ("accuracy", "accuracy_half_width"), _accuracy),
        Column("Gain, points", ("gain_points",), lambda points: DASH if points is None else _signed(points)),
        Column("95 % interval", ("gain_low_points", "gain_high_points"), _interval),
        Column("Seeds", ("seeds",), count),
        Column("Verdict", ("verdict",), text=True),
    )
    return Table("verdict", "The verdict over seeds", columns, tuple(rows))


def _document(facts: Facts) -> dict[str, Any]:
    """verdict.json beside the run, if it names the run."""
    path = facts.run.path.resolve().parent / "verdict.json"
    document = read_json(path) if path.is_file() else None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), dict):
        return {}
    runs = {str(each.get("run")) for row in document["rows"].values() for each in row.get("seeds") or []}
    return document if facts.name in runs else {}


def _points(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "\N{MINUS SIGN}")


def _accuracy(mean: float | None, half: float | None) -> str:
    if mean is None:
        return DASH
    return f"{100 * mean:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _interval(low: float | None, high: float | None) -> str:
    return DASH if low is None or high is None else f"{_signed(low)} to {_signed(high)}"
