"""Rows of measurements as text for a terminal, Markdown, CSV and JSON, from the same numbers.

A column that no row has a value for is not drawn, and a row without a measurement says why.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from kdedge_bench.cells import csv_cell, escaped
from kdedge_bench.formats import milliseconds, percent, size, span
from kdedge_bench.rows import Ratio, Row
from kdedge_bench.stats import wilson

__all__ = ["as_csv", "as_json", "as_markdown", "as_text"]

MOST_NAMED = 4
"""Rows with one reason; all of them are in the CSV and the JSON."""


@final
@dataclass(frozen=True)
class _Column:
    heading: str
    show: Callable[[Row], str]
    left: bool = False


def _times(found: Ratio | None) -> str:
    if found is None:
        return ""
    told = f"{found.times:.2f}x"
    return told if found.low is None else f"{told} ({found.low:.2f}–{found.high:.2f})"


def _beside(heading: str, found: Iterable[Ratio | None]) -> str:
    """With what the ratios are against, where that is the same for all."""
    bases = {each.base for each in found if each is not None}
    return f"{heading} beside {bases.pop()}" if len(bases) == 1 and "" not in bases else heading


def _p90(row: Row) -> str:
    if row.p90_ms is None:
        return ""
    ends = row.p90_interval_ms
    told = milliseconds(row.p90_ms)
    return told if ends is None else f"{told} ({milliseconds(ends[0])}–{milliseconds(ends[1])})"


def _accuracy(row: Row) -> str:
    found = row.accuracy
    if found is None:
        return ""
    if not found.images:
        return percent(found.value, 2)
    low, high = wilson(round(found.value * found.images), found.images)
    return f"{percent(found.value, 2)} ({100 * low:.1f}–{100 * high:.1f})"


def _drop(row: Row) -> str:
    if row.drop_points is None:
        return ""
    ends = row.drop_interval
    return f"{row.drop_points:+.2f}" + ("" if ends is None else f" ({ends[0]:+.2f} to {ends[1]:+.2f})")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


_COLUMNS = (
    _Column("model", lambda row: row.model, left=True),
    _Column("way", lambda row: row.way, left=True),
    _Column("accuracy, 95 %", _accuracy),
    _Column("drop, points", _drop),
    _Column("agrees", lambda row: "" if row.agreement is None else percent(row.agreement)),
    _Column("p90 ms, 95 %", _p90),
    _Column("p50 ms", lambda row: "" if row.p50_ms is None else milliseconds(row.p50_ms)),
    _Column("varies", lambda row: "" if row.variation is None else percent(row.variation)),
    _Column("end to end p90", lambda row: "" if row.end_to_end_p90_ms is None else milliseconds(row.end_to_end_p90_ms)),
    _Column("images/s", lambda row: _number(row.throughput_ips, "{:,.1f}")),
    _Column("speed", lambda row: _times(row.speed)),
    _Column("own speed", lambda row: _times(row.own_speed)),
    _Column("energy", lambda row: _number(row.energy_mj, "{:.3g} mJ")),
    _Column("file", lambda row: "" if row.bytes is None else size(row.bytes)),
    _Column("made in", lambda row: "" if row.made_in_s is None else span(row.made_in_s)),
    _Column("peak", lambda row: _number(row.peak_mib, "{:,.0f} MiB")),
    _Column("flags", lambda row: ", ".join(row.flags), left=True),
)


def _drawn(rows: Sequence[Row]) -> tuple[list[_Column], list[Row]]:
    """The columns that somebody has a value for, and the rows that were measured."""
    there = [row for row in rows if row.why is None]
    columns = [column for column in _COLUMNS if any(column.show(row) for row in there)]
    told = {
        "speed": _beside("speed", (row.speed for row in there)),
        "own speed": _beside("speed", (row.own_speed for row in there)),
    }
    return [replace(column, heading=told.get(column.heading, column.heading)) for column in columns], there


def as_text(rows: Sequence[Row]) -> str:
    """Aligned, for a terminal or a log; what was not measured stands below, one reason a line."""
    columns, there = _drawn(rows)
    lines = [[column.heading for column in columns], *([column.show(row) for column in columns] for row in there)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*(text if there else []), *_reasons(rows)])


def as_markdown(rows: Sequence[Row]) -> str:
    columns, there = _drawn(rows)
    lines = [[column.heading for column in columns], [" --- " if c.left else " ---: " for c in columns]]
    lines += [[escaped(column.show(row)) for column in columns] for row in there]
    table = ["| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines]
    why = [f"- {escaped(each)}" for each in _reasons(rows)]
    return "\n".join([*(table if there else []), *([""] if there and why else []), *why]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Every field of every row, plain numbers; empty where it is None. What has parts takes a column each."""
    plain = [_flat(row.to_json()) for row in rows]
    names = list(dict.fromkeys(name for each in plain for name in each))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in each.items()} for each in plain)
    return stream.getvalue()


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows]


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """{"speed": {"times": 2}} -> {"speed.times": 2}; intervals as .low and .high; flags joined."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": each for key, each in value.items()}
        elif name.endswith(("interval", "interval_ms")):
            low, high = (None, None) if value is None else value
            found |= {f"{name}.low": low, f"{name}.high": high}
        elif name in ("speed", "own_speed", "accuracy"):
            continue  # its parts are named where a row has them
        elif name == "flags":
            found[name] = " ".join(value)
        else:
            found[name] = value
    return {name: "" if value is None else value for name, value in found.items()}


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Notes, then why what was not measured was not; rows that share one share a line."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.why is not None:
            found.setdefault(row.why, []).append(f"{row.model} {row.way}".strip())
    noted: dict[str, list[str]] = {}
    for row in rows:
        if row.note is not None and row.model not in noted.setdefault(row.note, []):
            noted[row.note].append(row.model)
    lines = [f"{', '.join(names)}: {note}" for note, names in noted.items()]
    return lines + [f"{_some(names)}: not measured. {why}" for why, names in found.items()]


def _some(names: Sequence[str]) -> str:
    """A runtime that is not here is missing in many rows."""
    more = len(names) - MOST_NAMED
    return "; ".join([*names[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])])
