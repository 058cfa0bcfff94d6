"""Another machine says by its times which layers go back to float; here every INT8 file is twice as fast."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from kdedge.errors import DataError, DeviceError
from kdedge_device.manifest import Bundle
from kdedge_device.preprocess import Preprocess
from kdedge_export import export as steps
from kdedge_export.elsewhere import Elsewhere, Trials
from kdedge_export.export import Options, export_file
from kdedge_export.float_form.foreign import Reading
from kdedge_export.judging.gate import fill_in
from kdedge_export.judging.latency import Speedup
from kdedge_export.targets import load

from .test_export_run import BUNDLE
from .test_latency import record

LAYERS = ("first", "second", "third", "fourth", "head")
PI = load("raspberry-pi")
Speed = Callable[[set[str]], float]
"""Of the INT8 file, from the names of its layers that are in 8 bits."""


def write_toy(path: Path) -> Path:
    """Four convolutions of digits, and a linear layer; nothing that was learned."""
    rng, width, tensor = np.random.default_rng(0), 8, "input"
    nodes, weights = [], []
    for place, name in enumerate(LAYERS[:-1]):
        kernel = rng.normal(size=(width, 1 if place == 0 else width, 3, 3)).astype(np.float32) / (
            3 if place == 0 else 8
        )
        weights.append(numpy_helper.from_array(kernel, f"{name}.weight"))
        nodes.append(helper.make_node("Conv", [tensor, f"{name}.weight"], [name], name, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"], f"{name}.relu"))
        tensor = f"{name}.relu"
    weights.append(numpy_helper.from_array(rng.normal(size=(width, 10)).astype(np.float32), "head.weight"))
    nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["pool"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flat"], "flat"))
    nodes.append(helper.make_node("Gemm", ["flat", "head.weight"], ["logits"], "head"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("input", ["batch", 1, 8, 8]), ("logits", ["batch", 10]))]  # fmt: skip
    graph = helper.make_graph(nodes, "toy", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy.onnx")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were timed on this machine."""
    timed: list[str] = []

    def measured(model: Path, threads: int) -> dict[str, Any]:
        timed.append(model.name)
        return record(2.0 if model.name == "model.onnx" else 1.0) | {"started_at": "2026-01-01T00:00:00Z"}

    monkeypatch.setattr(steps, "measure_alone", measured)
    return timed


class Board:
    """Reads a try as a device does, and is as fast with its INT8 file as `speed` says."""

    def __init__(self, speed: Speed) -> None:
        self.speed, self.asked = speed, 0

    def __call__(self, folder: Path) -> Speedup:
        self.asked += 1
        bundle = Bundle(folder)
        assert set(bundle.verify()) == {"model.onnx", "model.int8.onnx", "run.pyz"}
        value = self.speed(in_8_bits(Path(bundle.model_path("int8"))))
        return Speedup(value, 0.99 * value, 1.01 * value, 6)


def in_8_bits(path: Path) -> set[str]:
    """Layers whose weights are integers in the file; a part of a layer that was cut has its name and a colon."""
    constants = {each.name: each.data_type for each in onnx.load(str(path)).graph.initializer}
    found = {
        name.partition(".weight")[0].partition(":")[0] for name, kind in constants.items() if kind == TensorProto.INT8
    }
    return found & set(LAYERS)


def export(model: Path, speed: Speed, told: list[str] | None = None, **changes: Any) -> tuple[dict[str, Any], Board]:
    board = Board(speed)
    options = Options(int8=True, max_drop_points=100.0, **{"targets": (PI,), **changes})
    reading, there = Reading(mean=(0.5,), std=(0.5,), resize="squash", px=None), Elsewhere(PI.name, PI.name, board)
    say = (told if told is not None else []).append
    return export_file(model, "digits", options, reading=reading, there=there, display=say), board


def quantization(model: Path) -> dict[str, Any]:
    return dict(json.loads((model.with_suffix(".bundle") / "quantization.json").read_text()))


def slow_in_8_bits(layer: str) -> Speed:
    return lambda layers: 0.8 if layer in layers else 1.3


