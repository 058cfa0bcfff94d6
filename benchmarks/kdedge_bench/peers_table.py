"""The table beside other quantizers, drawn from its records into a README.

python -m kdedge_bench.peers_table RECORD... [--into README.md]

What stands between the two comments MARKS is replaced; without --into the table is printed. Several records of one
model are one part of the table: a way that is in two is told from the later one.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdedge_bench.rows import Ratio, Row, Scored
from kdedge_bench.rows_table import as_markdown

__all__ = ["MARKS", "draw_into", "main", "rows", "table"]

MARKS = ("<!-- int8-peers: drawn by python -m kdedge_bench.peers_table -->", "<!-- int8-peers: end -->")
BASE = "FP32 in ONNX Runtime"
OWN_BASE = "FP32 in its own runtime"


def rows(*records: Mapping[str, Any]) -> list[Row]:
    """A row for each model and way, models and ways in the order of their first record."""
    found: dict[str, dict[str, Row]] = {}
    for record in records:
        for model, measured in record["models"].items():
            ways = found.setdefault(model, {})
            ways |= {way: _row(model, way, each, measured["images"]) for way, each in measured["ways"].items()}
    return [row for ways in found.values() for row in ways.values()]


def _row(model: str, way: str, found: Mapping[str, Any], images: int) -> Row:
    made, speed = found["made"], found.get("speed") or {}
    failures = [each["failure"] for each in made if each["failure"]]
    shown = "FP32" if way == "fp32" else way
    if failures or "accuracy" not in found:
        seeds = f" ({len(failures)} of {len(made)} runs)" if len(made) > 1 else ""
        return Row(model, shown, why=f"{failures[0] if failures else 'nothing was measured'}{seeds}")
    first = made[0]
    plain = way == "fp32"
    return Row(
        model,
        shown,
        precision="fp32" if plain else "int8",
        runtime=first.get("runtime") or "onnxruntime",
        threads=1,
        batch=1,
        p50_ms=speed.get("latency_ms"),
        speed=_ratio(speed.get("speedup"), BASE),
        own_speed=_ratio(speed.get("own_speedup"), OWN_BASE),
        accuracy=Scored(found["accuracy"], images, "test"),
        drop_points=None if plain else found["drop_points"],
        drop_interval=None if plain else tuple(found["drop_points_interval"]),
        agreement=None if plain else found["agreement"],
        bytes=first["bytes"],
        made_in_s=first["seconds"],
        note=f"{shown} was not timed: {speed['failure']}" if "failure" in speed else None,
        peak_mib=first["peak_mib"],
    )


def _ratio(found: Mapping[str, Any] | None, base: str) -> Ratio | None:
    """Of a record's `speed_ratio`, whose interval records of before do not have."""
    if found is None:
        return None
    low, high = found.get("interval") or (None, None)
    return Ratio(found["median"], low, high, 0, base)


def table(*records: Mapping[str, Any]) -> str:
    return as_markdown(rows(*records))


def draw_into(text: str, drawn: str) -> str:
    """`text` with `drawn` between the marks; SystemExit where it has not both, once, in their order."""
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"The lines '{begin}' and '{end}' were expected, once each, in this order.")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{drawn}{end}{rest.partition(end)[2]}"


def main(arguments: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.peers_table", description=__doc__)
    flags.add_argument("records", nargs="+", type=Path)
    flags.add_argument("--into", type=Path, metavar="README.md")
    options = flags.parse_args(sys.argv[1:] if arguments is None else arguments)
    drawn = table(*(json.loads(each.read_text(encoding="utf-8")) for each in options.records))
    if options.into is None:
        print(drawn, end="")
        return
    options.into.write_text(draw_into(options.into.read_text(encoding="utf-8"), drawn), encoding="utf-8")


if __name__ == "__main__":
    main()
