"""What the TensorRT tests share: a bundle with every file an engine is built from, and a fake machine to build on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdedge_device.cuda_driver import Gpu
from kdedge_device.manifest import Bundle
from kdedge_device.own_key import own_key, signature
from kdedge_device.trt import Here
from kdedge_device.trt_build import BuildOptions
from kdedge_device.trt_bundle import build_for_bundle

from .conftest import entry, linear_model, write_manifest
from .fake_tensorrt import VERSIONS, World, make

BATCH = np.random.default_rng(0).normal(size=(5, 1, 4, 4)).astype(np.float32)
FILES = {
    "fp32": ("model.onnx", 17),
    "fp16": ("model.fp16.onnx", 17),
    "trt": ("model.trt.onnx", 17),
    "trt-fp16": ("model.trt-fp16.onnx", 20),
}
OLD, NEW = "8.5.3.1", "11.4.0.106"
assert OLD in VERSIONS
assert NEW in VERSIONS


def machine(version: str, world: World) -> Here:
    """A Here as `load_tensorrt` would give it, of the fake of `version`."""
    return Here(
        make(version, world), version, Gpu("Fake Orin", world.capability, 1 << 30, "12.6", None), world.cuda._name
    )


def quantized_model(opset: int, batch: object = "batch") -> bytes:
    """The linear model of the bundle with Q/DQ in front of the layer that counts."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("QuantizeLinear", ["flat", "scale", "zero"], ["flat_q"], "q"),
        helper.make_node("DequantizeLinear", ["flat_q", "scale", "zero"], ["flat_dq"], "dq"),
        helper.make_node("Gemm", ["flat_dq", "weight"], ["logits"], "head", transB=1),
    ]
    constants = [
        numpy_helper.from_array(np.array([[-1.0], [1.0]], np.float32), "weight"),
        numpy_helper.from_array(np.array(1 / 127, np.float32), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 1, 4, 4])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 2])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    ir_version = 8 if opset <= 17 else 10
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def complete(bundle: Path, leave_out: tuple[str, ...] = ()) -> Path:
    """The bundle of conftest with the files for TensorRT beside the FP32 one."""
    artifacts: dict[str, Any] = {}
    for name, (file, opset) in FILES.items():
        if name in leave_out:
            continue
        content = quantized_model(opset) if name.startswith("trt") else linear_model()
        (bundle / file).write_bytes(content)
        tensorrt = name.startswith("trt")
        artifacts[name] = {
            "file": file,
            **entry(bundle / file),
            "precision": "int8" if tensorrt else name,
            "runtime": "tensorrt" if tensorrt else "onnxruntime",
            "golden_tolerance": 0.01,
        }
    with np.load(bundle / "golden.npz") as arrays:
        images, logits = arrays["images"], arrays["logits__fp32"]
    np.savez(bundle / "golden.npz", images=images, **{f"logits__{name}": logits for name in artifacts})
    write_manifest(bundle, artifacts=artifacts)
    return bundle


def sign(path: Path, **changes: Any) -> None:
    """The side file of the engine `path` as its builder would have written it with `changes`."""
    side = {**json.loads(Path(f"{path}.json").read_text()), **changes}
    Path(f"{path}.json").write_text(json.dumps({**side, "signature": signature(own_key(), side)}))


def built(folder: Path, here: Here, precision: str = "int8", **how: Any) -> dict[str, Any]:
    """What `build_for_bundle` gives, with a timing cache of the test's own."""
    options = BuildOptions(precision)._replace(**how)
    return build_for_bundle(Bundle(folder), options, here=here, timing_folder=str(folder.parent / "timing"))
