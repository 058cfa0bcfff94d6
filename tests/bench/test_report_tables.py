"""The page, CSV, JSON and Markdown tell the same numbers; and the tables and drawings that only the report has."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kdedge.cli import run as kdedge
from kdedge.errors import RunError
from kdedge.runs import Run
from kdedge_bench import report
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.pareto import latency_fields
from kdedge_bench.records import power_mode
from kdedge_bench.report_chapter import chapter
from kdedge_bench.report_classes import change, changes
from kdedge_bench.report_latency import energy, latencies, spreads, throughput
from kdedge_bench.report_tables import Column, Table, as_csv, as_markdown
from kdedge_bench.stats import paired_difference
from kdedge_bench.table import summarize

from .page_reader import Page

MakeRun = Callable[..., Path]
# A run's tables that the page does not draw as tables: pictures stand for it.
PICTURED = {"lost_images"}


def black(_: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    return [np.zeros((8, 8, 1), np.uint8) for _ in ids]


def edit_records(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    for path in (run / "bench").glob("*.json"):
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))


def measured_energy(record: dict[str, Any]) -> None:
    record["energy_mj_per_inference"] = 1.2345
    record["energy_source"] = {"source": "VDD_IN of ina3221", "caveat": "the whole board", "samples": 40}


def with_quantiles(record: dict[str, Any]) -> None:
    p90 = record["latency_ms"]["compute"]["p90"]
    low = {"1": 0.81, "5": 0.82, "10": 0.84, "25": 0.87, "75": 0.95, "95": 1.1}
    record["quantiles_ms"] = {"compute": {key: factor * p90 for key, factor in low.items()}, "end_to_end": None}
    record["rounds_ms"] = {"p50": [0.9 * p90] * 2, "p90": [0.98 * p90, 1.03 * p90]}


@pytest.fixture
def two(make_run: MakeRun) -> list[Path]:
    """Runs with everything that a table can have, one of them with names that are hard to write down."""
    runs = [make_run("first"), make_run("second", classes=[f'a|b*{index}_,"<x>' for index in range(10)])]
    for run in runs:
        edit_records(run, measured_energy)
        edit_records(run, with_quantiles)
    return runs


def markdown_cells(text: str) -> set[tuple[str, ...]]:
    """The rows of all pipe tables, as a reader sees them."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]
    return {tuple(re.sub(r"\\([\\|*_`\[\]<>#])", r"\1", cell) for cell in row) for row in rows}


