"""A suite from its rounds to its table, on a simulated clock; one row of it for real."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import BundleError, DeviceError, RecipeError, RunError
from kdedge.runs import Run
from kdedge_bench import compare, suite_run, summary
from kdedge_bench.facts import read_facts
from kdedge_bench.pareto import latency_fields
from kdedge_bench.rows import ratio
from kdedge_bench.suite_run import Stopped, run_suite
from kdedge_device.bench_rounds import Job, Told
from kdedge_device.clock import Effort, summarize
from kdedge_device.failures import Failure, RuntimeFailure
from kdedge_device.record import record

MakeRun = Callable[..., Path]


class Simulated:
    """Stands for a process that measures: each file has a speed, and the machine gets slower call by call."""

    def __init__(self, ms: dict[str, float], slower: float = 0.0) -> None:
        self.ms, self.slower = ms, slower
        self.calls: list[str] = []
        self.fails: dict[str, int] = {}
        self.stop_at: int | None = None

    def __call__(self, job: Job) -> Told:
        if self.stop_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(job.name)
        if self.calls.count(job.name) == self.fails.get(job.name):
            raise Failure("it broke.")
        precision = next(each for each in self.ms if f"-{each}-" in job.name)
        ms = self.ms[precision] * (1 + self.slower * len(self.calls))
        offline = "--offline" in job.arguments
        words = list(job.arguments)
        threads, batch = (int(words[words.index(flag) + 1]) for flag in ("--threads", "--batch"))
        times = [round(ms * 1e6)] * 20
        artifact = {"name": precision, "file": "f", "sha256": precision * 8, "bytes": 100, "precision": precision}
        conditions = {"threads": threads, "batch": batch, "mode": "offline" if offline else "single stream"}
        told = record(
            artifact=artifact | {"runtime": "onnxruntime", "version": "1.0"},
            latency_ms={} if offline else {"compute": summarize(times)},
            conditions=conditions | {"headline": "throughput_ips" if offline else "compute"},
            started_at="2026-01-02T03:04:05Z",
            unstable=False,
            throughput_ips=batch * 1000 / ms,
        )
        return Told(told, None if offline else {"compute": times, "with_copies": None, "end_to_end": None})


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulated]:
    def start(**settings: Any) -> Simulated:
        clock = Simulated(settings.pop("ms", {"fp32": 4.0, "int8": 2.0}), **settings)
        monkeypatch.setattr(suite_run, "one_round", clock)
        return clock

    return start


def suite(folder: Path, more: str, run: Path) -> str:
    path = folder / "mine.yaml"
    path.write_text(f"models: [{{path: {run}, name: net}}]\neffort: quick\n{more}\n", encoding="utf-8")
    return str(path)


def test_the_combinations_take_turns(make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]) -> None:
    clock = simulate()
    run_suite(suite(tmp_path, "offline: [4]", make_run()), repeats=3, out=tmp_path / "out")
    forwards = [f"net-{way}" for way in (
        "fp32-onnxruntime-t1-b1-single", "int8-onnxruntime-t1-b1-single",
        "fp32-onnxruntime-t1-b4-offline", "int8-onnxruntime-t1-b4-offline",
    )]  # fmt: skip
    assert clock.calls == forwards + forwards[::-1] + forwards


def test_ratios_by_hand_on_a_machine_that_slows_down(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]
) -> None:
    simulate(slower=0.25)
    found = run_suite(suite(tmp_path, "offline: [4]", make_run()), repeats=2, out=tmp_path / "out")
    base, row, offline_base, offline = found.rows
    # Calls 1 to 4 forwards, 5 to 8 backwards; each takes a quarter of a quiet machine's time longer than the last.
    first, second = 4 * 1.25 / (2 * 1.5), 4 * 3.0 / (2 * 2.75)
    assert row.speed is not None
    assert row.speed.times == pytest.approx(math.sqrt(first * second))
    assert (row.speed.low, row.speed.rounds, row.speed.base) == (None, 2, "FP32"), "two rounds tell no interval"
    assert offline.speed is not None
    assert offline.speed.times == pytest.approx(math.sqrt((4 * 1.75 / (2 * 2.0)) * (4 * 2.5 / (2 * 2.25))))
    assert base.speed is None
    assert offline_base.speed is None
    assert (base.p90_ms, row.p90_ms) == (pytest.approx(4 * 3.0), pytest.approx(2 * 2.75)), "of all times"
    assert offline.throughput_ips == pytest.approx(2 / (2 * 2.0 / 4000 + 2 * 2.25 / 4000))
    assert base.flags == ("unstable",), "the rounds differ by more than a quarter"


def test_an_interval_from_six_rounds(make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]) -> None:
    simulate(slower=0.01)
    found = run_suite(suite(tmp_path, "", make_run()), out=tmp_path / "out")
    speed = found.rows[1].speed
    assert speed is not None
    assert speed.rounds == 6
    assert speed.low is not None
    assert speed.low < 2 < (speed.high or 0)
    assert speed.low == pytest.approx(min(2 * (1 + 0.01 * a) / (1 + 0.01 * (a + 1)) for a in (1, 5, 9)))
    interval = found.rows[0].p90_interval_ms
    assert interval is not None
    assert 4.04 <= interval[0] < interval[1] <= 4 * 1.12


def test_records_of_another_session_have_no_ratio(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]
) -> None:
    simulate()
    text = suite(tmp_path, "", make_run())
    one, two = (run_suite(text, repeats=1, out=tmp_path / name).records for name in ("a", "b"))
    assert ratio(one[0], one[1]) is not None
    assert ratio(one[0], two[1]) is None


def test_what_is_on_disk(make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]) -> None:
    simulate()
    out = tmp_path / "out"
    found = run_suite(suite(tmp_path, "precisions: [fp32, fp16, int8]", make_run()), repeats=2, out=out)
    assert sorted(path.name for path in out.iterdir()) == ["records", "suite.csv", "suite.json", "suite.md"]
    records = {path.name: json.loads(path.read_text()) for path in (out / "records").iterdir()}
    document = json.loads((out / "suite.json").read_text())
    assert document == json.loads(json.dumps(found.document))
    assert {row["record"] for row in document["rows"] if row["why"] is None} == set(records)
    for each in records.values():
        assert each["session"] == document["session"]
        assert each["repeats"] == 2
        assert each["suite"]["combination"]["model"] == "net"
        assert each["artifact"]["name"] in ("fp32", "int8")
        assert each["accuracy"] is None
    plain = list(csv.DictReader(io.StringIO((out / "suite.csv").read_text())))
    assert [line["way"] for line in plain] == ["FP32", "FP16", "INT8"]
    assert float(plain[2]["speed.times"]) == pytest.approx(2.0)
    assert "kdedge export --fp16" in plain[1]["why"]
    text = (out / "suite.md").read_text()
    assert "| net | FP32 |" in text
    assert "| 2.00x |" in text
    assert "net FP16: not measured. The bundle has no file in FP16; it has fp32, int8." in text
    assert str(tmp_path) not in text + json.dumps(document), "a machine's paths stay out"


def test_a_runtime_that_is_not_here_is_a_row(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Any:
        raise RuntimeFailure("TensorRT is not installed.")

    monkeypatch.setattr("kdedge_bench.suite_plan.load_tensorrt", absent)
    simulate()
    text = suite(tmp_path, "runtimes: [onnxruntime, tensorrt]", make_run())
    found = run_suite(text, repeats=1, out=tmp_path / "out")
    assert [row.why for row in found.rows] == [None, None, *["TensorRT is not installed."] * 2]
    assert found.exit_code == 0
    only = suite(tmp_path, "runtimes: [tensorrt]", tmp_path / "tiny-digits-40-s0")
    with pytest.raises(DeviceError, match=r"Nothing of the suite mine could be measured\. TensorRT is not installed"):
        run_suite(only, out=tmp_path / "none")
    assert not (tmp_path / "none" / "records").exists()


def test_what_fails_is_a_row_and_leaves_the_others(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]
) -> None:
    clock = simulate()
    clock.fails = {"net-fp32-onnxruntime-t1-b1-single": 2}
    found = run_suite(suite(tmp_path, "", make_run()), repeats=3, out=tmp_path / "out")
    assert [row.why for row in found.rows] == ["it broke.", None]
    assert found.rows[1].speed is None, "without its base"
    assert (found.exit_code, len(found.records)) == (1, 1)


def test_a_suite_that_was_stopped_goes_on(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]
) -> None:
    clock, run, out = simulate(), make_run(), tmp_path / "out"
    text = suite(tmp_path, "", run)
    clock.stop_at = 3  # in the middle of the second round
    with pytest.raises(Stopped, match=r"1 of 3 rounds are kept in .*the same command goes on"):
        run_suite(text, repeats=3, out=out)
    kept = sorted(path.name for path in out.rglob("*.json"))
    assert kept == ["of.json", "round-001.json"], "no record of a part"
    clock.stop_at = None
    told: list[str] = []
    found = run_suite(text, repeats=3, out=out, say=told.append)
    assert len(clock.calls) == 3 + 4, "the round that was stopped is measured again as a whole"
    assert any("1 of 3 rounds were measured before" in line for line in told)
    assert [each["repeats"] for each in found.records] == [3, 3]
    assert [each["suite"]["sittings"] for each in found.records] == [2, 2]
    assert not (out / "rounds").exists()


def test_rounds_of_another_suite_are_not_gone_on_with(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]
) -> None:
    clock, run, out = simulate(), make_run(), tmp_path / "out"
    clock.stop_at = 2
    with pytest.raises(Stopped):
        run_suite(suite(tmp_path, "", run), repeats=2, out=out)
    clock.stop_at = None
    run_suite(suite(tmp_path, "threads: [2]", run), repeats=2, out=out)
    assert len(clock.calls) == 2 + 4


def test_what_lies_among_the_records(make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]) -> None:
    simulate()
    records = tmp_path / "out" / "records"
    records.mkdir(parents=True)
    for name, text in (("broken", "{bad"), ("number", "5"), ("other", '{"schema": 1}'), ("old", '{"suite": {}}')):
        (records / f"{name}.json").write_text(text)
    run_suite(suite(tmp_path, "", make_run()), repeats=1, out=tmp_path / "out")
    assert (tmp_path / "out" / "suite.md").is_file()
    left = {path.stem for path in records.iterdir()}
    assert {"broken", "number", "other"} < left
    assert "old" not in left, "of another session"


def test_rounds_that_could_not_be_removed_are_not_told_again(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, out = simulate(), tmp_path / "out"
    text = suite(tmp_path, "", make_run())
    with monkeypatch.context() as patched:
        patched.setattr("kdedge_bench.suite_state.Kept.remove", lambda _: None)
        first = run_suite(text, repeats=2, out=out)
    assert (out / "rounds" / "round-002.json").is_file()
    again = run_suite(text, repeats=2, out=out)
    assert len(clock.calls) == 2 * 4
    assert first.document["session"] != again.document["session"]


def test_rounds_before_an_update_are_not_gone_on_with(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, run, out = simulate(), make_run(), tmp_path / "out"
    clock.stop_at = 3
    with pytest.raises(Stopped):
        run_suite(suite(tmp_path, "", run), repeats=2, out=out)
    clock.stop_at = None
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    run_suite(suite(tmp_path, "", run), repeats=2, out=out)
    assert len(clock.calls) == 3 + 4


def test_report_and_compare_read_what_a_suite_measured(make_run: MakeRun, simulate: Callable[..., Simulated]) -> None:
    simulate()
    runs = [make_run("one"), make_run("two")]
    for run in runs:
        for path in (run / "bench").iterdir():
            path.unlink()
        run_suite("quick", [run], repeats=1)
        renamed(run)
    found = summary(runs[0])
    assert [row.p90_ms for row in found.rows if row.key in ("fp32", "int8")] == [4.0, 2.0]
    (field,) = latency_fields([(read_facts(Run(runs[0])), found)])
    assert [point.cost for point in field.points] == [4.0, 2.0], "nothing of what was measured offline"
    assert field.occasions == ""
    assert compare(*runs)["slower_fraction"] == 0
    folders = [run / "bench" / "quick" / "records" for run in runs]
    assert compare(*folders, artifact="int8")["slower_fraction"] == 0


def renamed(run: Path) -> None:
    """The simulated process does not know the bundle's bytes."""
    artifacts = json.loads((run / "bundle" / "manifest.json").read_text())["artifacts"]
    for path in (run / "bench" / "quick" / "records").iterdir():
        record = json.loads(path.read_text())
        record["artifact"]["sha256"] = artifacts[record["artifact"]["name"]]["sha256"]
        path.write_text(json.dumps(record))


