"""The record of what calibration costs, measured in this process: its form, and that the ways do what they say."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from kdedge_bench import calibration_cost, peak_memory
from kdedge_export import calibration

PX = 16


def small_model(arch: str, px: int, folder: Path) -> None:
    """One convolution and a head: the ways are measured, not the network."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(10, 4)).astype(np.float32),
        "b": rng.normal(size=10).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["conv"], "conv"),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pooled"], "pooled"),
        helper.make_node("Flatten", ["pooled"], ["features"], "features"),
        helper.make_node("Gemm", ["features", "v", "b"], ["logits"], "logits", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", 1, ["n", 3, px, px])],
        [helper.make_tensor_value_info("logits", 1, ["n", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )


def test_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], **_: object) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "kdedge_bench.calibration_cost"]
        calibration_cost.main(command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(peak_memory, "subprocess", SimpleNamespace(run=here))
    monkeypatch.setattr(calibration_cost, "_write_model", small_model)
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)
    out = tmp_path / "record.json"
    flags = ["--px", str(PX), "--images", "8", "--many", "40", "--rounds", "1", "--out", str(out)]
    calibration_cost.main([*flags, "--scratch", str(tmp_path)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert set(record["ways"]) == set(calibration_cost.WAYS)
    for way in record["ways"].values():
        assert len(way["totals"]) == 1
        assert way["seconds"]["total"] > 0
        assert way["peak_mib"] > 0
    assert record["ways"]["ours, whole choice"]["seconds"]["choice"] > 0
    assert record["times_as_fast_as_entropy"]["onnxruntime entropy"] == 1.0
    assert record["many"]["images"] == 40


def test_generated_images_differ_and_stay_the_same() -> None:
    pool = np.random.default_rng(0).integers(0, 256, (4, PX, PX, 3), dtype=np.uint8)
    made = calibration_cost.Generated(pool, 11)
    preprocess = calibration_cost._preprocess(PX)
    whole = np.concatenate(list(made.chunks(preprocess, 3)))
    assert whole.shape == (11, PX, PX, 3)
    assert len({image.tobytes() for image in whole}) == 11
    np.testing.assert_array_equal(np.concatenate(list(made.chunks(preprocess, 4, 5))), whole[5:])


def test_ours_is_what_an_export_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that any INT8 file needs, in the CPU's form (a HardSwish is two kernels there), and both choices."""
    network = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w"], ["conv"], "conv"),
            helper.make_node("HardSwish", ["conv"], ["swish"], "swish"),
            helper.make_node("Conv", ["swish", "v"], ["logits"], "logits"),
        ],
        "small",
        [helper.make_tensor_value_info("input", 1, ["n", 3, PX, PX])],
        [helper.make_tensor_value_info("logits", 1, ["n", 16, PX - 4, PX - 4])],
        [
            numpy_helper.from_array(np.ones((16, 3, 3, 3), np.float32), "w"),
            numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "v"),
        ],
    )
    onnx.save(
        helper.make_model(network, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx"
    )
    counted: list[list[str]] = []
    chosen: list[tuple[str, ...]] = []
    calibrate = calibration.calibrate.calibrate

    def counts(model: onnx.ModelProto, names: list[str], *rest: object, **named: object) -> object:
        counted.append(names)
        return calibrate(model, names, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration.calibrate, "calibrate", counts)
    monkeypatch.setattr(calibration.choose, "choose_spans_per_tensor", lambda *given: chosen.append(("u8",)))
    monkeypatch.setattr(calibration.choose, "choose_s8_spans", lambda model, names, *given: chosen.append(names))
    generated = calibration_cost.Generated(
        np.random.default_rng(0).integers(0, 256, (4, PX, PX, 3), dtype=np.uint8), 16
    )
    calibration_cost.WAYS["ours, whole choice"](tmp_path / "model.onnx", generated, PX)
    assert counted == [["conv", "input", "swish"]]
    assert chosen == [("u8",), ("input", "swish")]
