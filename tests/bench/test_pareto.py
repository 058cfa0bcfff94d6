"""The front by value, what can be compared with what, and the chart that is pointed at."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge.runs import Run
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.pareto import Field, Point, beaten_by, latency_fields, measurements, pareto_table, size_fields
from kdedge_bench.pareto_chart import LATENCY, SIZE, plot
from kdedge_bench.report_plot import Scale, ticks
from kdedge_bench.table import Row, Summary, summarize

MakeRun = Callable[..., Path]


def point(accuracy: float, cost: float, name: str = "x", run: str = "a") -> Point:
    return Point(run, Row("int8", name, accuracy=accuracy), accuracy, cost)


def both(run: Path) -> tuple[Facts, Summary]:
    facts = read_facts(Run(run))
    return facts, summarize(facts)


def change(run: Path, artifact: str, **changes: Any) -> None:
    (path,) = (run / "bench").glob(f"*-{artifact}.json")
    document = json.loads(path.read_text())
    for key, value in changes.items():
        document[key] = document[key] | value if isinstance(value, dict) and document.get(key) else value
    path.write_text(json.dumps(document))


def test_front_by_value() -> None:
    points = [point(0.9, 2.0), point(0.8, 1.0), point(0.7, 1.0), point(0.9, 3.0), point(0.95, 3.0), point(0.9, 2.0)]
    best = beaten_by(points)
    assert [each is None for each in best] == [True, True, False, False, True, True]  # equals beat nobody
    assert best[2] is points[1]
    assert best[3] is points[4]


def test_the_front_is_what_nothing_beats() -> None:
    """Of many points: nobody on the front beats another there, and everybody else is beaten from the front."""
    rng = np.random.default_rng(0)
    points = [
        point(float(a), float(c)) for a, c in zip(rng.integers(0, 9, 60) / 9, rng.integers(1, 9, 60), strict=True)
    ]
    best = beaten_by(points)
    front = {(each.accuracy, each.cost) for each, other in zip(points, best, strict=True) if other is None}
    ordered = sorted(front, key=lambda each: each[1])
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(ordered))
    assert all((other.accuracy, other.cost) in front for other in best if other is not None)
    assert len(front) > 1


def test_fields_of_one_run(run_folder: Path) -> None:
    (field,) = latency_fields([both(run_folder)])
    assert field.conditions == "Example CPU @ 2.0 GHz, 1 thread"
    assert [(each.row.key, each.cost) for each in field.points] == [("fp32", 0.1532), ("int8", 0.0712)]
    (field,) = size_fields([both(run_folder)])
    assert [each.row.key for each in field.points] == ["baseline", "teacher", "fp32", "int8"]
    assert field.points[3].cost == 98_304
    assert field.conditions == ""


def test_what_cannot_be_compared_stands_apart(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b"), make_run("c"), make_run("d")]
    change(runs[1], "int8", conditions={"threads": 2})
    change(runs[2], "int8", machine={"cpu": "Other CPU"})
    splits = json.loads((runs[3] / "splits.json").read_text())
    splits["splits"]["test"]["sha256"] = "6" * 64
    (runs[3] / "splits.json").write_text(json.dumps(splits))
    found = [both(run) for run in runs]
    told = [({each.run for each in field.points}, field.conditions) for field in latency_fields(found)]
    assert [names for names, _ in told] == [{"a", "b", "c"}, {"b"}, {"c"}, {"d"}]
    assert "2 threads" in told[1][1]
    assert "Other CPU" in told[2][1]
    assert [{each.run for each in field.points} for field in size_fields(found)] == [{"a", "b", "c"}, {"d"}]
    assert all("test images of digits" in field.conditions for field in size_fields(found))


def test_the_newest_measurement_counts_under_each_condition(make_run: MakeRun) -> None:
    run = make_run()
    (path,) = (run / "bench").glob("*-int8.json")
    document = json.loads(path.read_text())
    document |= {"started_at": "2026-01-03T00:00:00Z"}
    document["latency_ms"]["compute"]["p90"] = 0.5
    (run / "bench" / "later-int8.json").write_text(json.dumps(document))
    document["conditions"]["threads"] = 2
    (run / "bench" / "two-threads-int8.json").write_text(json.dumps(document))
    found = [(key, record["conditions"]["threads"], record["latency_ms"]["compute"]["p90"])
             for key, _, record in measurements(read_facts(Run(run)))]  # fmt: skip
    assert sorted(found) == [("fp32", 1, 0.1532), ("int8", 1, 0.5), ("int8", 2, 0.5)]


def test_another_runtime_has_a_name_and_an_accuracy_of_its_own(make_run: MakeRun) -> None:
    run = make_run()
    (path,) = (run / "bench").glob("*-fp32.json")
    document = json.loads(path.read_text())
    document["artifact"]["runtime"] = "openvino"
    document["accuracy"] = {"value": 0.5, "images": 540, "split": "test", "sha256": "5" * 64}
    document["flags"] = {"unstable": True}
    (run / "bench" / "openvino-fp32.json").write_text(json.dumps(document))
    document["artifact"]["sha256"], document["artifact"]["onnx_sha256"] = "e" * 64, document["artifact"]["sha256"]
    document["artifact"]["runtime"], document["accuracy"]["sha256"] = "tensorrt", "6" * 64
    (run / "bench" / "engine-fp32.json").write_text(json.dumps(document))
    facts, found = both(run)
    (field,) = latency_fields([(facts, found)])
    told = {each.row.name: (each.accuracy, each.row.flags) for each in field.points if each.row.key == "fp32"}
    assert told == {
        "Student FP32": (517 / 540, ()),
        "Student FP32 (openvino)": (0.5, ("unstable",)),
        "Student FP32 (tensorrt)": (517 / 540, ("unstable",)),  # scored on other images
    }
    assert facts.stale_records == 0, "an engine is of the file it was built of"
    record = facts.record("fp32")
    assert record is not None
    assert record["artifact"]["runtime"] == "onnxruntime"


def test_points_of_several_sessions_say_so(make_run: MakeRun) -> None:
    run = make_run()
    for artifact in ("fp32", "int8"):
        change(run, artifact, session="one")
    (field,) = latency_fields([both(run)])
    assert field.occasions == ""
    change(run, "fp32", session="another", conditions={"effort": "standard"})
    (field,) = latency_fields([both(run)])
    assert field.occasions.startswith("Measured on several occasions, with efforts standard and quick: ")
    assert plot(field, LATENCY).caption.endswith(field.occasions)
    rows = pareto_table([("latency", field)]).rows
    assert [(row["session"], row["effort"]) for row in rows] == [("another", "standard"), ("one", "quick")]
    (field,) = size_fields([both(run)])
    assert field.occasions == ""


def test_chart_of_one_run(make_run: MakeRun) -> None:
    run = make_run()
    change(run, "int8", rounds_ms={"p50": [0.06, 0.065], "p90": [0.07, 0.074]})
    (field,) = latency_fields([both(run)])
    drawn = plot(field, LATENCY, [row for row in summarize(read_facts(Run(run))).rows if row.key == "teacher"])
    assert drawn.legend == ()
    lines = {spot.lines[0]: spot for spot in drawn.spots}
    int8 = lines["tiny-digits-40-s0: Student INT8, ships"]
    assert int8.lines[1].replace("\xa0", " ") == "95.6 % of 540 test images right (95 % interval 93.5–97.0)"
    assert int8.lines[2].replace("\xa0", " ") == "0.0712 ms an image, p90 (0.0700 to 0.0740 in 2 rounds); 96 KiB"
    fp32 = lines["tiny-digits-40-s0: Student FP32"]
    assert fp32.front  # a little more accurate, and slower
    assert int8.front
    assert fp32.left > int8.left
    assert fp32.top < int8.top  # less from above is more accurate
    assert ">Teacher<" in drawn.svg
    assert drawn.svg.count("faded") == 0
    assert all(0 < spot.left < 100 and 0 < spot.top < 100 for spot in drawn.spots)


def test_chart_of_several_runs_fades_what_is_beaten(make_run: MakeRun) -> None:
    runs = [make_run("good"), make_run("bad", right={"fp32": 400, "int8": 390})]
    (field,) = latency_fields([both(run) for run in runs])
    drawn = plot(field, LATENCY)
    assert drawn.svg.count(' faded"') == 2
    told = {spot.lines[0]: spot.lines[-1] for spot in drawn.spots}
    assert told["bad: Student INT8, ships"] == "Beaten by good, Student INT8: more accurate and no slower."
    assert told["bad: Student FP32"] == "Beaten by good, Student FP32: more accurate and no slower."
    assert told["good: Student INT8, ships"] == "On the front: nothing here beats it."
    assert [each.words for each in drawn.legend] == ["good", "bad", "Student FP32", "Student INT8"]
    assert "Rounds" not in drawn.caption


def test_a_wide_range_is_drawn_in_logarithms() -> None:
    field = Field("", (point(0.5, 1 << 20), point(0.9, 100 << 20)))
    drawn = plot(field, SIZE)
    numbers = [float(text) for text in re.findall(r'text-anchor="middle" class="quiet">([\d.]+)<', drawn.svg)]
    assert numbers == [1, 2, 5, 10, 20, 50, 100]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [(0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]), (93.2, 97.9, False, [94, 95, 96, 97]),
     (0.05, 3, True, [0.05, 0.1, 0.2, 0.5, 1, 2]), (0.001, 900, True, [0.001, 0.01, 0.1, 1, 10, 100]),
     (-3, 3, False, [-3, -2, -1, 0, 1, 2, 3])],
)  # fmt: skip
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    found = ticks(Scale(low, high, 0, 100, log))
    assert len(found) == len(expected)
    assert all(math.isclose(a, b) for a, b in zip(found, expected, strict=True))
