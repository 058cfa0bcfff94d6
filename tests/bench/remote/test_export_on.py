"""`kdedge export --on` over a real ssh: the board's times choose the layers that stay in float, and what ships.

The board's program is one whose times are planted: a convolution in 8 bits is slow there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kdedge.cli import run as kdedge
from kdedge.runs import read_json
from kdedge_bench import remote
from kdedge_bench.gate_on import elsewhere
from kdedge_bench.remote import run_remote
from kdedge_device.manifest import Bundle
from kdedge_export import elsewhere as tries
from kdedge_export import export as steps

from ...export.test_elsewhere import write_toy
from .conftest import Board, able
from .test_one_board import nothing_is_left

pytestmark = pytest.mark.sshd

PROGRAM = """
import json, os, sys
with open(os.environ["BOARD"] + "/calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
with open(os.environ["BOARD"] + "/behaviour.json") as file:
    does = json.load(file)
if sys.argv[1] == "info":
    print(json.dumps(does["info"]))
    sys.exit()
if does.get("error"):
    print(json.dumps({"error": does["error"], "exit_code": does["exit_code"]}))
    sys.exit(does["exit_code"])
def timed(name, ms):
    latency = {"compute": {"p50": ms, "p90": ms}}
    artifact = {"name": name, "precision": name, "runtime": does["runtime"]}
    return {"artifact": artifact, "latency_ms": latency, "rounds_ms": {"p50": [ms] * 6, "p90": [ms] * 6},
            "machine": {"name": "a-pi"}}
with open("manifest.json") as file:
    artifacts = json.load(file)["artifacts"]
records = [timed("fp32", 4.0)]
if "int8" in artifacts:
    with open("model.int8.onnx", "rb") as file:
        slow = does["slow"].encode() in file.read()
    records.append(timed("int8", 5.0 if slow else 2.0))
print(json.dumps({"schema": 1, "records": records, "failed": {}, "not_run": {}}))
"""
PI = {"model": "Raspberry Pi 5 Model B Rev 1.0", "architecture": "aarch64"}
CPU_ONLY = {"numpy": "1.26.4", "onnxruntime": "1.23.2", "tensorrt": None}


@pytest.fixture
def pi(board: Board, monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board with ONNX Runtime whose program is PROGRAM."""
    for module in (tries, steps):
        monkeypatch.setattr(module, "build_pyz", lambda path: path.write_text(PROGRAM))
    plant(board, "fourth.weight_q")
    return board


def plant(board: Board, slow: str, runtime: str = "onnxruntime", **runtimes: Any) -> None:
    """`slow`: INT8 files with these bytes in them are slower than FP32."""
    info = able(runtimes=CPU_ONLY | runtimes, board=PI, machine={"name": "a-pi"})
    (board.home / "behaviour.json").write_text(json.dumps({"info": info, "slow": slow, "runtime": runtime}))


def export(model: Path, board: Board, *more: str) -> int:
    spec = ["--calibrate", "digits", "--mean", "0.5", "--std", "0.5", "--resize", "squash", "--max-drop", "100"]
    return kdedge(["export", str(model), "--int8", *spec, "--on", board.address, "--json", *more])


def test_the_layer_that_is_slow_on_the_board_is_float_in_what_ships_there(
    pi: Board, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_toy(tmp_path / "toy.onnx")
    assert export(model, pi, "--target", "raspberry-pi", "--strict") == 0
    told = capfd.readouterr()
    document, bundle = json.loads(told.out), tmp_path / "toy.bundle"
    gate, found = read_json(bundle / "gate.json"), read_json(bundle / "quantization.json")
    assert found["fallback"]["left_float"] == ["fourth"]
    assert found["kept_float"]["fourth"].endswith("no faster than FP32 on raspberry-pi")
    entry = gate["targets"]["raspberry-pi"]
    assert (entry["shipped"], entry["verdict"], entry["speedup"]) == ("int8", "pass", 2.0)
    assert gate["targets"]["onnxruntime-cpu"]["verdict"] == "undecided", "nothing was timed here"
    assert (gate["shipped"], Bundle(bundle).shipped, document["shipped"]) == ("int8", "int8", "int8")
    assert Bundle(bundle).verify()
    assert (document["artifacts"]["int8"]["latency_ms_p50"], document["artifacts"]["fp32"]["latency_ms_p50"]) == (2, 4)
    race = "bench --artifact all --rounds 6 --seconds 0.25 --runs 30 --batch 1 --threads 4 --json"
    assert [call.partition(" ")[0] for call in pi.calls()[:2]] == ["info", "bench"], "it is asked before all else"
    assert pi.calls()[2:] == [race, race, "info --json", race], "two tries, and what ships"
    assert "sending 4 of 4 files" in told.err
    assert "sending 2 of 4 files" in told.err, "of the second try INT8 and the manifest alone"
    assert nothing_is_left(pi)
    assert len(list((pi.cache / "bundles").iterdir())) == 1, "tries lie where the bundle will"


def test_a_board_on_which_nothing_helps_ships_float(
    pi: Board, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plant(pi, "first.weight")  # whatever is in float
    assert export(write_toy(tmp_path / "toy.onnx"), pi, "--threads", "2") == 0
    document = json.loads(capfd.readouterr().out)
    entry = document["targets"]["a-pi"]
    assert (document["shipped"], entry["verdict"], entry["speedup"]) == ("fp32", "fail", 0.8)
    assert Bundle(tmp_path / "toy.bundle").shipped == "fp32"
    assert sum("--threads 2" in call for call in pi.calls()) == 3


def test_a_board_that_is_gone_in_the_middle(
    pi: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def until_the_second_race(place: remote.Place, *arguments: Any, **more: Any) -> Mapping[str, Any]:
        if len(pi.calls()) == 3:
            pi.stop()
        return run_remote(place, *arguments, **more)

    monkeypatch.setattr(remote, "run_remote", until_the_second_race)
    assert export(write_toy(tmp_path / "toy.onnx"), pi) == 2
    told = capfd.readouterr()
    assert "cannot be reached" in json.loads(told.out)["error"]
    assert "goes on by accuracy alone; what ships on a-pi is asked once more at the end." in told.err
    bundle = tmp_path / "toy.bundle"
    assert f"The bundle is written: {bundle}. Only what ships on" in told.err
    assert Bundle(bundle).verify()
    gate = read_json(bundle / "gate.json")
    assert {each["verdict"] for each in gate["targets"].values()} == {"undecided"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_board_with_tensorrt_says_that_it_is_not_searched_there(
    pi: Board, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(pi, "model", runtime="tensorrt", tensorrt="10.3")
    model = write_toy(tmp_path / "toy.onnx")
    assert kdedge(["export", str(model), "--fp16", "--calibrate", "digits", "--on", pi.address]) == 2
    assert "has TensorRT, for which files are compared with --int8 only" in capfd.readouterr().err
    assert not (tmp_path / "toy.bundle").exists()
    said: list[str] = []
    assert elsewhere(lambda folder, arguments, keep: run_remote(pi.place, folder, arguments), say=said.append) is None
    (sentence,) = said
    assert "no layer goes back to float for speed there, since every try would be an engine to build" in sentence


def test_the_board_is_asked_by_the_real_program(board: Board) -> None:
    def run(folder: Path, arguments: Sequence[str], keep: bool) -> dict[str, Any]:
        return run_remote(board.place, folder, arguments, clean=not keep)

    there = elsewhere(run)
    assert there is not None
    assert there.target is None
    assert there.name
    assert not board.cache.exists(), "what was asked leaves nothing"


def test_a_board_without_any_runtime_is_told_before_anything_is_exported(
    pi: Board, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    info = able(can={"bench": "It needs numpy: ..."}, runtimes=dict.fromkeys(CPU_ONLY), board={"l4t": None})
    (pi.home / "behaviour.json").write_text(json.dumps({"info": info, "error": "No ONNX Runtime.", "exit_code": 6}))
    assert export(write_toy(tmp_path / "toy.onnx"), pi) == 2
    told = capfd.readouterr()
    assert "has Python" in json.loads(told.out)["error"]
    assert "but no numpy and ONNX Runtime or TensorRT, so it cannot bench. Install there: " in told.err
    assert "Calibrating" not in told.err
    assert not (tmp_path / "toy.bundle").exists()
    assert not pi.cache.exists()
