"""One child a target: a real one on a small model, and the plan and the failures without waiting."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import BundleError, DeviceError, RunError
from kdedge_bench import bench, summary
from kdedge_bench.latency import BoardsFailed, target_of
from kdedge_bench.measured import Target
from kdedge_bench.records import file_name, flags, machine_name

MakeRun = Callable[..., Path]


def tiny_model(path: Path) -> Path:
    """Logits [N, 3] of [N, 1, 4, 4]: one matrix product."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    weights = numpy_helper.from_array(np.ones((16, 3), np.float32), "weights")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])], [weights],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_real_measurement(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "my.onnx")
    (record,) = bench([model], "quick", tmp_path / "out", threads=1, repeats=1)
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == file_name(record, "my")
    assert json.loads(path.read_text()) == record
    compute = record["latency_ms"]["compute"]
    assert 0 < compute["min"] <= compute["p50"] <= compute["p90"] <= compute["p99"] <= compute["max"]
    assert compute["count"] >= 1000
    assert record["latency_ms"]["end_to_end"] is None  # a bare model does not say how images become its input
    assert (record["conditions"]["threads"], record["conditions"]["effort"]) == (1, "quick")
    assert record["artifact"]["name"] == "my"


class Children:
    """Stands for subprocess.run: keeps the commands, answers with a record of the artifact asked for."""

    def __init__(self, template: Path, returncode: int = 0, stdout: str | None = None, fails: str = "") -> None:
        self.template, self.returncode, self.stdout, self.fails = template, returncode, stdout, fails
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        self.commands.append(command)
        record = json.loads(self.template.read_text())
        artifact = command[command.index("--artifact") + 1] if "--artifact" in command else None
        record["artifact"] |= {"precision": artifact, "name": artifact}
        record["conditions"]["headline"] = "compute"
        stdout = json.dumps(record) if self.stdout is None else self.stdout
        code = 6 if self.fails and artifact == self.fails else self.returncode
        return subprocess.CompletedProcess(command, code, stdout.encode(), b"a reason\non two lines")


@pytest.fixture
def children(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Children]]:
    def start(**answer: Any) -> tuple[Path, Children]:
        run = make_run()
        stand_in = Children(run / "bench" / "example-cpu-int8.json", **answer)
        monkeypatch.setattr("kdedge_device.bench_rounds.subprocess.run", stand_in)
        return run, stand_in

    return start


def test_all_artifacts_of_all_targets_take_turns(
    children: Callable[..., tuple[Path, Children]], tmp_path: Path
) -> None:
    run, seen = children()
    for path in (run / "bench").glob("*fp32*"):
        path.unlink()
    model = tmp_path / "a.onnx"
    model.touch()
    told: list[str] = []
    records = bench([run, model, run], "standard", threads=2, repeats=2, say=told.append)
    assert [record["artifact"]["name"] for record in records] == ["fp32", "int8", "a"]
    bundle = str(run / "bundle")
    measured = [command[4 : 4 + (3 if command[4] == bundle else 1)] for command in seen.commands]
    turns = [[bundle, "--artifact", "fp32"], [bundle, "--artifact", "int8"], [str(model)]]
    assert measured == turns + turns[::-1]
    words = ["--seconds", "30.0", "--runs", "1000", "--warm-up", "5.0", "--threads", "2", "--json"]
    assert all(" ".join(words) in " ".join(command) for command in seen.commands)
    assert len({record["session"] for record in records}) == 1
    assert {record["conditions"]["effort"] for record in records} == {"standard"}
    assert all(record["repeats"] == 2 for record in records)
    assert told[0].startswith("round 1 of 2, tiny-digits-40-s0 fp32: p90 ")
    names = sorted(path.name for path in (run / "bench").iterdir())
    assert names == ["example-2-0-ghz-fp32.json", "example-2-0-ghz-int8.json", "example-cpu-int8.json"]
    with pytest.raises(RunError, match="would have the same names"):
        bench([run, shutil.copytree(run, tmp_path / "copy")], out=tmp_path / "out")


def test_mlperf_is_one_unbroken_run(children: Callable[..., tuple[Path, Children]]) -> None:
    run, seen = children()
    for repeats, seconds, effort, calls in ((None, "600.0", "mlperf", 2), (3, "200.0", "600 s in 3 rounds", 6)):
        records = bench([run], "mlperf", repeats=repeats)
        assert {record["conditions"]["effort"] for record in records} == {effort}
        assert [command[command.index("--seconds") + 1] for command in seen.commands] == [seconds] * calls
        seen.commands.clear()


