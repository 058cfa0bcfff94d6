"""Rows of a table of measurements, whoever measured: what a record says, and how many times as fast as another it is.

Ratios are of rows that were measured in turn, in one session; of others there are none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from kdedge_bench.records import Record, flags, latency
from kdedge_bench.slowdown import slowdown

__all__ = ["Interval", "Ratio", "Row", "Scored", "ratio", "row_of", "scored"]

Interval = tuple[float, float]


@final
@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the base: its latency over the row's. `low`, `high`: 95 %, None below 6 rounds."""

    times: float
    low: float | None
    high: float | None
    rounds: int
    base: str = ""


@final
@dataclass(frozen=True)
class Scored:
    """Accuracy as a fraction, of the file that was measured, on `images` of a split with that hash."""

    value: float
    images: int | None = None
    split: str | None = None
    sha256: str | None = None


@final
@dataclass(frozen=True)
class Row:
    """One way to run one model. None was not measured, or does not apply; `why` says so of all of a row.

    Latencies are of one call of `batch` images, computing alone but for end to end; `p90_interval_ms` is over rounds,
    `variation` the standard deviation of all times by their mean. `made_in_s` and `peak_mib` are of making the file.
    `own_speed` is beside the float file of the same runtime, where `speed` is beside another's. `note` is for all rows
    of a model.
    """

    model: str
    way: str
    precision: str | None = None
    runtime: str | None = None
    threads: int | None = None
    batch: int | None = None
    mode: str | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p90_interval_ms: Interval | None = None
    variation: float | None = None
    end_to_end_p90_ms: float | None = None
    throughput_ips: float | None = None
    speed: Ratio | None = None
    own_speed: Ratio | None = None
    accuracy: Scored | None = None
    drop_points: float | None = None
    drop_interval: Interval | None = None
    agreement: float | None = None
    energy_mj: float | None = None
    bytes: int | None = None
    made_in_s: float | None = None
    peak_mib: float | None = None
    flags: tuple[str, ...] = ()
    why: str | None = None
    note: str | None = None
    record: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def row_of(record: Record, model: str, way: str, /, **more: Any) -> Row:
    """The row of a record; `more` is what a record does not know, such as the ratio."""
    artifact, conditions = record["artifact"], record["conditions"]
    compute = latency(record, "compute")
    offline = conditions.get("mode") == "offline"
    values: dict[str, Any] = {
        "precision": artifact.get("precision"),
        "runtime": " ".join(str(part) for part in (artifact.get("runtime"), artifact.get("version")) if part) or None,
        "threads": conditions.get("threads"),
        "batch": conditions.get("batch"),
        "mode": conditions.get("mode"),
        "p50_ms": compute.get("p50"),
        "p90_ms": compute.get("p90"),
        "p90_interval_ms": _over_rounds((record.get("rounds_ms") or {}).get("p90") or []),
        "variation": compute["std"] / compute["mean"] if compute.get("std") is not None else None,
        "end_to_end_p90_ms": latency(record, "end_to_end").get("p90"),
        "throughput_ips": record.get("throughput_ips") if offline else None,
        "accuracy": scored(record.get("accuracy")),
        "energy_mj": record.get("energy_mj_per_inference"),
        "bytes": artifact.get("bytes"),
        "flags": tuple(flags(record)),
    }
    return Row(model, way, **values | more)


def scored(found: Any) -> Scored | None:
    """What a record says of accuracy: a number alone, or with its images and the split's hash."""
    if isinstance(found, int | float) and not isinstance(found, bool):
        return Scored(float(found))
    if not isinstance(found, Mapping) or not isinstance(found.get("value"), int | float):
        return None
    return Scored(float(found["value"]), found.get("images"), found.get("split"), found.get("sha256"))


def ratio(base: Record, record: Record, name: str = "") -> Ratio | None:
    """How many times as fast `record` is as `base`, p90 by p90 or throughput by throughput, round by round.

    None where they were not measured in turn: on another occasion a machine is another one.
    """
    if record.get("session") is None or record.get("session") != base.get("session"):
        return None
    before, after = _each_round(base), _each_round(record)
    if not before or len(before) != len(after):
        return None
    found = slowdown(before, after, paired=True)
    low = None if found.high is None else 1 / (1 + found.high)
    high = None if found.low is None else 1 / (1 + found.low)
    return Ratio(1 / (1 + found.fraction), low, high, found.repeats, name)


def _each_round(record: Record) -> list[float]:
    """Milliseconds, one a round: the p90 of a query, or of an image's share where batches follow each other."""
    if record["conditions"].get("mode") == "offline":
        return [1000 / each for each in record.get("rounds_ips") or []]
    return [float(each) for each in (record.get("rounds_ms") or {}).get("p90") or []]


def _over_rounds(values: Sequence[float]) -> Interval | None:
    """95 % of the centre of the rounds; None below 6."""
    if not values or min(values) <= 0:
        return None
    found = slowdown([1.0] * len(values), values, paired=True)
    return None if found.low is None or found.high is None else (1 + found.low, 1 + found.high)
