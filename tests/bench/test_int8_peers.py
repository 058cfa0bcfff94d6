"""The table beside other quantizers: its arithmetic, its adapters, and that the README says what the records say."""

import argparse
import contextlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdedge import recipe_io
from kdedge_bench import int8_peers, int8_students
from kdedge_bench.int8_peers import without_folders
from kdedge_bench.int8_students import PHOTOS, RECIPE, STEPS
from kdedge_bench.peers_make import BUILT_IN, HERE, Peer, Way, parse_peer
from kdedge_bench.peers_table import MARKS, draw_into, rows, table
from kdedge_device.preprocess import Preprocess
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.sessions import run_onnx

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "intel-xeon-processor-2-cores"


def test_a_peer_is_a_name_a_python_and_a_file(tmp_path: Path) -> None:
    assert parse_peer("x=/a/python:nncf_ptq.py:mixed") == ("x", Peer("/a/python", str(HERE / "nncf_ptq.py"), "mixed"))
    (tmp_path / "y.py").touch()
    assert parse_peer(f"x=python:{tmp_path}/y.py") == ("x", Peer("python", f"{tmp_path}/y.py"))
    with pytest.raises(argparse.ArgumentTypeError, match="was expected"):
        parse_peer("x=python")
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"there is no file .*Known: lightly_train.py, litert.py, modelopt_onnx.py"
    ):
        parse_peer("x=python:nothing.py")
    assert all(Path(peer.adapter).is_file() for peer in BUILT_IN.values())