def test_artifacts_that_fail_leave_the_others(children: Callable[..., tuple[Path, Children]]) -> None:
    run, seen = children(fails="int8")
    with pytest.raises(BoardsFailed, match="local: The measurement of int8 ended with code 6") as caught:
        bench([run], repeats=3)
    assert [record["artifact"]["name"] for record in caught.value.records] == ["fp32"]
    assert len(seen.commands) == 4
    assert caught.value.exit_code == 2
    assert (run / "bench" / "example-2-0-ghz-fp32.json").exists()


def test_a_bundle_in_a_run_is_that_run(make_run: MakeRun) -> None:
    run = make_run()
    assert target_of(run / "bundle") == target_of(run) == Target(run / "bundle", None, run / "bench")
    model = run / "bundle" / "model.onnx"
    assert target_of(model) == Target(model, "model", run / "bench")


def test_a_bundle_elsewhere_keeps_its_records(make_run: MakeRun, tmp_path: Path) -> None:
    moved = (make_run() / "bundle").rename(tmp_path / "copied")
    assert target_of(moved).out == moved / "bench"
    assert target_of(moved, tmp_path / "there").out == tmp_path / "there"


def test_measured_latencies_reach_the_summary(children: Callable[..., tuple[Path, Children]]) -> None:
    run, _ = children()
    for path in (run / "bench").glob("*fp32*"):
        path.unlink()
    assert [row.p90_ms for row in summary(run).rows] == [None, None, None, 0.0712]


@pytest.mark.parametrize(
    ("code", "stdout", "error", "message"),
    [
        (
            6,
            '{"error": "ONNX Runtime cannot be loaded."}',
            DeviceError,
            "of fp32 failed: ONNX Runtime cannot be loaded. The measurement of int8 failed: ONNX",
        ),
        (5, '{"error": "It was altered.", "class": "CorruptFailure"}', BundleError, "failed: It was altered."),
        (-9, "", DeviceError, "The measurement of fp32 ended with code -9: on two lines"),
        (0, "[]", DeviceError, "of fp32 ended with code 0"),
    ],
)
def test_failures_are_told(
    children: Callable[..., tuple[Path, Children]], code: int, stdout: str, error: type[Exception], message: str
) -> None:
    run, _ = children(returncode=code, stdout=stdout)
    before = sorted((run / "bench").iterdir())
    with pytest.raises(error, match=message):
        bench([run])
    assert sorted((run / "bench").iterdir()) == before


def test_what_cannot_be_measured(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    (run / "bundle" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"has no bundle to measure.*kdedge export"):
        bench([run])
    with pytest.raises(RunError, match="does not exist"):
        bench([tmp_path / "absent"])
    with pytest.raises(RunError, match="is no ONNX file"):
        bench([run / "recipe.yaml"])
    with pytest.raises(RunError, match="Nothing to measure"):
        bench([])
    with pytest.raises(RunError, match="is not a run folder"):
        bench([tmp_path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort": "long"}, "'long' is not known. Expected one of: quick, standard, mlperf"),
        ({"threads": 0}, "0 threads"),
        ({"repeats": 0}, "0 repeats"),
        ({"on": ("local", "ssh://-me@board")}, "The user '-me'"),
    ],
)
def test_what_is_not_there_yet(make_run: MakeRun, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        bench([make_run()], **options)


def test_machine_names() -> None:
    pc = {"machine": {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "model": "Cloud VM", "architecture": "x86_64"}}
    board = {"machine": {"cpu": "ARMv8 rev 1", "model": "NVIDIA Jetson Orin Nano", "architecture": "aarch64"}}
    assert machine_name(pc) == "Intel(R) Xeon(R) CPU @ 2.20GHz"
    assert file_name(pc, "int8") == "intel-xeon-2-20ghz-int8.json"
    assert machine_name(board) == "NVIDIA Jetson Orin Nano"
    assert file_name(board, "fp32") == "nvidia-jetson-orin-nano-fp32.json"
    assert file_name({"machine": {}}, "fp32") == "unnamed-machine-fp32.json"
    assert flags({"flags": {"throttled": None, "unstable": True}}) == ["unstable"]