def test_models_named_beside_the_suite(make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated]) -> None:
    simulate(ms={"fp32": 4.0, "fp16": 4.0, "int8": 2.0})
    run = make_run()
    found = run_suite("quick", [run], repeats=1, threads=2)
    assert {row.model for row in found.rows} == {"tiny-digits-40-s0"}
    assert {row.threads for row in found.rows} == {2}
    assert (run / "bench" / "quick" / "suite.json").is_file()


def test_models_that_are_not_there(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="absent does not exist"):
        run_suite(suite(tmp_path, "", tmp_path / "absent"))
    run = make_run()
    twice = tmp_path / "twice.yaml"
    twice.write_text(f"models: [{{path: {run}}}, {{path: {run}/bundle}}]", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"two models are called tiny-digits-40-s0\. Give one of them a 'name'"):
        run_suite(str(twice))
    with pytest.raises(RecipeError, match=r"'base\.model' is nets; one of net was expected"):
        run_suite(suite(tmp_path, "base: {model: nets}", run))
    (run / "bundle" / "manifest.json").write_text('{"schema": 1, "artifacts": {}}', encoding="utf-8")
    with pytest.raises(BundleError, match="cannot be used"):
        run_suite(suite(tmp_path, "", run))


def test_a_real_file_in_both_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    weights = numpy_helper.from_array(np.ones((16, 3), np.float32), "weights")
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "weights"], ["y"])]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])], [weights],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx")
    monkeypatch.setattr("kdedge_bench.suite_plan.EFFORTS", {"quick": Effort(0.0, 20, 0.0)})
    found = run_suite(suite(tmp_path, "offline: [4]", Path("net.onnx")), repeats=1, out=tmp_path / "out")
    single, other, offline, _ = found.rows
    assert (single.why, offline.why) == (None, None)
    assert other.why == "net.onnx is in FP32; other files are made of a float one by: kdedge export net.onnx"
    assert (single.mode, single.batch, offline.mode, offline.batch) == ("single stream", 1, "offline", 4)
    assert single.p90_ms is not None
    assert single.throughput_ips is None
    assert offline.throughput_ips is not None
    assert offline.p90_ms is None