def test_page_csv_json_and_markdown_agree(two: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    page = Page(report(two, tmp_path / "all.html", tables=folder, load=black))
    on_page = {tuple(row) for table in page.tables for row in table}
    document = json.loads((folder / "report.json").read_text())
    cells = markdown_cells((folder / "report.md").read_text())
    expected = [chapter(read_facts(Run(run)), run.name, "k", black) for run in two]
    assert [run["run"] for run in document["runs"]] == ["first", "second"]
    checked = set()
    for run, made in zip(document["runs"], expected, strict=True):
        assert set(run["tables"]) == set(made.tables)
        for key, rows in run["tables"].items():
            table = Table(key, "", made.tables[key].columns, tuple(rows))  # JSON's numbers, drawn anew
            for texts in table.texts():
                plain = tuple(text.replace("\xa0", " ") for text in texts)
                assert tuple(" ".join(text.split("\n")) for text in texts) in cells
                checked.add(key)
                if key == "networks":  # the page has a tag for what ships, and the network's name
                    assert any(row[0].startswith(plain[0]) and row[1:] == plain[1:-1] for row in on_page)
                elif key not in PICTURED:
                    assert plain in on_page
            check_csv(folder / f"{key}.csv", run["run"], rows)
    assert checked >= {"networks", "classes", "int8_files", "int8_classes", "sensitivity", "lost_images", "latencies",
                       "energy", "pseudo_labels", "stages"}  # fmt: skip
    check_csv(folder / "pareto.csv", None, document["pareto"])
    assert len(document["pareto"]) == 2 * (2 + 4)


def check_csv(path: Path, run: str | None, rows: list[dict[str, Any]]) -> None:
    """Every number is there in full."""
    if not rows:
        return
    with path.open(newline="", encoding="utf-8") as file:
        read = [line for line in csv.DictReader(file) if run is None or line["run"] == run]
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        for key, value in row.items():
            if value is None:
                assert line[key] == ""
            elif isinstance(value, bool):
                assert line[key] == str(value).lower()
            elif isinstance(value, int | float):
                assert float(line[key]) == value
            elif isinstance(value, list):
                assert line[key] == ";".join(map(str, value))
            else:
                assert line[key] == value


def test_cells_of_every_kind() -> None:
    table = Table("t", "T", (Column("a", ("a", "b"), lambda a, b: f"{a}/{b}"), Column("c", ("c",), text=True)),
                  ({"a": 1, "b": None, "c": "x|y", "d": [1, 2]}, {"a": 2.5, "b": True, "c": None}))  # fmt: skip
    assert table.texts() == [("1/None", "x|y"), ("2.5/True", "–")]
    assert as_csv(table.rows) == "a,b,c,d\n1,,x|y,1;2\n2.5,true,,\n"
    assert as_markdown(table).splitlines() == ["| a | c |", "| --: | --- |", "| 1/None | x\\|y |", "| 2.5/True | – |"]
    assert not Table("t", "T", (), ())


def test_the_command_writes_them(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "report",
        str(run_folder),
        "--out",
        str(tmp_path / "x.html"),
        "--tables",
        str(tmp_path / "t"),
        "--json",
    ]
    assert kdedge(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tables"] == str(tmp_path / "t")
    assert {"report.json", "report.md", "networks.csv", "pareto.csv"} <= {
        path.name for path in (tmp_path / "t").iterdir()
    }
    assert (tmp_path / "x.html").is_file()


def test_a_folder_that_cannot_be_written(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write"):
        report([run_folder], tmp_path / "x.html", tables=tmp_path / "file", load=black)
    assert not (tmp_path / "x.html").exists()


def test_what_an_earlier_report_left_is_removed(two: list[Path], make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    report(two, tmp_path / "x.html", tables=folder, load=black)
    (folder / "mine.csv").write_text("kept")
    plain = make_run("plain")
    for path in (plain / "bundle").glob("*"):
        path.unlink()
    report([plain], tmp_path / "x.html", tables=folder, load=black)
    left = {path.stem for path in folder.glob("*.csv")}
    assert {"networks", "mine"} <= left
    assert "int8_files" not in left


def test_a_power_mode_is_told_by_its_name(run_folder: Path) -> None:
    facts = read_facts(Run(run_folder))
    facts.records[0]["conditions"]["power_mode"] = {"id": 2, "name": "MAXN"}
    measured_energy(facts.records[0])
    assert power_mode(facts.records[0]) == "MAXN"
    assert power_mode({"conditions": {"power_mode": {"id": 0, "name": None}}}) == "0"
    assert power_mode({"conditions": {}}) is None
    assert "MAXN" in {row["power_mode"] for row in energy(facts).rows}


def test_two_runs_of_one_name(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a/one/same"), make_run("b/one/same"), make_run("other")]
    page = Page(report([*runs, runs[0]], tmp_path / "all.html", load=black))
    told = [row[0] for row in page.table("Run", "Network", "Test accuracy")]
    assert told == ["a/one/same", "b/one/same", "other"]


def test_change_of_each_class_by_value(run_folder: Path) -> None:
    facts = read_facts(Run(run_folder))
    table = changes(facts)
    labels, before, after = facts.test_labels, facts.logits("fp32"), facts.logits("int8")
    assert labels is not None
    assert before is not None
    assert after is not None
    assert sum(row["lost_images"] - row["won_images"] for row in table.rows) == 517 - 516
    assert sum(row["images"] for row in table.rows) == 540
    assert [row["change_points"] for row in table.rows] == sorted(row["change_points"] for row in table.rows)
    first = table.rows[0]
    mine = labels == first["number"]
    found = paired_difference(before.argmax(1)[mine] == labels[mine], after.argmax(1)[mine] == labels[mine])
    assert first["change_points"] == 100 * found.difference < 0
    assert (first["change_low_points"], first["change_high_points"]) == (100 * found.low, 100 * found.high)
    svg, caption = change(table) or ("", "")
    assert f">{first['class']}</text>" in svg
    assert "In 9 of 10 classes no answer changes" in caption


def test_change_without_predictions_or_without_any(make_run: MakeRun) -> None:
    run = make_run()
    with np.load(run / "predictions.npz") as file:
        arrays = {key: file[key] for key in file.files}
    arrays["test_logits__int8"] = arrays["test_logits__fp32"]
    np.savez(run / "predictions.npz", **arrays)
    table = changes(read_facts(Run(run)))
    assert len(table.rows) == 10
    assert change(table) is None
    del arrays["test_logits__int8"]
    np.savez(run / "predictions.npz", **arrays)
    assert not changes(read_facts(Run(run)))


def test_a_hundred_classes_are_too_many_for_the_chart(make_run: MakeRun) -> None:
    labels = np.arange(1000) % 100
    run = make_run(classes=[f"class {index}" for index in range(100)], labels=labels,
                   ids=[f"x/{index}" for index in range(1000)],
                   right={"baseline": 500, "teacher": 930, "student": 900, "fp32": 900, "int8": 850})  # fmt: skip
    svg, caption = change(changes(read_facts(Run(run)))) or ("", "")
    assert len(re.findall(r">class \d+</text>", svg)) == 24
    assert "Of 100 classes those that change most." in caption


def test_latencies_and_their_strips(run_folder: Path, two: list[Path]) -> None:
    facts = read_facts(Run(run_folder))  # records of before quantiles and rounds were kept
    table = latencies(facts)
    assert not energy(facts)
    assert [(row["artifact"], row["what"]) for row in table.rows] == [
        ("fp32", "compute"), ("fp32", "end to end"), ("int8", "compute"), ("int8", "end to end"),
    ]  # fmt: skip
    ((machine, svg),) = spreads(table)
    assert machine == "Example CPU @ 2.0 GHz, 1 thread"
    assert svg.count('class="band"') == 4
    assert svg.count('class="tick p50"') == svg.count('class="tick p90"') == svg.count('class="tick p99"') == 4
    assert 'class="round"' not in svg
    facts = read_facts(Run(two[0]))
    table = latencies(facts)
    assert table.rows[0]["p25_ms"] == pytest.approx(0.87 * 0.1532)
    assert table.rows[0]["rounds_p90_ms"] == pytest.approx([0.98 * 0.1532, 1.03 * 0.1532])
    ((_, svg),) = spreads(table)
    assert svg.count('class="round"') == 4
    assert svg.count('class="band"') == 2 * 4 + 2
    assert energy(facts).texts()[1] == (
        "Student INT8", "Example CPU @ 2.0 GHz", "–", "one by one", "1.23", "VDD_IN of ina3221. the whole board",
    )  # fmt: skip


def test_machines_have_strips_of_their_own(make_run: MakeRun) -> None:
    run = make_run()
    (path,) = (run / "bench").glob("*-int8.json")
    document = json.loads(path.read_text())
    document["machine"]["cpu"] = "Board"
    (run / "bench" / "board-int8.json").write_text(json.dumps(document))
    table = latencies(read_facts(Run(run)))
    assert "Machine" in [column.heading for column in table.columns]
    assert [place for place, _ in spreads(table)] == ["Board, 1 thread", "Example CPU @ 2.0 GHz, 1 thread"]
    document["conditions"]["batch"] = 8
    document["latency_ms"]["end_to_end"] = None
    (run / "bench" / "board-8-int8.json").write_text(json.dumps(document))
    facts = read_facts(Run(run))
    table = latencies(facts)
    assert "Batch" in [column.heading for column in table.columns]
    assert "Board, 1 thread, batches of 8" in [place for place, _ in spreads(table)]
    fields = latency_fields([(facts, summarize(facts))])  # times of a batch are no latency of one image
    assert [len(field.points) for field in fields] == [1, 2]


def test_batch_after_batch_is_throughput_and_no_latency(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    edit_records(run, measured_energy)
    (path,) = (run / "bench").glob("*-int8.json")
    document = json.loads(path.read_text())
    document["latency_ms"] = {"compute": None, "with_copies": None, "end_to_end": None}
    document["conditions"] |= {"mode": "offline", "batch": 16}
    document |= {"throughput_ips": 12_345.6, "started_at": "2026-02-02T03:04:05Z"}
    offline = run / "bench" / "quick" / "records" / "offline.json"
    offline.parent.mkdir(parents=True)
    offline.write_text(json.dumps(document))
    facts = read_facts(Run(run))
    assert throughput(facts).texts() == [("Student INT8", "Example CPU @ 2.0 GHz", "1", "16", "12,345.6")]
    assert [row[3] for row in energy(facts).texts()] == ["one by one", "one by one", "batch after batch of 16"]
    assert len(latencies(facts).rows) == 4
    assert summarize(facts).row("int8").p90_ms == 0.0712, "the newest record is no latency of one image"
    page = Page(report([run], tmp_path / "x.html", load=black))
    assert page.table("Artifact", "Machine", "Threads", "Batch", "Images a second")
    document["conditions"]["power_mode"] = {"id": 2, "name": "15W"}
    offline.with_name("15w.json").write_text(json.dumps(document))
    assert {row[2] for row in throughput(read_facts(Run(run))).texts()} == {"–", "15W"}
    assert dict(chapter(facts, "x", "k", black).conditions)["Batch"] == "1"


def test_power_modes_have_strips_of_their_own(make_run: MakeRun) -> None:
    run = make_run()
    (path,) = (run / "bench").glob("*-int8.json")
    document = json.loads(path.read_text())
    document["conditions"]["power_mode"] = {"id": 2, "name": "15W"}
    (run / "bench" / "board-int8.json").write_text(json.dumps(document))
    table = latencies(read_facts(Run(run)))
    assert "Power mode" in [column.heading for column in table.columns]
    assert "Example CPU @ 2.0 GHz, 1 thread, power mode 15W" in [place for place, _ in spreads(table)]


def test_names_are_no_markup_in_headings(make_run: MakeRun, tmp_path: Path) -> None:
    report([make_run("<img src=x> a*b*")], tmp_path / "x.html", tables=tmp_path / "t", load=black)
    assert "## \\<img src=x\\> a\\*b\\*" in (tmp_path / "t" / "report.md").read_text().splitlines()


def test_p99_that_is_not_known_is_no_mark(make_run: MakeRun) -> None:
    run = make_run()
    edit_records(run, lambda record: record["latency_ms"]["compute"].update(p99=None))
    table = latencies(read_facts(Run(run)))
    ((_, svg),) = spreads(table)
    assert svg.count('class="tick p99"') == 2
    assert table.texts()[0][4] == "–"


def test_the_verdict_of_the_folder_that_a_run_lies_in(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("kd-fixmatch-s0")
    page = Page(report([run], load=black))
    assert "does KD-FixMatch help?" not in page.text
    seeds = [{"seed": 0, "run": "kd-fixmatch-s0"}]
    against = {
        "question": "labels only",
        "seeds": [0, 1],
        "mean": 0.2,
        "interval_95": [-0.0104, 0.41],
        "word": "no evidence",
    }
    document = {
        "schema": 1,
        "rows": {
            "kd-fixmatch": {"seeds": seeds},
            "supervised": {"test_accuracy": {"mean": 0.736, "half_width_95": 0.04}},
        },
        "comparisons": {"supervised": against, "one-seed": {"mean": None, "interval_95": None, "seeds": []}},
    }
    (tmp_path / "verdict.json").write_text(json.dumps(document))
    page = Page(report([run], load=black))
    assert page.table("KD-FixMatch against") == [
        ["labels only", "73.6 ± 4.0", "+20.00", "−1.04 to +41.00", "2", "no evidence"],
        ["one-seed", "–", "–", "–", "0", "–"],
    ]
    seeds[0]["run"] = "another"
    (tmp_path / "verdict.json").write_text(json.dumps(document))
    assert "does KD-FixMatch help?" not in Page(report([run], load=black)).text


def test_a_run_that_was_pretrained(make_run: MakeRun) -> None:
    run = make_run()
    lines = [{"stage": "pretrain", "step": 10 * step, "loss": 5.0 - step, "lr": 0.1} for step in range(3)]
    lines.append({"stage": "pretrain", "step": 20, "knn_accuracy": 0.61})
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    result = json.loads((run / "result.json").read_text())
    result["pretrain"] = {"arch": "mobilenet-v2", "of": "student", "params": 5, "seconds": 61.0, "steps": 20,
                          "knn_accuracy": 0.612}  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))
    page = Page(report([run], load=black))
    assert (
        "The student (mobilenet-v2) was pretrained by SimCLR, without labels: 20 steps, 1 min 1 s, a vote of the "
        "nearest neighbours on its features then gets 61.2 % right." in page.text
    )
    assert (
        "Accuracy of nearest neighbours on the features. Last logged values: pretraining: 0.61 at step 20."
        in page.source
    )
    result["pretrain"] |= {"knn_accuracy": None, "seconds": None}
    (run / "result.json").write_text(json.dumps(result))
    assert "without labels: 20 steps." in Page(report([run], load=black)).text
