"""Accuracy against cost: which files no other one beats, among those that can be compared.

Accuracies are compared on the same test images, latencies of one image on the same machine with the same threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kdedge_bench.facts import Facts
from kdedge_bench.formats import DASH, interval, milliseconds, percent, size
from kdedge_bench.records import Record, flags, latency, measured_under, model_sha256, one_image
from kdedge_bench.report_tables import Column, Table
from kdedge_bench.rows import scored
from kdedge_bench.stats import wilson
from kdedge_bench.table import Row, Summary, artifact_label

__all__ = ["Field", "Measured", "Point", "beaten_by", "latency_fields", "measurements", "pareto_table", "size_fields"]


@dataclass(frozen=True)
class Point:
    """One file. `cost` is milliseconds or bytes; `low` and `high` are the fastest and slowest of `rounds`, if any.

    `record`: the measurement of a latency; None of a size.
    """

    run: str
    row: Row
    accuracy: float
    cost: float
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    record: Record | None = None


@dataclass(frozen=True)
class Field:
    """Points that can be compared, in the order of the runs. `conditions` says under which they were measured."""

    conditions: str
    points: tuple[Point, ...]

    @property
    def occasions(self) -> str:
        """A sentence where the latencies were not all measured in turn, in one session; else empty."""
        records = [point.record for point in self.points if point.record is not None]
        sessions = {record.get("session") or id(record) for record in records}
        if len(sessions) < 2:
            return ""
        efforts = list(dict.fromkeys(str(record["conditions"].get("effort") or "unknown") for record in records))
        said = f", with efforts {' and '.join(efforts)}" if len(efforts) > 1 else ""
        return f"Measured on several occasions{said}: on another one a machine is some percent faster or slower."


class Measured(NamedTuple):
    """`key` of the file in the bundle, and what a measurement of it is called."""

    key: str
    name: str
    record: Record


def beaten_by(points: Sequence[Point]) -> list[Point | None]:
    """For each point one that is at least as accurate and as cheap, and one of both better; None on the front.

    Of several the most accurate is named, and of these the cheapest. Intervals play no part: this is arithmetic on the
    numbers as they stand.
    """
    found: list[Point | None] = []
    for point in points:
        better = [
            other
            for other in points
            if other.accuracy >= point.accuracy
            and other.cost <= point.cost
            and (other.accuracy, other.cost) != (point.accuracy, point.cost)
        ]
        found.append(min(better, key=lambda other: (-other.accuracy, other.cost)) if better else None)
    return found


def measurements(facts: Facts) -> list[Measured]:
    """Of each file as it is now, the newest in each runtime under each machine, threads, power mode, batch and mode."""
    keys = {str(entry.get("sha256")): key for key, entry in facts.artifacts.items()}
    found: dict[tuple[Any, ...], Measured] = {}
    for record in facts.records:
        key = keys.get(model_sha256(record))
        if key is not None:
            runtime, said = record["artifact"].get("runtime"), record["conditions"]
            under = (said.get("batch"), said.get("mode") == "offline", *measured_under(record))
            own = facts.artifacts[key].get("runtime") in (None, runtime)
            name = artifact_label(key) + ("" if own else f" ({runtime})")
            found.setdefault((key, runtime, *under), Measured(key, name, record))
    return list(found.values())


def _told(machine: str, threads: int | None, mode: str) -> str:
    parts = [machine]
    if threads:
        parts.append(f"{threads} thread{'s' if threads != 1 else ''}")
    return ", ".join([*parts, *([f"power mode {mode}"] if mode else [])])


def _test_images(facts: Facts) -> str:
    """What tells sets of test images apart: their hash, else the name of the data."""
    test = ((facts.splits or {}).get("splits") or {}).get("test") or {}
    return str(test.get("sha256") or (facts.result or {}).get("data") or facts.name)


def latency_fields(runs: Sequence[tuple[Facts, Summary]]) -> list[Field]:
    """A field for each set of test images and conditions of measurement; the runtime is the file's own matter."""
    fields: dict[tuple[Any, ...], list[Point]] = {}
    for facts, found in runs:
        for each in measurements(facts):
            row, cost = _row(facts, found, each), latency(each.record, "compute").get("p90")
            if row is None or row.accuracy is None or cost is None or not one_image(each.record):
                continue
            rounds = [value for value in (each.record.get("rounds_ms") or {}).get("p90") or [] if value is not None]
            low, high = (min(rounds), max(rounds)) if len(rounds) > 1 else (None, None)
            point = Point(found.run, row, row.accuracy, float(cost), low, high, len(rounds), each.record)
            fields.setdefault((_test_images(facts), *measured_under(each.record)), []).append(point)
    return _fields(runs, fields, lambda key: _told(*key[1:]))


