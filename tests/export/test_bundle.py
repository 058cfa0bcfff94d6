"""What the manifest says is read from the files themselves, and the images for the device are labelled test ones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kdedge.errors import DataError
from kdedge_device.check import check
from kdedge_device.evaluate import evaluate
from kdedge_device.manifest import Bundle
from kdedge_device.preprocess import Preprocess
from kdedge_export.bundle import (
    ARTIFACTS,
    eval_part,
    golden_tolerance,
    new_bundle,
    write_eval,
    write_golden,
    write_manifest,
)
from kdedge_export.images import Part

PREPROCESS = Preprocess(4, 4, 1, "squash", (0.0,), (1.0,))
CLASSES = ("zero", "one", "two")


def brightest(opset: int = 17, ir: int = 8) -> onnx.ModelProto:
    """Logits are the first three of the sixteen pixels."""
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gather", ["flat", "places"], ["logits"], axis=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("input", (1, 4, 4)), ("logits", (3,)))
    ]
    places = onnx.numpy_helper.from_array(np.arange(3), "places")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [places])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


@dataclass(frozen=True)
class Pictures:
    """Stands for a source: picture i has its pixel `i % 3` lit."""

    fingerprint: str = "f"

    def load(self, indices: Any, preprocess: Preprocess) -> Any:
        import torch

        pixels = np.zeros((len(indices), 1, 16), np.uint8)
        pixels[np.arange(len(indices)), 0, np.asarray(indices) % 3] = 255
        return torch.from_numpy(pixels.reshape(-1, 1, 4, 4))


def part(count: int, unlabeled: tuple[int, ...] = ()) -> Part:
    labels = np.arange(count) % 3
    labels[list(unlabeled)] = -1
    return Part("test", Pictures(), np.arange(count), labels, "sha")  # type: ignore[arg-type]


def test_a_bundle_with_every_artifact(tmp_path: Path) -> None:
    images = part(6).load(PREPROCESS)
    logits = PREPROCESS.normalize(images).reshape(6, -1)[:, :3]
    with new_bundle(tmp_path / "bundle") as folder:
        for name, artifact in ARTIFACTS.items():
            typed = name == "trt-fp16"
            model = brightest(20 if typed else 17, 10 if typed else 8)
            (folder / artifact.file).write_bytes(model.SerializeToString())
        write_golden(folder / "golden.npz", images, dict.fromkeys(ARTIFACTS, logits))
        write_eval(folder / "eval.npz", eval_part(part(60), 9)[0], PREPROCESS)
        known = {name: {"accuracy": 1.0, "golden_tolerance": golden_tolerance(name, logits)} for name in ARTIFACTS}
        write_manifest(folder, known, PREPROCESS, CLASSES, "int8", {"split": "test"}, {"run": "r"})
    document = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    told = {
        name: (each["file"], each["precision"], each["runtime"], each["opset"], each["ir_version"])
        for name, each in document["artifacts"].items()
    }
    assert told == {
        "fp32": ("model.onnx", "fp32", "onnxruntime", 17, 8),
        "int8": ("model.int8.onnx", "int8", "onnxruntime", 17, 8),
        "trt": ("model.trt.onnx", "int8", "tensorrt", 17, 8),
        "trt-fp16": ("model.trt-fp16.onnx", "int8", "tensorrt", 20, 10),
        "fp16": ("model.fp16.onnx", "fp16", "onnxruntime", 17, 8),
    }
    assert set(document["files"]) == {"golden.npz", "eval.npz"}
    assert document["input"] == {
        "name": "input",
        "shape": ["batch", 1, 4, 4],
        "dtype": "float32",
        "layout": "NCHW",
    }
    bundle = Bundle(tmp_path / "bundle")
    found = check(bundle)
    assert sorted(found["golden"]) == ["fp16", "fp32", "int8"]
    assert sorted(found["not_run"]) == ["trt", "trt-fp16"]
    scored = evaluate(bundle, str(tmp_path / "bundle" / "eval.npz"))
    assert (scored["accuracy"], scored["images"]) == (1.0, 9)
    assert all(pair[1] for pair in scored["per_class"].values()), "evenly over the split, so over its classes"


def test_pixels_as_input_are_told(tmp_path: Path) -> None:
    model = brightest()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", TensorProto.UINT8, ["batch", 4, 4, 1]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(tmp_path, {"fp32": {}}, PREPROCESS, CLASSES, "fp32", {}, {})
    document = json.loads((tmp_path / "manifest.json").read_text())
    assert (document["input"]["dtype"], document["input"]["layout"]) == ("uint8", "NHWC")
    assert document["input"]["shape"] == ["batch", 4, 4, 1]


def test_tolerances_follow_the_span_of_the_logits() -> None:
    logits = np.array([[-2.0, 3.0], [0.0, 1.0]], np.float32)
    assert golden_tolerance("fp32", logits) == pytest.approx(0.005)
    assert golden_tolerance("int8", logits) == pytest.approx(0.4)
    assert golden_tolerance("trt", logits) >= golden_tolerance("int8", logits)
    assert golden_tolerance("fp32", logits) < golden_tolerance("fp16", logits) < golden_tolerance("int8", logits)
    assert golden_tolerance("fp32", np.ones((1, 2), np.float32)) > 0


def test_images_for_the_device_are_labelled_ones() -> None:
    chosen, places = eval_part(part(100, unlabeled=(0, 50, 99)), 10)
    assert len(chosen) == len(places) == 10
    assert (chosen.labels >= 0).all()
    assert list(chosen.indices) == list(places)
    assert np.diff(places).max() <= 12, "evenly over the split"
    everything, _ = eval_part(part(5), 10)
    assert list(everything.labels) == [0, 1, 2, 0, 1]
    with pytest.raises(DataError, match="have no labels, so there is nothing to score"):
        eval_part(part(3, unlabeled=(0, 1, 2)), 10)
