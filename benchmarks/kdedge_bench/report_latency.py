"""Latency and energy in the report: every measurement as a row, and how its times are spread as a strip."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdedge_bench.facts import Facts
from kdedge_bench.formats import DASH, count, milliseconds, shorten
from kdedge_bench.pareto import Measured, measurements
from kdedge_bench.records import flags, latency, machine_name, one_image, power_mode
from kdedge_bench.report_plot import WIDTH_PX, Scale, element, label, svg, x_axis
from kdedge_bench.report_tables import Column, Table

__all__ = ["energy", "latencies", "spreads", "throughput"]

PARTS = {"compute": "compute", "with_copies": "with copies", "end_to_end": "end to end"}
NUMBERS = ("p50", "p90", "p99", "min", "max", "mean", "std")
QUANTILES = ("1", "5", "10", "25", "75", "95")  # that records keep beside p50, p90 and p99; those of before do not
ROW_PX, TOP_PX, LEFT_PX = 30, 8, 132
BANDS = ((1, 99, 4), (5, 95, 9), (10, 90, 13), (25, 75, 17))  # from, to, height in pixels


def latencies(facts: Facts) -> Table:
    """Every part of every measurement: its times in milliseconds, and p90 of each round."""
    rows = []
    for each in _sorted(facts):
        for part, what in PARTS.items():
            times = latency(each.record, part)
            if times:
                rows.append(_row(each, part, what, times))
    columns = (
        Column("Artifact", ("name",), text=True),
        Column("What is timed", ("what",), text=True),
        *(Column(f"{number} ms", (f"{number}_ms",), milliseconds) for number in NUMBERS),
        Column("runs", ("runs",), count),
    )
    words = ("machine", "Machine"), ("power_mode", "Power mode"), ("runtime", "Runtime")
    differing = [*words, ("threads", "Threads"), ("batch", "Batch")]
    several = [
        Column(heading, (key,), text=(key, heading) in words)
        for key, heading in differing
        if len({row[key] for row in rows}) > 1
    ]
    return Table("latencies", "Latencies", (columns[0], *several, *columns[1:]), tuple(rows))


def _sorted(facts: Facts) -> list[Measured]:
    def place(each: Measured) -> tuple[str, str, str, bool]:
        return machine_name(each.record), each.key, each.name, not one_image(each.record)

    return sorted(measurements(facts), key=place)


def _row(each: Measured, part: str, what: str, times: dict[str, Any]) -> dict[str, Any]:
    record = each.record
    said, rounds = record["conditions"], (record.get("rounds_ms") or {}) if part == "compute" else {}
    quantiles = (record.get("quantiles_ms") or {}).get(part) or {}
    return {
        "artifact": each.key,
        "name": each.name,
        "machine": machine_name(record),
        "power_mode": power_mode(record),
        "what": what,
        **{f"{number}_ms": times.get(number) for number in NUMBERS},
        "runs": times.get("count"),
        **{f"p{quantile}_ms": quantiles.get(quantile) for quantile in QUANTILES},
        "rounds_p50_ms": rounds.get("p50"),
        "rounds_p90_ms": rounds.get("p90"),
        "threads": said.get("threads"),
        "batch": said.get("batch"),
        "effort": said.get("effort"),
        "session": record.get("session"),
        "runtime": record["artifact"].get("runtime"),
        "flags": flags(record),
        "started_at": record.get("started_at"),
    }


def throughput(facts: Facts) -> Table:
    """Images a second of what was measured offline, batch after batch; no rows where nothing was."""
    rows = [_rate(each) for each in _sorted(facts) if each.record["conditions"].get("mode") == "offline"]
    modes = [Column("Power mode", ("power_mode",), text=True)] if len({row["power_mode"] for row in rows}) > 1 else []
    columns = (
        Column("Artifact", ("name",), text=True),
        Column("Machine", ("machine",), text=True),
        *modes,
        Column("Threads", ("threads",)),
        Column("Batch", ("batch",)),
        Column("Images a second", ("throughput_ips",), lambda ips: DASH if ips is None else f"{ips:,.1f}"),
    )
    return Table("throughput", "Throughput", columns, tuple(rows))


def _rate(each: Measured) -> dict[str, Any]:
    record = each.record
    return {
        "artifact": each.key,
        "name": each.name,
        "machine": machine_name(record),
        "power_mode": power_mode(record),
        "threads": record["conditions"].get("threads"),
        "batch": record["conditions"].get("batch"),
        "mode": record["conditions"].get("mode"),
        "runtime": record["artifact"].get("runtime"),
        "throughput_ips": record.get("throughput_ips"),
    }


def energy(facts: Facts) -> Table:
    """What an inference costs, where something measured power; no rows where nothing did."""
    rows = [
        _rate(each)
        | {
            "energy_mj_per_inference": each.record.get("energy_mj_per_inference"),
            "source": _source(each.record.get("energy_source")),
        }
        for each in _sorted(facts)
    ]
    columns = (
        Column("Artifact", ("name",), text=True),
        Column("Machine", ("machine",), text=True),
        Column("Power mode", ("power_mode",), text=True),
        Column("Images", ("mode", "batch"), _images, text=True),
        Column("mJ an inference", ("energy_mj_per_inference",), lambda mj: DASH if mj is None else f"{mj:.3g}"),
        Column("Measured by", ("source",), text=True),
    )
    return Table("energy", "Energy", columns, tuple(row for row in rows if row["energy_mj_per_inference"] is not None))


def _images(mode: str | None, batch: int | None) -> str:
    """How they come, which an inference costs less or more by."""
    if mode == "offline":
        return f"batch after batch of {batch}"
    return f"in batches of {batch}" if (batch or 1) > 1 else "one by one"


def _source(said: Any) -> str | None:
    if isinstance(said, dict):
        told = [str(said[key]) for key in ("source", "caveat") if said.get(key)]
        return ". ".join(told) or None
    return None if said is None else str(said)


def spreads(table: Table) -> list[tuple[str, str]]:
    """(conditions, an <svg>) for each of them: strips of the rows of `latencies` on one axis."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for row in table.rows:
        if row["p90_ms"] is not None:
            batch = f", batches of {row['batch']}" if (row["batch"] or 1) > 1 else ""
            threads = f", {row['threads']} thread{'s' if row['threads'] != 1 else ''}" if row["threads"] else ""
            mode = f", power mode {row['power_mode']}" if row["power_mode"] else ""
            places.setdefault(f"{row['machine']}{threads}{mode}{batch}", []).append(row)
    return [(place, _strips(rows)) for place, rows in places.items()]