def _row(facts: Facts, found: Summary, each: Measured) -> Row | None:
    """The file's row as this measurement has it: another runtime may give another class."""
    row, told = found.row(each.key), scored(each.record.get("accuracy"))
    if row is None:
        return None
    row = replace(row, name=each.name, flags=tuple(flags(each.record)))
    test = ((facts.splits or {}).get("splits") or {}).get("test") or {}
    if told is None or not told.images or told.sha256 != test.get("sha256"):
        return row
    low, high = wilson(round(told.value * told.images), told.images)
    return replace(row, accuracy=told.value, low=low, high=high, images=told.images)


def size_fields(runs: Sequence[tuple[Facts, Summary]]) -> list[Field]:
    """A field for each set of test images: every network that has an accuracy and a file."""
    fields: dict[tuple[Any, ...], list[Point]] = {}
    for facts, found in runs:
        for row in found.rows:
            if row.accuracy is not None and row.bytes:
                point = Point(found.run, row, row.accuracy, float(row.bytes))
                fields.setdefault((_test_images(facts),), []).append(point)
    return _fields(runs, fields, lambda _: "")


def _fields(
    runs: Sequence[tuple[Facts, Summary]], fields: dict[tuple[Any, ...], list[Point]], told: Callable[..., str]
) -> list[Field]:
    names: dict[str, str] = {}
    for facts, _ in runs:
        names.setdefault(_test_images(facts), str((facts.result or {}).get("data") or facts.name))
    several = len(names) > 1
    found = []
    for key, points in fields.items():
        said = [f"test images of {names[key[0]]}"] if several else []
        found.append(Field("; ".join(filter(None, [told(key), *said])), tuple(points)))
    return found


def pareto_table(fields: Sequence[tuple[str, Field]]) -> Table:
    """The numbers behind the charts, each field with what it is against ("latency" or "size")."""
    rows = []
    for against, field in fields:
        for point, other in zip(field.points, beaten_by(field.points), strict=True):
            timed = against == "latency"
            record: Record = point.record or {"artifact": {}, "conditions": {}}
            rows.append(
                {
                    "against": against,
                    "conditions": field.conditions,
                    "run": point.run,
                    "artifact": point.row.key,
                    "name": point.row.name,
                    "accuracy": point.accuracy,
                    "low": point.row.low,
                    "high": point.row.high,
                    "images": point.row.images,
                    "p90_ms": point.cost if timed else None,
                    "lowest_round_p90_ms": point.low,
                    "highest_round_p90_ms": point.high,
                    "runtime": record["artifact"].get("runtime"),
                    "session": record.get("session"),
                    "effort": record["conditions"].get("effort"),
                    "bytes": point.row.bytes,
                    "shipped": point.row.shipped,
                    "beaten_by": other and f"{other.run} {other.row.key}",
                }
            )
    columns = (
        Column("Run", ("run",), text=True),
        Column("Network", ("name",), text=True),
        Column("Against", ("against", "conditions"), lambda what, where: f"{what}, {where}" if where else what, True),
        Column("Test accuracy", ("accuracy",), percent),
        Column("95 % interval", ("low", "high"), interval),
        Column("p90 ms", ("p90_ms",), milliseconds),
        Column("Rounds, p90 ms", ("lowest_round_p90_ms", "highest_round_p90_ms"), _rounds),
        Column("Size", ("bytes",), size),
        Column("Beaten by", ("beaten_by",), text=True),
    )
    return Table("pareto", "Accuracy against latency and size", columns, tuple(rows))


def _rounds(low: float | None, high: float | None) -> str:
    return DASH if low is None or high is None else f"{milliseconds(low)} to {milliseconds(high)}"
