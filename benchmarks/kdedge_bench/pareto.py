"""Accuracy against cost: which files no other one beats, among those that can be compared.

Accuracies are compared on the same test images, latencies of one image on the same machine with the same threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdedge_bench.facts import Facts
from kdedge_bench.formats import DASH, interval, milliseconds, percent, size
from kdedge_bench.records import Record, latency, machine_name, power_mode
from kdedge_bench.report_tables import Column, Table
from kdedge_bench.table import Row, Summary

__all__ = ["Field", "Point", "beaten_by", "latency_fields", "measurements", "pareto_table", "size_fields"]


@dataclass(frozen=True)
class Point:
    """One file. `cost` is milliseconds or bytes; `low` and `high` are the fastest and slowest of `rounds`, if any."""

    run: str
    row: Row
    accuracy: float
    cost: float
    low: float | None = None
    high: float | None = None
    rounds: int = 0


@dataclass(frozen=True)
class Field:
    """Points that can be compared, in the order of the runs. `conditions` says under which they were measured."""

    conditions: str
    points: tuple[Point, ...]


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


def measurements(facts: Facts) -> list[tuple[str, Record]]:
    """(artifact, record) of each file as it is now: the newest under each machine, threads, batch and power mode."""
    artifacts = ((facts.bundle or {}).get("artifacts") or {}).items()
    keys = {str(entry.get("sha256")): key for key, entry in artifacts}
    found: dict[tuple[Any, ...], tuple[str, Record]] = {}
    for record in facts.records:
        key = keys.get(str(record["artifact"].get("sha256")))
        if key is not None:
            runtime, batch = record["artifact"].get("runtime"), record["conditions"].get("batch")
            found.setdefault((key, runtime, batch, *_conditions(record)), (key, record))
    return list(found.values())


def _conditions(record: Record) -> tuple[Any, ...]:
    said = record["conditions"]
    return machine_name(record), said.get("threads"), power_mode(record) or ""


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
        for key, record in measurements(facts):
            row, cost = found.row(key), latency(record, "compute").get("p90")
            if row is None or row.accuracy is None or cost is None or (record["conditions"].get("batch") or 1) > 1:
                continue  # the times of a batch are no latency of one image
            rounds = [value for value in (record.get("rounds_ms") or {}).get("p90") or [] if value is not None]
            low, high = (min(rounds), max(rounds)) if len(rounds) > 1 else (None, None)
            point = Point(found.run, row, row.accuracy, float(cost), low, high, len(rounds))
            fields.setdefault((_test_images(facts), *_conditions(record)), []).append(point)
    return _fields(runs, fields, lambda key: _told(*key[1:]))


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
