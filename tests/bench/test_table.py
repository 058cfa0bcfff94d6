"""The summary by value, with and without the parts it is made of."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from kdedge.errors import RunError
from kdedge_bench import as_rich, as_text, summary

MakeRun = Callable[..., Path]


def edit(path: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_rows_by_value(make_run: MakeRun) -> None:
    found = summary(make_run())
    assert [row.key for row in found.rows] == ["baseline", "teacher", "fp32", "int8"]
    assert [row.accuracy for row in found.rows] == pytest.approx([400 / 540, 525 / 540, 517 / 540, 516 / 540])
    for row, right in zip(found.rows, (400, 525, 517, 516), strict=True):
        expected = stats.binomtest(right, 540).proportion_ci(method="wilson")
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
        assert row.images == 540
    assert [row.params for row in found.rows] == [75_000, 370_000, 75_000, 75_000]
    assert [row.bytes for row in found.rows] == [310_000, 1_500_000, 305_000, 98_304]
    assert [row.p90_ms for row in found.rows] == [None, None, 0.1532, 0.0712]
    assert [row.p50_ms for row in found.rows] == [None, None, pytest.approx(0.13788), pytest.approx(0.06408)]
    assert [row.threads for row in found.rows] == [None, None, 1, 1]
    assert [row.shipped for row in found.rows] == [False, False, False, True]
    assert found.shipping is not None
    assert (found.shipping.target, found.shipping.verdict, found.shipping.speedup) == ("onnxruntime-cpu", "pass", 2.15)
    assert found.shipping.drop_interval == (0.05, 0.9)
    assert found.machine == "Example CPU @ 2.0 GHz"
    json.dumps(found.to_json(), allow_nan=False)


def test_as_text(make_run: MakeRun) -> None:
    lines = as_text(summary(make_run())).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.replace("\xa0", " ").split("  ") for line in lines]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows if len(row) > 2}
    assert cells["Baseline, labels only"] == ["74.1 %", "70.2–77.6", "75,000", "303 KiB", "–", "–"]
    assert cells["Student FP32"] == ["95.7 %", "93.7–97.1", "75,000", "298 KiB", "0.138", "0.153"]
    assert cells["Student INT8 (shipped)"] == ["95.6 %", "93.5–97.0", "75,000", "96 KiB", "0.0641", "0.0712"]
    assert "Latency of one image, compute only, on Example CPU @ 2.0 GHz, 1 thread." in lines
    decided = "INT8 is shipped: it runs at 2.15 times the speed of FP32 here, and it gives another class for 0.19 of"
    assert decided in " ".join(lines)


def test_as_rich_fits_80_columns_and_takes_names_as_they_are(make_run: MakeRun) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(as_rich(summary(make_run("[bold]odd[nope]"))))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]odd[nope]" in text
    assert "0.0712" in text
    assert "Baseline, labels only" in text
    assert "…" not in text


def test_before_export_and_bench(make_run: MakeRun) -> None:
    run = make_run()
    shutil.rmtree(run / "bundle")
    found = summary(run)
    assert found.shipping is None
    fp32, int8 = found.rows[-2:]
    assert (fp32.accuracy, fp32.bytes) == (pytest.approx(517 / 540), 310_000)  # of the trained weights
    assert (int8.accuracy, int8.bytes, int8.p90_ms) == (None, None, None)
    assert found.best is fp32
    assert "shipped" not in as_text(found)


def test_without_latency_there_are_dashes(make_run: MakeRun) -> None:
    run = make_run()
    shutil.rmtree(run / "bench")
    found = summary(run)
    assert [row.p90_ms for row in found.rows] == [None] * 4
    assert "not measured yet: kdedge bench" in as_text(found)


def test_a_latency_of_an_earlier_export_does_not_count(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / "bench" / "example-cpu-int8.json", lambda record: record["artifact"].update(sha256="0" * 64))
    found = summary(run)
    assert [row.p90_ms for row in found.rows] == [None, None, 0.1532, None]


def test_latencies_of_two_machines_are_not_mixed(make_run: MakeRun) -> None:
    run = make_run()
    record = json.loads((run / "bench" / "example-cpu-int8.json").read_text())
    record["machine"]["cpu"], record["started_at"] = "Other CPU", "2026-02-01T00:00:00Z"
    record["latency_ms"]["compute"]["p90"] = 9.0
    (run / "bench" / "other-cpu-int8.json").write_text(json.dumps(record))
    found = summary(run)
    assert found.machine == "Other CPU"
    assert [row.p90_ms for row in found.rows] == [None, None, None, 9.0]


def test_without_baseline_or_test_labels(make_run: MakeRun) -> None:
    run = make_run()
    (run / "predictions.npz").unlink()
    (run / "splits.json").unlink()
    edit(run / "result.json", lambda result: result.update(baseline=None))
    found = summary(run)
    assert [row.key for row in found.rows] == ["teacher", "fp32", "int8"]
    assert [row.accuracy for row in found.rows] == pytest.approx([525 / 540, 517 / 540, 516 / 540])
    assert [(row.low, row.images) for row in found.rows] == [(None, None)] * 3  # shares of an unknown number


def test_fp32_ships(make_run: MakeRun) -> None:
    run = make_run()
    edit(
        run / "bundle" / "gate.json",
        lambda gate: gate["targets"]["onnxruntime-cpu"].update(shipped="fp32", why="Too slow."),
    )
    found = summary(run)
    assert [row.shipped for row in found.rows] == [False, False, True, False]
    assert found.best is not None
    assert found.best.key == "fp32"
    assert as_text(found).endswith("Shipped: FP32. Too slow.\n")


def test_an_unstable_measurement_is_marked(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / "bench" / "example-cpu-int8.json", lambda record: record["flags"].update(unstable=True))
    found = summary(run)
    assert [row.flags for row in found.rows] == [(), (), (), ("unstable",)]
    assert "Marked unstable: measure again on an idle machine." in " ".join(as_text(found).split())


def test_undecided_targets_are_passed_over(make_run: MakeRun) -> None:
    run = make_run()
    board = {"shipped": None, "verdict": "undecided", "why": "Not measured."}
    edit(run / "bundle" / "gate.json", lambda gate: gate.update(targets={"board": board, **gate["targets"]}))
    shipping = summary(run).shipping
    assert shipping is not None
    assert shipping.target == "onnxruntime-cpu"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", "{", "cannot be read as JSON"),
        ("result.json", "[]", "a JSON object was expected"),
        ("predictions.npz", "no zip", "cannot be read as arrays"),
        ("metrics.jsonl", "{\n{}\n", "line 1, cannot be read"),
        ("bench/x.json", '{"schema": 99}', "reads up to 1"),
        ("bench/x.json", '{"schema": 1}', "has no 'artifact'"),
    ],
)
def test_damaged_files_are_named(make_run: MakeRun, file: str, content: str, message: str) -> None:
    run = make_run()
    (run / file).write_text(content)
    with pytest.raises(RunError, match=message) as caught:
        summary(run)
    assert file.split("/")[-1] in str(caught.value)


def test_a_metrics_line_cut_short_by_a_kill_is_dropped(make_run: MakeRun) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "inner", "st')
    assert len(summary(run).rows) == 4


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        summary(tmp_path)
