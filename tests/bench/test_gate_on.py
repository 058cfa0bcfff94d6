"""gate.json decided by what another machine measured: speeds by value, the bundle whole, hashes right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge.errors import DeviceError
from kdedge.runs import read_json, sha256_file, write_json
from kdedge_bench.gate_on import ROUNDS, decide_there
from kdedge_export.judging.agreement import agreement
from kdedge_export.judging.gate import Candidate, gate_document, judge
from kdedge_export.judging.latency import Speedup
from kdedge_export.targets import load

MACHINE = {"name": "raspberry-pi-5-4-cores", "cpu": "Cortex-A76"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose INT8 file was twice as fast here; TensorRT is not measured."""
    logits = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    same = agreement(logits, logits, np.full(400, -1))
    here = judge("onnxruntime-cpu", [Candidate("int8", "int8", same, Speedup(2.0, 1.9, 2.1, 6))], 1.0)
    files = [("trt", "int8"), ("trt-fp16", "int8"), ("fp16", "fp16")]
    there = judge("tensorrt", [Candidate(name, precision, same) for name, precision in files], 1.0)
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_json(folder / "gate.json", gate_document([here, there], "onnxruntime-cpu"))
    (folder / "model.onnx").write_bytes(b"a model")
    files = {"gate.json": {"sha256": sha256_file(folder / "gate.json"), "bytes": 1}}
    write_json(folder / "manifest.json", {"schema": 1, "shipped": "int8", "artifacts": {}, "files": files})
    return folder


class Machine:
    """Answers the commands of run.pyz as a machine of these speeds would."""

    def __init__(self, runtimes: dict[str, str | None], ms: dict[str, tuple[str, float]], fails: Sequence[str] = ()):
        self.runtimes, self.ms, self.fails = runtimes, ms, fails
        self.by = "tensorrt" if runtimes.get("tensorrt") else "onnxruntime"
        self.asked: list[list[str]] = []
        self.board: dict[str, str] | None = None

    def __call__(self, arguments: Sequence[str]) -> dict[str, Any]:
        self.asked.append(list(arguments))
        if arguments[0] == "info":
            return {"runtimes": self.runtimes, "board": self.board}
        there = {name: each for name, each in self.ms.items() if each[0] not in self.fails}
        failed = {name: f"no kernel for {name}" for name in self.fails}
        return {"schema": 1, "records": [self._record(name, *each) for name, each in there.items()], "failed": failed}

    def _record(self, name: str, precision: str, ms: float) -> dict[str, Any]:
        rounds = [ms * (1 + 0.01 * place) for place in range(ROUNDS)]
        return {
            "machine": MACHINE,
            "artifact": {"name": name, "precision": precision, "runtime": self.by},
            "latency_ms": {"compute": {"p50": ms, "p90": ms}},
            "rounds_ms": {"p50": rounds, "p90": rounds},
        }


