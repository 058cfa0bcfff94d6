"""The summary of a run: one row per network, from the baseline to the file that goes to the device."""

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdedge.runs import Run
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.formats import DASH, count, interval, milliseconds, percent, size
from kdedge_bench.records import flags, latency, machine_name
from kdedge_bench.stats import wilson

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "HEADINGS",
    "Row",
    "Shipping",
    "Summary",
    "artifact_label",
    "as_rich",
    "as_text",
    "cells",
    "decision",
    "footnotes",
    "summarize",
    "summary",
]

# Key of the artifact in files -> name in tables. What a later export adds appears under its own key.
NAMES = {
    "baseline": "Baseline, labels only",
    "teacher": "Teacher",
    "fp32": "Student FP32",
    "int8": "Student INT8",
    "fp16": "Student FP16",
    "trt": "Student INT8 for TensorRT",
    "trt-fp16": "Student INT8 for TensorRT 11",
}
HEADINGS = ("", "Test accuracy", "95 % interval", "Parameters", "Size", "p50 ms", "p90 ms")
SHORT_HEADINGS = ("", "Accuracy", "95 % int.", "Params", "Size", "p50 ms", "p90 ms")  # for 80 columns


@dataclass(frozen=True)
class Row:
    """One network. Accuracies are fractions; None is not measured, or does not apply."""

    key: str
    name: str
    arch: str | None = None
    accuracy: float | None = None
    low: float | None = None  # 95 % Wilson interval of `accuracy` over `images`
    high: float | None = None
    images: int | None = None
    params: int | None = None
    bytes: int | None = None
    p50_ms: float | None = None  # compute, one image
    p90_ms: float | None = None
    threads: int | None = None
    flags: tuple[str, ...] = ()  # warnings of the measurement
    shipped: bool = False