def test_openvino_has_files_of_its_own(
    make_run: MakeRun, tmp_path: Path, simulate: Callable[..., Simulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = suite(tmp_path, "runtimes: [onnxruntime, openvino]", make_run())
    simulate()
    monkeypatch.setattr("kdedge_bench.suite_plan.why_not_openvino", lambda: "OpenVINO is not installed.")
    found = run_suite(text, repeats=1, out=tmp_path / "out")
    assert [(row.way, row.why) for row in found.rows] == [
        ("FP32", None),
        ("INT8", None),
        ("FP32, openvino", "OpenVINO is not installed."),
        ("INT8, openvino", "OpenVINO is not installed."),
    ]
    monkeypatch.setattr("kdedge_bench.suite_plan.why_not_openvino", lambda: "")
    asked: list[Job] = []
    clock = simulate()
    monkeypatch.setattr(suite_run, "one_round", lambda job: (asked.append(job), clock(job))[1])
    found = run_suite(text, repeats=1, out=tmp_path / "out")
    assert [row.way for row in found.rows] == [
        f"{kind}, {runtime}" for runtime in ("onnxruntime", "openvino") for kind in ("FP32", "INT8")
    ]
    assert [list(job.arguments)[1:5] for job in asked[2:]] == [
        ["--artifact", kind, "--runtime", "openvino"] for kind in ("fp32", "int8")
    ]


def test_a_network_of_the_zoo_is_a_bundle_without_accuracy(tmp_path: Path, simulate: Callable[..., Simulated]) -> None:
    from kdedge_bench.accuracy import exams_of
    from kdedge_bench.suite import Model, Suite
    from kdedge_bench.suite_zoo import zoo_bundle
    from kdedge_device.manifest import Bundle

    model = Model(zoo="squeezenet", px=32, classes=3)
    made = Bundle(zoo_bundle(model, Suite(models=(model,)), tmp_path / "made"))
    assert "run.pyz" in made.verify(), "it can travel to a board"
    assert sorted(made.artifacts) == ["fp32", "int8"]
    assert (made.preprocess.height, len(made.classes), made.golden()["images"].shape[1:3]) == (32, 3, (32, 32))
    assert exams_of(Path(made.path)) == []
    assert made.document["provenance"]["weights"] == "random"