def test_another_cpu_is_a_target_of_its_own(bundle: Path) -> None:
    machine = Machine({"onnxruntime": "1.23.2"}, {"fp32": ("fp32", 9.0), "int8": ("int8", 10.0)})
    name, entry = decide_there(bundle, machine)
    assert name == "raspberry-pi-5-4-cores"
    assert entry["shipped"] == "fp32"
    assert entry["verdict"] == "fail"
    assert entry["speedup"] == pytest.approx(0.9)
    assert "0.90 times the speed of FP32" in entry["why"]
    assert "raspberry-pi-5-4-cores" in entry["why"]
    gate, manifest = read_json(bundle / "gate.json"), read_json(bundle / "manifest.json")
    assert gate["targets"][name] == entry
    assert gate["targets"]["onnxruntime-cpu"]["speedup"] == 2.0
    assert gate["targets"]["tensorrt"]["verdict"] == "undecided"
    assert (gate["shipped"], manifest["shipped"]) == ("fp32", "fp32")  # what the bundle runs by itself is for there
    path = bundle / "gate.json"
    assert manifest["files"]["gate.json"] == {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    assert (bundle / "model.onnx").read_bytes() == b"a model"
    assert sorted(each.name for each in bundle.parent.iterdir()) == ["bundle"]


def test_a_board_with_tensorrt_builds_and_decides_that_target(bundle: Path) -> None:
    ms = {"fp32": ("fp32", 2.0), "trt-fp16": ("int8", 0.8), "fp16": ("fp16", 1.0)}
    machine = Machine({"onnxruntime": None, "tensorrt": "11.4.1"}, ms)
    said: list[str] = []
    name, entry = decide_there(bundle, machine, say=said.append)
    assert (name, entry["shipped"], entry["verdict"]) == ("tensorrt", "int8", "pass")
    assert entry["speedup"] == pytest.approx(2.5)
    assert entry["candidates"]["fp16"]["speedup"] == pytest.approx(2.0)
    assert [each[0] for each in machine.asked] == ["info", "bench"], "one call builds and measures"
    assert "--build" in machine.asked[1]
    assert entry["machine"] == MACHINE
    assert any("Building engines" in each for each in said)


def test_an_engine_that_cannot_be_built(bundle: Path) -> None:
    ms, said = {"fp32": ("fp32", 2.0), "trt": ("int8", 0.8), "fp16": ("fp16", 0.9)}, list[str]()
    _, entry = decide_there(bundle, Machine({"tensorrt": "10.3"}, ms, fails=["fp16"]), say=said.append)
    assert "fp16 was not measured: no kernel for fp16" in said
    assert entry["candidates"]["fp16"]["speedup"] is None
    assert entry["shipped"] == "int8"
    before = (bundle / "gate.json").read_bytes()
    with pytest.raises(DeviceError, match="no kernel for int8"):
        decide_there(bundle, Machine({"tensorrt": "10.3"}, ms, fails=["int8"]))
    assert (bundle / "gate.json").read_bytes() == before


@pytest.mark.parametrize(("bad", "shipped"), [("trt", "int8"), ("trt-fp16", "fp16")])
def test_the_int8_file_that_ran_there_is_judged_and_no_other(bundle: Path, bad: str, shipped: str) -> None:
    """TensorRT 11 runs trt-fp16: what trt loses is of no account, and what it does not lose helps nobody."""
    logits = np.eye(10, dtype=np.float32)[np.arange(400) % 10] * 20
    wrong = logits.copy()
    wrong[:40] = np.roll(wrong[:40], 1, 1)  # 10 of 100 images get another class
    losses = {
        name: agreement(logits, wrong if name == bad else logits, np.full(400, -1)) for name in ("trt", "trt-fp16")
    }
    candidates = [Candidate(name, "int8", each) for name, each in losses.items()]
    candidates.append(Candidate("fp16", "fp16", agreement(logits, logits, np.full(400, -1))))
    gate = read_json(bundle / "gate.json")
    gate["targets"]["tensorrt"] = judge("tensorrt", candidates, 1.0).to_json()
    write_json(bundle / "gate.json", gate)
    ms = {"fp32": ("fp32", 2.0), "trt-fp16": ("int8", 0.8), "fp16": ("fp16", 1.0)}
    _, entry = decide_there(bundle, Machine({"tensorrt": "11.4.1"}, ms))
    assert (entry["shipped"], entry["candidates"]["trt"]["speedup"]) == (shipped, None)
    assert entry["candidates"]["trt-fp16"]["speedup"] == pytest.approx(2.5)


def test_times_of_a_cpu_decide_nothing_for_tensorrt(bundle: Path) -> None:
    """As where a board has TensorRT, but its driver finds no GPU: run.pyz then measures what ONNX Runtime can run."""
    machine = Machine({"tensorrt": "10.3", "onnxruntime": "1.23.2"}, {"fp32": ("fp32", 20.0), "int8": ("int8", 8.0)})
    machine.by = "onnxruntime"
    before = (bundle / "gate.json").read_bytes()
    with pytest.raises(DeviceError, match=r"was to measure tensorrt, and its times of fp32, int8 are not of that"):
        decide_there(bundle, machine)
    assert (bundle / "gate.json").read_bytes() == before


def test_a_target_says_how_its_engines_are_built(bundle: Path) -> None:
    machine = Machine({"tensorrt": "10.3"}, {"fp32": ("fp32", 2.0), "trt": ("int8", 0.8)})
    machine.board = {"model": "NVIDIA Jetson Orin Nano Developer Kit", "architecture": "aarch64"}
    target = load("jetson-orin-nano").model_copy(update={"batch": 4, "workspace_mib": 256})
    assert decide_there(bundle, machine, [target])[0] == "jetson-orin-nano"
    assert machine.asked[1][-5:] == ["--build", "--batch", "4", "--workspace-mib", "256"]


def test_a_named_target_and_what_cannot_be(bundle: Path) -> None:
    machine = Machine({"onnxruntime": "1.23.2"}, {"fp32": ("fp32", 9.0), "int8": ("int8", 3.0)})
    targets = [load(name) for name in ("jetson-orin-nano", "raspberry-pi")]
    machine.board = {"model": "Raspberry Pi 5 Model B Rev 1.0", "architecture": "aarch64"}
    name, entry = decide_there(bundle, machine, targets)
    assert (name, entry["shipped"]) == ("raspberry-pi", "int8")
    assert machine.asked[-1][-2:] == ["--threads", "4"], "as the target says"
    machine.board = {"model": "NVIDIA Jetson Orin Nano Developer Kit", "architecture": "aarch64"}
    assert decide_there(bundle, machine, targets[:1])[0] == MACHINE["name"], "without TensorRT it is not that target"
    with pytest.raises(DeviceError, match="neither TensorRT nor ONNX Runtime"):
        decide_there(bundle, Machine({"onnxruntime": None, "tensorrt": None}, {}))
    with pytest.raises(DeviceError, match="measured no FP32 file"):
        decide_there(bundle, Machine({"onnxruntime": "1.23.2"}, {"int8": ("int8", 3.0)}))
    gate = read_json(bundle / "gate.json")
    del gate["targets"]["tensorrt"]
    write_json(bundle / "gate.json", gate)
    with pytest.raises(DeviceError, match=r"has no INT8 file for tensorrt. Export it with --int8"):
        decide_there(bundle, Machine({"tensorrt": "10.3"}, {"fp32": ("fp32", 2.0)}))


def test_an_engine_that_loses_says_that_no_layer_was_given_back_for_it(bundle: Path) -> None:
    ms = {"fp32": ("fp32", 2.0), "trt": ("int8", 2.5), "fp16": ("fp16", 1.0)}
    _, entry = decide_there(bundle, Machine({"tensorrt": "10.3"}, ms))
    assert entry["shipped"] == "fp16"
    assert entry["why"].endswith(
        ". No layer goes back to float for speed there, since every try would be an engine to build."
    )
    gate, manifest = read_json(bundle / "gate.json"), read_json(bundle / "manifest.json")
    assert gate["targets"]["tensorrt"]["why"] == entry["why"]
    assert (gate["shipped"], manifest["shipped"]) == ("int8", "int8"), "what ONNX Runtime runs is this machine's"


def test_fp16_alone_is_decided_without_int8(bundle: Path) -> None:
    gate = read_json(bundle / "gate.json")
    fp16 = gate["targets"]["tensorrt"]["candidates"]["fp16"]
    gate["targets"] = {"onnxruntime-cpu": gate["targets"]["onnxruntime-cpu"] | {"candidates": {"fp16": fp16}}}
    write_json(bundle / "gate.json", gate)
    machine = Machine({"onnxruntime": "1.23.2"}, {"fp32": ("fp32", 9.0), "fp16": ("fp16", 3.0)})
    _, entry = decide_there(bundle, machine, threads=3)
    assert (entry["shipped"], read_json(bundle / "manifest.json")["shipped"]) == ("fp16", "fp16")
    assert machine.asked[-1][-2:] == ["--threads", "3"]
    with pytest.raises(DeviceError, match="measured no FP16 file"):
        decide_there(bundle, Machine({"onnxruntime": "1.23.2"}, {"fp32": ("fp32", 9.0)}))