def test_the_layer_that_is_slow_there_goes_back_to_float(model: Path, here: list[str]) -> None:
    told: list[str] = []
    document, board = export(model, slow_in_8_bits("fourth"), told)
    found, bundle = quantization(model), model.with_suffix(".bundle")
    assert found["sensitivity"][0]["layer"] == "fourth", "in the order of sensitivity"
    assert found["fallback"]["left_float"] == ["fourth"]
    assert [each["speedup"] for each in found["fallback"]["tries"]] == [0.8, 1.3]
    assert found["fallback"]["timed_on"] == "raspberry-pi"
    why = "left in float for speed: with it in 8 bits the file was no faster than FP32 on raspberry-pi"
    assert found["kept_float"]["fourth"] == why
    assert in_8_bits(bundle / "model.int8.onnx") == set(LAYERS) - {"fourth"}
    assert (board.asked, here) == (2, []), "nothing is timed here"
    assert told.count("Measuring FP32 and INT8 in turn on raspberry-pi") == 2
    verdicts = {name: each["verdict"] for name, each in document["targets"].items()}
    assert verdicts == dict.fromkeys(("onnxruntime-cpu", "tensorrt", "raspberry-pi"), "undecided"), (
        "the last times decide"
    )
    assert not [path for path in bundle.parent.iterdir() if path.name.startswith(".")]


def test_a_file_that_is_fast_there_keeps_all_its_layers(model: Path) -> None:
    _, board = export(model, lambda layers: 1.1)
    bundle = model.with_suffix(".bundle")
    assert quantization(model)["fallback"]["left_float"] == []
    assert in_8_bits(bundle / "model.int8.onnx") == set(LAYERS)
    assert {path.name for path in bundle.iterdir()} == BUNDLE, "the same files as of a run"
    proof = json.loads((bundle / "proof.json").read_text())
    assert set(proof["layers"]) == {"int8", "trt", "trt-fp16"}, "of each INT8 file the first layer to diverge"
    assert board.asked == 1


def test_images_of_one_colour_leave_nothing(model: Path, tmp_path: Path) -> None:
    for place in range(24):
        path = tmp_path / "grey" / "train" / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * place, np.uint8)).save(path)
    before = sorted(model.parent.iterdir())
    with pytest.raises(DataError, match="to calibrate on are of one colour each, from which no range can be learned"):
        export_file(model, str(tmp_path / "grey"), Options(int8=True), reading=Reading(mean=(0.5,), std=(0.5,)))
    assert sorted(model.parent.iterdir()) == before


def test_where_nothing_helps_there_float_ships(model: Path) -> None:
    _, board = export(model, lambda layers: 0.9)
    found = quantization(model)["fallback"]
    assert (found["held"], found["left_float"], board.asked) == (False, [], 2)
    assert "no faster than FP32: with 0 of 5 layers in float" in found["why"]
    gate = json.loads((model.with_suffix(".bundle") / "gate.json").read_text())
    entry = fill_in(gate, PI.name, {"int8": Speedup(0.9, 0.89, 0.91, 6)})["targets"][PI.name]
    assert (entry["shipped"], entry["verdict"]) == ("fp32", "fail")


def test_a_board_that_is_gone_costs_its_times_and_no_more(model: Path, here: list[str]) -> None:
    def gone(layers: set[str]) -> float:
        raise DeviceError("The connection to pi was lost.")

    told: list[str] = []
    document, board = export(model, gone, told)
    (sentence,) = [each for each in told if each.startswith("The connection to pi was lost.")]
    assert "goes on by accuracy alone; what ships on raspberry-pi is asked once more at the end" in sentence
    found = quantization(model)["fallback"]
    assert (found["held"], found["timed_on"], found["left_float"]) == (True, None, [])
    assert (board.asked, here) == (1, [])
    assert document["targets"][PI.name]["verdict"] == document["targets"]["onnxruntime-cpu"]["verdict"] == "undecided"


def test_this_machine_too_where_a_target_asks(model: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One bundle, one INT8 file: it is the board's, and this machine's decision is on that."""
    monkeypatch.setattr(steps.platform, "machine", lambda: "x86_64")
    document, _ = export(model, slow_in_8_bits("fourth"), targets=(PI, load("x86-cpu")))
    assert "fourth" not in in_8_bits(model.with_suffix(".bundle") / "model.int8.onnx")
    assert set(here) == {"model.onnx", "model.int8.onnx"}
    targets = document["targets"]
    assert targets["x86-cpu"]["speedup"] == targets["onnxruntime-cpu"]["speedup"] == 2.0
    assert targets[PI.name]["speedup"] is None


def test_a_file_is_timed_once(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    asked: list[Path] = []

    def speed(folder: Path) -> Speedup:
        asked.append(folder)
        return Speedup(2.0, 1.9, 2.1, 6)

    preprocess = Preprocess(8, 8, 1, "squash", (0.5,), (0.5,))
    trials = Trials(Elsewhere("pi", None, speed), tmp_path / "trial", preprocess, ("a",), lambda sentence: None)
    assert trials.speed(model, model) == trials.speed(model, other) == Speedup(2.0, 1.9, 2.1, 6)
    assert asked == [tmp_path / "trial"]