@dataclass(frozen=True)
class Shipping:
    """The gate's decision for the target that was measured."""

    target: str
    shipped: str | None
    verdict: str | None
    why: str
    speedup: float | None = None  # FP32 latency / INT8 latency
    drop_points: float | None = None
    drop_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Summary:
    """Rows of the table and the decision below it (None before an export)."""

    run: str
    rows: tuple[Row, ...]
    shipping: Shipping | None
    machine: str | None  # where the latencies were measured

    def row(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)

    @property
    def best(self) -> Row | None:
        """The row a person would use: the shipped one, else the smallest exported, else the student."""
        shipped = [row for row in self.rows if row.shipped]
        exported = [row for row in self.rows if row.key == "int8" and row.accuracy is not None]
        return next(iter(shipped or exported), self.row("fp32"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summary(run: Run | Path) -> Summary:
    """The summary of a run folder. RunError where it is no run or a file in it is damaged."""
    return summarize(read_facts(run if isinstance(run, Run) else Run(run)))


def summarize(facts: Facts) -> Summary:
    shipping = shipping_of(facts.gate)
    exported = [key for key in (facts.bundle or {}).get("artifacts", {}) if key not in ("fp32", "int8")]
    rows = [row for key in ("baseline", "teacher") if (row := _trained_row(facts, key)) is not None]
    rows += [_student_row(facts, key, shipping) for key in ("fp32", "int8", *exported)]
    measured = [facts.record(row.key) for row in rows]
    return Summary(
        run=facts.name,
        rows=tuple(rows),
        shipping=shipping,
        machine=next((machine_name(record) for record in measured if record), None),
    )


def _trained_row(facts: Facts, key: str) -> Row | None:
    """Baseline or teacher: trained, never exported, so it has no latency. None where the run made none."""
    part = (facts.result or {}).get(key)
    if not part:
        return None
    weights = {"baseline": facts.run.baseline_path, "teacher": facts.run.teacher_path}[key]
    return _row(facts, key, part, part.get("test_accuracy"), weights.stat().st_size if weights.is_file() else None)


def _student_row(facts: Facts, key: str, shipping: Shipping | None) -> Row:
    student = (facts.result or {}).get("student") or {}
    entry = ((facts.bundle or {}).get("artifacts") or {}).get(key) or {}
    accuracy = artifact_accuracy(entry)
    bytes_ = entry.get("bytes")
    if key == "fp32" and not entry:  # not exported yet: the trained weights stand in for the file
        accuracy = student.get("test_accuracy")
        bytes_ = facts.run.student_path.stat().st_size if facts.run.student_path.is_file() else None
    return _row(facts, key, student, accuracy, bytes_, shipped=shipping is not None and shipping.shipped == key)


def _row(
    facts: Facts, key: str, part: dict[str, Any], accuracy: float | None, bytes_: int | None, shipped: bool = False
) -> Row:
    images = facts.test_images
    low, high = wilson(round(accuracy * images), images) if accuracy is not None and images else (None, None)
    record = facts.record(key)
    compute = latency(record, "compute")
    return Row(
        key=key,
        name=artifact_label(key),
        arch=part.get("arch"),
        accuracy=accuracy,
        low=low,
        high=high,
        images=images,
        params=part.get("params"),
        bytes=bytes_,
        p50_ms=compute.get("p50"),
        p90_ms=compute.get("p90"),
        threads=(record or {}).get("conditions", {}).get("threads"),
        flags=tuple(flags(record)) if record else (),
        shipped=shipped,
    )


def artifact_label(key: str) -> str:
    """ "int8" -> "Student INT8"; a key unknown here is shown as it is."""
    return "Student" if key == "student" else NAMES.get(key, f"Student {key}")


def artifact_accuracy(entry: dict[str, Any]) -> float | None:
    """Test accuracy of an artifact in the bundle's manifest: a fraction, or None where there is no test split."""
    accuracy = entry.get("accuracy")
    if isinstance(accuracy, dict):
        accuracy = accuracy.get("test")
    return float(accuracy) if isinstance(accuracy, int | float) else None


def shipping_of(gate: dict[str, Any] | None) -> Shipping | None:
    """The decision of gate.json for the first target that was measured, else for the first target."""
    targets = {key: value for key, value in (gate or {}).get("targets", gate or {}).items() if isinstance(value, dict)}
    if not targets:
        return None
    decided = [key for key, value in targets.items() if value.get("verdict") not in (None, "undecided")]
    name = (decided or list(targets))[0]
    target = targets[name]
    found = target.get("drop_interval") or target.get("drop_points_interval")
    return Shipping(
        target=name,
        shipped=target.get("shipped"),
        verdict=target.get("verdict"),
        why=str(target.get("why") or ""),
        speedup=target.get("speedup"),
        drop_points=target.get("drop_points"),
        drop_interval=(float(found[0]), float(found[1])) if found else None,
    )


def cells(row: Row) -> tuple[str, ...]:
    """The texts of a row, in the order of HEADINGS."""
    return (
        row.name,
        percent(row.accuracy),
        interval(row.low, row.high),
        count(row.params),
        size(row.bytes),
        milliseconds(row.p50_ms),
        milliseconds(row.p90_ms),
    )


def footnotes(found: Summary) -> list[str]:
    """What a reader of the table has to know, in sentences."""
    notes = []
    images = next((row.images for row in found.rows if row.images), None)
    threads = next((row.threads for row in found.rows if row.threads), None)
    if images:
        notes.append(f"Accuracy on {count(images)} test images, with its 95 % interval.")
    if found.machine:
        stated = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
        flagged = sorted({flag for row in found.rows for flag in row.flags})
        doubt = f" Marked {' and '.join(flagged)}: measure again on an idle machine." if flagged else ""
        notes.append(f"Latency of one image, compute only, on {found.machine}{stated}.{doubt}")
    else:
        notes.append(f"Latency ({DASH}) is not measured yet: kdedge bench.")
    return notes


def decision(found: Summary) -> str:
    """Which file ships and why; empty before an export."""
    if found.shipping is None:
        return ""
    shipped, why = found.shipping.shipped, found.shipping.why
    if not shipped:
        return f"Nothing is shipped yet. {why}".strip()
    # The gate's own sentence says which it is, as a rule.
    return why if why.lower().startswith(f"{shipped} is shipped") else f"Shipped: {shipped.upper()}. {why}".strip()


def as_rich(found: Summary) -> "Table":
    """For a terminal of 80 columns; the shipped row is bold, and the caption names it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(found.run),
        caption=Text("\n".join(_below(found))),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(SHORT_HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in found.rows:
        # Text, not markup: a name with square brackets is a name.
        table.add_row(*map(Text, cells(row)), style="bold" if row.shipped else "")
    return table


def as_text(found: Summary) -> str:
    """The same without control characters, for a log or a file."""
    names = [cells(row)[0] + (" (shipped)" if row.shipped else "") for row in found.rows]
    lines = [SHORT_HEADINGS, *((name, *cells(row)[1:]) for name, row in zip(names, found.rows, strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *numbers in lines:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *aligned]))
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([found.run, "", *text, "", *_below(found)]) + "\n"


def _below(found: Summary) -> list[str]:
    return [line for text in (*footnotes(found), decision(found)) for line in textwrap.wrap(text, 80)]