def _strips(rows: Sequence[Any]) -> str:
    # A single query can take ten times as long as all others: it is told, not drawn.
    longest = 1.25 * max(row["p99_ms"] or row["p90_ms"] for row in rows)
    x = Scale(0.0, min(longest, 1.02 * max(row["max_ms"] for row in rows)), LEFT_PX, WIDTH_PX - 12)
    bottom = TOP_PX + ROW_PX * len(rows)
    drawn = x_axis(x, TOP_PX, bottom, "Time of one query, ms", "{:g}".format)
    for index, row in enumerate(rows):
        drawn += _strip(row, x, TOP_PX + ROW_PX * (index + 0.5))
    told = "; ".join(
        f"{row['name']}, {row['what']}: p50 {milliseconds(row['p50_ms'])}, p90 {milliseconds(row['p90_ms'])}, "
        f"p99 {milliseconds(row['p99_ms'])} ms"
        for row in rows
    )
    return svg(bottom + 40, "How the times are spread", told, drawn)


def _strip(row: Any, x: Scale, y: float) -> list[str]:
    colour = {"fp32": 1, "int8": 2, "fp16": 3}.get(row["artifact"], 5)
    name = shorten(str(row["name"]).removeprefix("Student "), 12)
    drawn = [label(LEFT_PX - 8, y + 4, f"{name}, {row['what']}", "end")]
    drawn.append(f'<g class="c{colour}">')
    end = min(row["max_ms"], x.high)
    drawn.append(element("line", class_="whisker", x1=x(row["min_ms"]), x2=x(end), y1=y, y2=y))
    for low, high, height in BANDS:
        bounds = row.get(f"p{low}_ms"), row.get(f"p{high}_ms")
        if bounds[0] is not None and bounds[1] is not None:
            drawn.append(_band(x(bounds[0]), x(bounds[1]), y, height))
    if row.get("p10_ms") is None:  # a record of before quantiles were kept: nine of ten queries lie in it
        drawn.append(_band(x(row["min_ms"]), x(row["p90_ms"]), y, 11))
    for quantile, half in (("p50", 10), ("p90", 8), ("p99", 6)):
        value = row[f"{quantile}_ms"]
        if value is not None and value <= x.high:
            drawn.append(element("line", class_=f"tick {quantile}", x1=x(value), x2=x(value), y1=y - half, y2=y + half))
    drawn += [element("circle", class_="round", cx=x(value), cy=y + 11, r=1.6)
              for value in row["rounds_p90_ms"] or () if value is not None and value <= x.high]  # fmt: skip
    return [*drawn, "</g>"]


def _band(start: float, end: float, y: float, height: float) -> str:
    return element(
        "rect", class_="band", x=start, width=max(0.5, round(end - start, 1)), y=y - height / 2, height=height
    )
