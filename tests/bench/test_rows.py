"""Rows of measurements: what a record becomes, and the same numbers in every form."""

import csv
import io
import json
import math
from typing import Any

import pytest

from kdedge.intervals import signed_rank
from kdedge_bench.cells import csv_cell, escaped
from kdedge_bench.rows import Ratio, Row, Scored, ratio, row_of, scored
from kdedge_bench.rows_table import as_csv, as_json, as_markdown, as_text


def measured(p90s: list[float], session: str | None = "s", **changes: Any) -> dict[str, Any]:
    compute = {"p50": 9.0, "p90": 10.0, "mean": 9.5, "std": 0.19}
    return {
        "artifact": {"precision": "int8", "runtime": "onnxruntime", "version": "1.31", "bytes": 2048},
        "conditions": {"threads": 1, "batch": 1, "mode": "single stream"},
        "latency_ms": {"compute": compute, "with_copies": None, "end_to_end": {"p90": 12.0}},
        "rounds_ms": {"p90": p90s, "p50": p90s},
        "session": session,
        "throughput_ips": 100.0,
        "flags": {"unstable": True, "throttled": None},
        "accuracy": {"value": 0.9, "images": 100, "split": "test", "sha256": "a"},
    } | changes


def test_what_a_record_becomes() -> None:
    row = row_of(measured([10.0, 10.1, 10.2, 10.3, 10.4, 10.5]), "net", "INT8", note="a note")
    assert (row.model, row.way, row.runtime, row.bytes) == ("net", "INT8", "onnxruntime 1.31", 2048)
    assert (row.p50_ms, row.p90_ms, row.end_to_end_p90_ms, row.throughput_ips) == (9.0, 10.0, 12.0, None)
    assert row.variation == pytest.approx(0.02)
    assert row.accuracy == Scored(0.9, 100, "test", "a")
    assert (row.flags, row.note) == (("unstable",), "a note")
    _, low, high = signed_rank([math.log(each) for each in (10.0, 10.1, 10.2, 10.3, 10.4, 10.5)])
    assert row.p90_interval_ms == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))
    assert row_of(measured([10.0] * 5), "net", "INT8").p90_interval_ms is None
    offline = measured([], conditions={"mode": "offline"}, latency_ms={"compute": None})
    assert (row_of(offline, "net", "x").throughput_ips, row_of(offline, "net", "x").p90_ms) == (100.0, None)


def test_accuracy_is_a_number_or_what_it_is_of() -> None:
    assert scored(0.5) == Scored(0.5)
    assert scored({"value": 0.5}) == Scored(0.5)
    assert scored(None) is None
    assert scored({"top5": 1}) is None
    assert scored(True) is None


def test_a_ratio_is_of_rounds_side_by_side() -> None:
    # A machine half as fast in its second half: either file alone varies by a factor of two, their ratio not at all.
    base = measured([4.0, 4.0, 4.0, 8.0, 8.0, 8.0])
    new = measured([2.0, 2.0, 2.0, 4.0, 4.0, 4.0])
    found = ratio(base, new, "FP32")
    assert found == Ratio(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), 6, "FP32")
    slower = ratio(new, base)
    assert slower is not None
    assert slower.times == pytest.approx(0.5)
    mixed = ratio(measured([4.0] * 6), measured([2.0, 2.0, 2.0, 2.5, 2.5, 2.5]))
    assert mixed is not None
    assert mixed.low is not None
    assert (mixed.low, mixed.high) == (pytest.approx(1.6), pytest.approx(2.0)), "the slowest and the fastest round"
    assert ratio(base, measured([2.0] * 6, session="another")) is None
    assert ratio(measured([4.0], session=None), measured([2.0], session=None)) is None
    assert ratio(base, measured([2.0])) is None, "a round is missing"
    one, two = (measured([], conditions={"mode": "offline"}, rounds_ips=each) for each in ([100.0], [250.0]))
    found = ratio(one, two)
    assert found is not None
    assert found.times == pytest.approx(2.5)


ROWS = [
    Row("net", "FP32", p90_ms=10.0, p90_interval_ms=(9.5, 10.5), accuracy=Scored(0.9, 100), bytes=2048),
    Row("net", "INT8", p90_ms=5.0, speed=Ratio(2.0, 1.9, 2.1, 6, "FP32"), flags=("unstable",), drop_points=-0.5),
    Row("a|b", "nncf", why="nncf is not installed."),
    *[Row("net", f"way {place}", why="No GPU.") for place in range(6)],
]


def test_a_text_has_the_columns_that_somebody_fills() -> None:
    lines = as_text(ROWS).replace("\xa0", " ").splitlines()
    headings = ("model", "way", "accuracy, 95 %", "drop, points", "p90 ms, 95 %", "speed beside FP32", "file", "flags")
    assert lines[0].split("  ")[0] == "model"
    assert [each.strip() for each in lines[0].split("  ") if each.strip()] == list(headings)
    assert "90.00 % (82.6–94.5)" in lines[2]
    assert "10.0 (9.50–10.5)" in lines[2]
    assert "2.00x (1.90–2.10)" in lines[3]
    assert "-0.50" in lines[3]
    assert lines[3].endswith("unstable")
    assert lines[4:] == [
        "a|b nncf: not measured. nncf is not installed.",
        "net way 0; net way 1; net way 2; net way 3; and 2 more: not measured. No GPU.",
    ]


def test_bases_that_differ_are_in_no_heading() -> None:
    rows = [
        *ROWS,
        Row("net", "x", speed=Ratio(1.0, None, None, 1, "another")),
        Row("n", "y", own_speed=Ratio(3, 2, 4, 6)),
    ]
    assert "beside" not in as_text(rows).splitlines()[0]
    assert "speed" in as_text(rows).splitlines()[0]


def test_the_same_in_markdown_csv_and_json() -> None:
    text = as_markdown(ROWS)
    assert text.splitlines()[0].startswith("| model | way | accuracy, 95 % |")
    assert all(line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines()[:4])
    assert "- a\\|b nncf: not measured." in text
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    assert len(lines) == len(ROWS)
    assert (lines[0]["p90_ms"], lines[0]["p90_interval_ms.low"], lines[0]["speed.times"]) == ("10.0", "9.5", "")
    assert (lines[1]["speed.low"], lines[1]["flags"], lines[1]["accuracy.value"]) == ("1.9", "unstable", "")
    assert lines[2]["why"] == "nncf is not installed."
    assert json.loads(json.dumps(as_json(ROWS), allow_nan=False))[1]["speed"]["times"] == 2.0
    assert as_text([ROWS[2]]) == "a|b nncf: not measured. nncf is not installed."


def test_a_name_is_no_formula_and_no_markup() -> None:
    assert csv_cell('=HYPERLINK("x")') == '\'=HYPERLINK("x")'
    assert csv_cell(["+1", "2"]) == "'+1;2"
    assert csv_cell(-1.5) == -1.5
    assert csv_cell(True) == "true"
    assert csv_cell("plain") == "plain"
    assert escaped("a|b <img>\n[c]") == "a\\|b \\<img\\> \\[c\\]"
