"""The table beside other quantizers: its arithmetic, its adapters, and that the README says what the records say."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdedge_bench import int8_peers
from kdedge_bench.int8_peers import BUILT_IN, HERE, Way, parse_peer, table
from kdedge_bench.int8_students import RECIPE, STEPS
from kdedge_device.preprocess import Preprocess
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.sessions import run_onnx

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "intel-xeon-processor-2-cores"


def test_a_peer_is_a_name_a_python_and_a_file() -> None:
    assert parse_peer("x=/a/python:nncf_ptq.py:mixed") == ("x", ("/a/python", str(HERE / "nncf_ptq.py"), "mixed"))
    assert parse_peer("x=python:/there/y.py") == ("x", ("python", "/there/y.py", ""))
    with pytest.raises(argparse.ArgumentTypeError, match="was expected"):
        parse_peer("x=python")
    assert all((HERE / Path(file).name).is_file() for _, file, _ in BUILT_IN.values())


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
    assert told["seconds"] > 0 < told["peak_mib"]
    quantized = onnx.load(str(tmp_path / "q.onnx"))
    assert any(node.op_type == "QuantizeLinear" for node in quantized.graph.node)
    assert (
        np.abs(run_onnx(quantized.SerializeToString(), batch) - run_onnx(model.SerializeToString(), batch)).max() < 0.1
    )


def test_a_peer_that_fails_is_a_row_that_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such runtime')")

    class Images:
        calibration = type("Part", (), {"load": lambda self, preprocess: np.zeros((2, 4, 4, 3), np.uint8)})()

    preprocess = Preprocess(4, 4, 3, "squash", (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(int8_peers, "open_run_images", lambda run: Images())
    monkeypatch.setattr(int8_peers, "load_model", lambda path: type("Model", (), {"preprocess": preprocess})())
    made = int8_peers._theirs(tmp_path, tmp_path, {"x": (sys.executable, str(broken), "")})
    assert made["x"].failure == "exit code 1: no such runtime"


def test_the_readme_says_what_the_records_say() -> None:
    records = sorted(RECORDS.glob("int8-peers*.json"))
    assert records
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert table(*(json.loads(each.read_text(encoding="utf-8")) for each in records)) in text


def test_the_students_of_the_table_have_a_recipe() -> None:
    assert RECIPE.is_file()
    assert len(STEPS) == 6