def test_every_adapter_has_its_requirements() -> None:
    others = {"lightly_train.py", "litert.py", "modelopt_onnx.py", "nncf_openvino.py", "nncf_ptq.py", "olive_static.py"}
    assert {each.name for each in HERE.glob("*.py")} == others | {
        "__init__.py",
        "onnxruntime_static.py",
        "peer.py",
        "watch.py",
    }
    for name in ("litert", "lightly_train", "modelopt", "nncf", "olive"):
        pins = (RECIPE.parent / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        lines = [line for line in pins if line and not line.startswith("#")]
        assert lines
        assert all("==" in line and "/" not in line for line in lines), "versions, and no hosts"


def test_a_row_counts_what_is_lost_and_won() -> None:
    def answers(classes: list[int]) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[classes]

    truth = np.array([0, 1, 2, 0])
    row = int8_peers._row([Way(bytes=1)], [answers([0, 1, 2, 1])], [answers([0, 1, 1, 0])], [truth], None)
    assert (row["accuracy"], row["agreement"], row["drop_points"]) == (0.75, 0.5, 0.0), "one lost, one won"
    row = int8_peers._row([Way(bytes=1)], [answers([0, 1, 2, 1])], [answers([1, 1, 2, 1])], [truth], None)
    low, high = row["drop_points_interval"]
    assert low < row["drop_points"] == 25.0 < high
    row = int8_peers._row([Way(failure="no")], [answers([0, 1, 2, 1])], [None], [truth], None)
    assert "accuracy" not in row


def test_the_adapter_of_onnxruntime_quantizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    model = export_float(net, Preprocess(12, 12, 3, "squash", (0.5,) * 3, (0.25,) * 3), list("abcd"))
    onnx.save(model, str(tmp_path / "m.onnx"))
    batch = np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(np.float32)
    np.save(tmp_path / "c.npy", batch)
    python, file, _ = BUILT_IN["onnxruntime minmax"]
    command = [python, file, str(tmp_path / "m.onnx"), str(tmp_path / "c.npy"), str(tmp_path / "q.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["seconds"] > 0
    assert told["version"].startswith("onnxruntime ")
    quantized = onnx.load(str(tmp_path / "q.onnx"))
    assert any(node.op_type == "QuantizeLinear" for node in quantized.graph.node)
    assert (
        np.abs(run_onnx(quantized.SerializeToString(), batch) - run_onnx(model.SerializeToString(), batch)).max() < 0.1
    )


def _record(ways: dict[str, Any], model: str = "net") -> dict[str, Any]:
    return {"schema": 2, "models": {model: {"runs": ["a"], "images": 1000, "ways": ways}}}


def _measured(**more: Any) -> dict[str, Any]:
    made = {"seconds": 12.0, "peak_mib": 900.0, "version": "x", "bytes": 2**20, "failure": None, "note": None}
    found = {"accuracy": 0.5, "agreement": 0.975, "drop_points": 1.0, "drop_points_interval": [0.2, 1.8]}
    ratio = {"median": 2.0, "min": 1.9, "max": 2.1, "interval": [1.95, 2.05]}
    return found | {"made": [made], "speed": {"latency_ms": 4.0, "speedup": ratio}} | more


def test_the_table_says_what_was_lost_how_fast_it_is_and_what_failed() -> None:
    fp32 = _measured(
        accuracy=0.51,
        speed={"latency_ms": 8.0},
        made=[{"seconds": None, "peak_mib": None, "bytes": 2**22, "failure": None}],
    )
    own = {
        "latency_ms": 3.0,
        "speedup": {"median": 2.7, "interval": None},
        "own_speedup": {"median": 1.5, "min": 1.4, "max": 1.6, "interval": [1.4, 1.6]},
    }
    failed = {"made": [{"failure": "exit code 1: no such | runtime"}], "speed": None}
    record = _record({"fp32": fp32, "kdedge": _measured(), "theirs": _measured(speed=own), "z": failed})
    lines = table(record).replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert "speed beside FP32 in ONNX Runtime" in lines[0]
    assert "speed beside FP32 in its own runtime" in lines[0]
    assert lines[2].startswith("| net | FP32 | 51.00 % (47.9–54.1) |  |")
    assert "| +1.00 (+0.20 to +1.80) |" in lines[3]
    assert "| 2.00x (1.95–2.05) |" in lines[3]
    assert "| 2.70x | 1.50x (1.40–1.60) |" in lines[4]
    assert lines[-1] == "- net z: not measured. exit code 1: no such \\| runtime"
    untimed = table(_record({"theirs": _measured(speed={"failure": "exit code 139"})}))
    assert untimed.splitlines()[-1] == "- net: theirs was not timed: exit code 139"


def test_records_of_one_model_are_one_part_of_the_table() -> None:
    first, later = _record({"kdedge": _measured()}), _record({"kdedge --qat": _measured(accuracy=0.7)})
    other = _record({"kdedge": _measured()}, "other")
    assert [(row.model, row.way) for row in rows(first, other, later)] == [
        ("net", "kdedge"),
        ("net", "kdedge --qat"),
        ("other", "kdedge"),
    ]
    (row,) = rows(first, _record({"kdedge": _measured(accuracy=0.9)}))
    assert row.accuracy is not None
    assert row.accuracy.value == 0.9


def test_a_way_that_failed_for_some_seeds_is_not_told_from_the_others() -> None:
    made = [{"failure": None, "bytes": 1}, {"failure": "it broke"}]
    (row,) = rows(_record({"theirs": {"made": made, "speed": None}}))
    assert row.why == "it broke (1 of 2 runs)"


def test_a_model_whose_export_failed_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int8_peers, "make_all", lambda *_, **__: {"kdedge": Way(failure="no")})
    monkeypatch.setattr(int8_peers, "_logits", lambda made, *_: ({}, made))
    monkeypatch.setattr(int8_peers, "open_run_images", lambda run: SimpleNamespace(test=None))
    monkeypatch.setattr(int8_peers, "load_model", lambda path: SimpleNamespace(preprocess=None))
    monkeypatch.setattr(int8_peers, "_folder", lambda *_: contextlib.nullcontext(tmp_path))
    options = int8_peers.parser().parse_args(["m=run", "--out", str(tmp_path / "r.json")])
    found = int8_peers.compare([tmp_path / "run"], {}, options)
    assert found["ways"]["kdedge"]["made"][0]["failure"] == "no"


def test_the_table_is_drawn_between_its_marks_alone() -> None:
    text = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    drawn = draw_into(text, "new\n")
    assert drawn == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter\n"
    assert draw_into(drawn, "new\n") == drawn
    with pytest.raises(SystemExit, match="once each"):
        draw_into("no marks", "new\n")


def test_a_recorded_command_names_no_folders_of_this_machine() -> None:
    said = [without_folders(each) for each in ("a=/x/runs/b", "--peer", "n=/v/bin/python:litert.py:float", "--qat")]
    assert said == ["a=b", "--peer", "n=python:litert.py:float", "--qat"]


def test_the_readme_says_what_the_records_say() -> None:
    records = sorted(RECORDS.glob("int8-peers*.json"))
    assert records
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    drawn = table(*(json.loads(each.read_text(encoding="utf-8")) for each in records))
    assert draw_into(text, drawn) == text, "draw it again: the command is in the README"


def test_the_students_of_the_table_have_recipes(tmp_path: Path) -> None:
    assert len(STEPS) == 6
    first = int8_students.parser().parse_args(["--data", "d", "--out", "o"])
    photos = int8_students.parser().parse_args(["--data", "d", "--out", "o", "--px", "96", "--init", "s"])
    last = int8_students.parser().parse_args(["--data", "d", "--out", "o", "--px", "224", "--init", "s", "--probe"])
    for file, options in ((RECIPE, first), (PHOTOS, photos), (PHOTOS, last)):
        recipe_io.load(str(file), int8_students.settings("resnet18", options), data="digits")
    assert int8_students.settings("resnet18", last)[2:] == [
        "student.init=s/resnet18/student.safetensors",
        "student.head=probe",
        "baseline.enabled=false",
    ]
    weights = tmp_path / "w.npz"
    weights.touch()
    last.init = weights
    assert f"student.init={weights}" in int8_students.settings("mobilenet-v2", last)
    with pytest.raises(SystemExit, match="give --px too"):
        int8_students.main(["--data", "d", "--out", "o", "--init", "s"])
    with pytest.raises(SystemExit, match="name it with --init"):
        int8_students.main(["--data", "d", "--out", "o", "--px", "96", "--probe"])


def test_our_side_of_label_free_distillation_reads_no_label() -> None:
    recipe = recipe_io.load(str(RECIPE.with_name("distill.yaml")), ["teacher.ready=t.safetensors"], data="digits")
    assert (recipe.student.method.labeled_weight, recipe.student.method.unlabeled_weight) == (0.0, 0.0)
