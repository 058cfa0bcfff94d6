"""Every family of the zoo as a float file, by value and at any batch; as an INT8 file, where those of students leave
nothing in float; and as files for TensorRT.

A network is traced once for all of it, which takes seconds.
"""

import functools
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdedge.data.sources import open_source
from kdedge.models.zoo import ARCHITECTURES, ModelSpec, build
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.cpu_form import cpu_form
from kdedge_export.cpu.lint import lint_float, lint_int8
from kdedge_export.cpu.plan import make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float, verify
from kdedge_export.float_form.onnx_import import import_onnx
from kdedge_export.graph import Graph, attribute
from kdedge_export.sessions import run_onnx
from kdedge_export.trt.emulate import emulate
from kdedge_export.trt.lint import lint_trt
from kdedge_export.trt.plan import make_trt_plan
from kdedge_export.trt.qdq import write_trt
from kdedge_export.trt.typed import write_trt_fp16

from .conftest import CLASSES, images, warm
from .test_int8 import fused, relative_rms
from .trt_toys import minmax_table

PREPROCESS = Preprocess(32, 32, 3, "squash", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
ZOO = [*ARCHITECTURES, "wide-resnet-10-1"]

COMMON = {"Conv", "GlobalAveragePool", "Flatten", "Gemm"}
SHUFFLE = {"Split", "Concat", "Reshape", "Transpose"}
WORDS = {
    "mobilenet-v2": {"Clip", "Add"},
    "mobilenet-v3-small": {"Relu", "HardSwish", "HardSigmoid", "Mul", "Add"},
    "mobilenet-v3-large": {"Relu", "HardSwish", "HardSigmoid", "Mul", "Add"},
    "efficientnet-b0": {"Sigmoid", "Mul", "Add"},
    "efficientnet-lite0": {"Clip", "Add"},
    "shufflenet-v2": {"Relu"} | SHUFFLE,
    "mnasnet": {"Relu", "Add"},
    "squeezenet": {"Relu", "MaxPool", "Concat"},
    "regnet-x-400mf": {"Relu", "Add"},
    "regnet-y-400mf": {"Relu", "Add", "Sigmoid", "Mul"},
    "resnet18": {"Relu", "Add"},
    "resnet34": {"Relu", "Add"},
    "resnet50": {"Relu", "Add"},
    "wide-resnet-10-1": {"LeakyRelu", "Add", "BatchNormalization"},
}
"""Behind Conv, pooling and head each family has exactly these operators: a new word is a decision, not an accident.
At 32 px the MaxPool of a stem is one of one pixel, and gone. Wide ResNets normalise in front of their convolutions,
with an activation between, where nothing can be folded.
"""

# What an INT8 file leaves in float: normalisation in front of an activation, which no convolution can take in.
IN_FLOAT = {
    "wide-resnet-10-1": {"LeakyRelu", "BatchNormalization", "GlobalAveragePool", "Flatten"},
}
FAMILIES = [
    # MobileNets are tested in test_int8.py; ResNet-34 is ResNet-18 with more of the same blocks.
    *(name for name in ARCHITECTURES if not name.startswith("mobilenet") and name != "resnet34"),
    "wide-resnet-10-1",
]

# Layers by kind that read 8 bits. The other architectures are made of the same blocks.
TENSORRT = {
    "shufflenet-v2": {"Conv": 21, "Concat": 6, "Reshape": 6, "GlobalAveragePool": 1},
    "squeezenet": {"Conv": 25, "Concat": 8, "MaxPool": 2, "GlobalAveragePool": 1},
    "resnet18": {"Conv": 20, "Add": 8, "GlobalAveragePool": 1},
    "regnet-y-400mf": {"Conv": 26, "Add": 7, "GlobalAveragePool": 1},
    "efficientnet-b0": {"Conv": 37, "Add": 5},
    "wide-resnet-10-1": {"Conv": 10, "Add": 3},
}


def shallow(network: nn.Module) -> nn.Module:
    """At most two blocks of each stage: the one that changes the shape, and one of the others, which are all alike."""
    for stage in list(network.modules()):
        if not isinstance(stage, nn.Sequential):
            continue
        kinds = {type(block) for block in stage}
        if len(kinds) == 1 and not issubclass(kinds.pop(), nn.Sequential):
            del stage[2:]
    return network


@functools.cache
def exported(arch: str) -> tuple[nn.Module, onnx.ModelProto]:
    """The network, its batch normalisation set by noise, and its float file."""
    torch.manual_seed(0)
    network: nn.Module = build(ModelSpec(arch, len(CLASSES), halvings=3))
    if not arch.startswith("wide-resnet"):  # all its blocks stand in one row
        network = shallow(network)
    module = warm(network, torch.from_numpy(PREPROCESS.normalize(images(48, px=32))))
    return module, export_float(module, PREPROCESS, CLASSES)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """float32 [32, 3, 32, 32]: handwritten digits."""
    pixels = open_source("digits").load(range(32), PREPROCESS).permute(0, 2, 3, 1).numpy()
    return PREPROCESS.normalize(np.ascontiguousarray(pixels))


def test_no_family_is_forgotten() -> None:
    assert set(WORDS) == set(ZOO)
    assert len(ZOO) == 14
    assert len(FAMILIES) == 10
    assert set(IN_FLOAT) <= set(FAMILIES)


@pytest.mark.parametrize("arch", ZOO)
def test_by_value_on_digits(arch: str, digits: np.ndarray, tmp_path: Path) -> None:
    module, model = exported(arch)
    assert lint_float(model) == []
    assert verify(module, model, digits, relative=1e-4)["same_class"] == 1.0
    content = model.SerializeToString()
    for count in (1, 2, 7):
        batch = digits[-count:]
        with torch.inference_mode():
            expected = module(torch.from_numpy(batch)).numpy()
        found = run_onnx(content, batch)
        assert found.shape == (count, len(CLASSES))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    _is_well_written(model, arch)
    again = import_onnx(_saved(model, tmp_path))
    assert [node.op_type for node in again.model.graph.node] == [node.op_type for node in model.graph.node]


def _is_well_written(model: onnx.ModelProto, arch: str) -> None:
    """Words, names and the note about itself."""
    graph = Graph(model)
    assert {node.op_type for node in graph.nodes} - COMMON == WORDS[arch]
    for node in graph.nodes:
        if node.op_type == "BatchNormalization":
            assert graph.producer[node.input[0]].op_type != "Conv" or graph.only_reader(node.input[0]) is None
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert all(node.output[0] in (node.name, "logits") for node in graph.nodes)
    assert names[-1] == "head"
    note = json.loads({each.key: each.value for each in model.metadata_props}["kdedge"])
    assert Preprocess.from_json(note["preprocess"]) == PREPROCESS
    assert note["classes"] == list(CLASSES)


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_family_is_exported_and_quantized(arch: str, tmp_path: Path) -> None:
    pixels = images(80, px=32)
    batch = PREPROCESS.normalize(pixels[48:])
    module, traced = exported(arch)
    assert verify(module, traced, batch, relative=1e-4)["same_class"] == 1.0

    model = cpu_form(traced)
    plan = make_plan(model)
    table = make_table("minmax", model, plan, calibrate(model, measured(plan), pixels[:48], PREPROCESS))
    int8 = write_int8(model, plan, table)
    assert lint_int8(int8, frozenset(plan.kept_float)) == []
    kept = {node.op_type for node in model.graph.node if node.name in plan.kept_float}
    assert kept == IN_FLOAT.get(arch, set())

    content = int8.SerializeToString()
    expected, found = run_onnx(model.SerializeToString(), batch), run_onnx(content, batch)
    assert relative_rms(found, expected) <= 0.35  # random weights magnify every rounding; trained ones do not
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.7
    assert relative_rms(run_onnx(content, batch, optimize=False), expected) <= 0.35, "as written, operator by operator"

    before, after = Counter(node.op_type for node in model.graph.node), fused(int8, tmp_path)
    assert after["QLinearConv"] == before["Conv"]
    assert (after["QLinearConcat"], after["QGemm"]) == (before["Concat"], before["Gemm"])
    assert (after["QLinearMul"], after["QLinearSigmoid"]) == (before["Mul"], before["Sigmoid"])
    assert not set(after) & {"Conv", "Concat", "Relu", "Clip", "Gemm", "Mul", "Sigmoid"}
    if arch not in IN_FLOAT:
        assert after["QuantizeLinear"] == 1, "the input alone"
        assert not after["DequantizeLinear"]


@pytest.mark.parametrize("arch", sorted(TENSORRT))
def test_a_family_in_both_forms_for_tensorrt(arch: str) -> None:
    pixels, model = images(40, px=32), exported(arch)[1]
    plan = make_trt_plan(model)
    kept = frozenset(plan.kept_float)
    assert Counter(node.op_type for node in model.graph.node if node.name in plan.layers) == TENSORRT[arch]
    table = minmax_table(model, plan, pixels[:32], PREPROCESS)
    eight, typed = write_trt(model, plan, table), write_trt_fp16(model, plan, table)
    assert lint_trt(eight, "trt", kept) == []
    assert lint_trt(typed, "trt-fp16", kept) == []
    batch = PREPROCESS.normalize(pixels[32:])
    expected = run_onnx(model.SerializeToString(), batch)
    for file in (eight, typed):
        found = emulate(file.SerializeToString(), batch)
        assert relative_rms(found, expected) <= 0.5  # random weights magnify every rounding; trained ones do not


class Shuffled(nn.Module):
    """Everything that only moves values between two convolutions: split, join, channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.relu(self.first(x)).chunk(2, 1)
        joined = torch.cat([left, self.second(right)], 1)
        count, _, height, width = x.size()
        shuffled = joined.view(count, 2, 4, height, width).transpose(1, 2).reshape(count, 8, height, width)
        return self.head(self.last(shuffled).mean((2, 3)))


def test_what_only_moves_values_hands_on_the_scale() -> None:
    torch.manual_seed(0)
    pixels = images(24, px=32)
    model = export_float(Shuffled().eval(), PREPROCESS, CLASSES)
    plan = make_plan(model)
    kinds = {node.op_type: node for node in model.graph.node}
    assert {"Split", "Concat", "Reshape", "Transpose"} <= set(kinds)
    assert plan.kept_float == {}
    assert all(plan.same_scale[name] == kinds["Split"].input[0] for name in kinds["Split"].output)
    assert plan.same_scale[kinds["Transpose"].output[0]] == kinds["Concat"].output[0]

    table = make_table("minmax", model, plan, calibrate(model, measured(plan), pixels, PREPROCESS))
    int8 = write_int8(model, plan, table)
    assert lint_int8(int8) == []
    assert not any(attribute(node, "perm") == [0, 2, 1, 3, 4] for node in int8.graph.node), "shuffled by the weights"
    batch = PREPROCESS.normalize(pixels)
    expected, found = (run_onnx(each.SerializeToString(), batch) for each in (model, int8))
    assert relative_rms(found, expected) <= 0.03

    # Another scale behind a Split is a mistake that the linter finds.
    name = next(each.name for each in int8.graph.initializer if each.name.endswith(":from0_scale"))
    scale = next(each for each in int8.graph.initializer if each.name == name)
    scale.raw_data = (2 * np.frombuffer(scale.raw_data, np.float32)).tobytes()
    assert any("Split changes the scale" in problem for problem in lint_int8(int8))


@pytest.mark.shared_data
def test_trained_weights_on_photographs(shared_data: Path) -> None:
    """MobileNetV2 with ImageNet weights at full size, on flowers: the same thousand logits, and the same ten best."""
    from torchvision import models

    network = models.mobilenet_v2()
    with np.load(shared_data / "weights" / "mobilenet_v2_imagenet_torchvision.npz") as weights:
        network.load_state_dict({key: torch.from_numpy(weights[key]) for key in weights.files})
    preprocess = Preprocess(224, 224, 3, "short-side-crop", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with tarfile.open(shared_data / "flowers5" / "flowers5_160.tar") as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".jpg")][::400]
        photos = [preprocess.decode(archive.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
    batch = preprocess.normalize(np.stack(photos))
    assert len(batch) >= 5
    model = export_float(network.eval(), preprocess, [str(k) for k in range(1000)])
    assert verify(network, model, batch, relative=1e-4)["same_class"] == 1.0
    with torch.inference_mode():
        expected = network(torch.from_numpy(batch)).numpy()
    found = run_onnx(model.SerializeToString(), batch)
    assert (found.argsort(1)[:, -10:] == expected.argsort(1)[:, -10:]).mean() > 0.95
