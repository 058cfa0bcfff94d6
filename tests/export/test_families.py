"""Every family of the zoo as a float file and as an INT8 file, by value; those of students leave nothing in float."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdedge.models.zoo import ARCHITECTURES, ModelSpec, build
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.cpu_form import cpu_form
from kdedge_export.cpu.lint import lint_float, lint_int8
from kdedge_export.cpu.plan import make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float, verify
from kdedge_export.graph import attribute
from kdedge_export.sessions import run_onnx

from .conftest import CLASSES, images, warm
from .test_int8 import fused, relative_rms

PREPROCESS = Preprocess(32, 32, 3, "squash", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

# What an INT8 file leaves in float: normalisation in front of an activation, which no convolution can take in.
IN_FLOAT = {
    "wide-resnet-10-1": {"LeakyRelu", "BatchNormalization", "GlobalAveragePool", "Flatten"},
}
FAMILIES = [
    # MobileNets are tested in test_int8.py; ResNet-34 is ResNet-18 with more of the same blocks.
    *(name for name in ARCHITECTURES if not name.startswith("mobilenet") and name != "resnet34"),
    "wide-resnet-10-1",
]


def shallow(network: nn.Module) -> nn.Module:
    """At most two blocks of each stage: the one that changes the shape, and one of the others, which are all alike."""
    for stage in list(network.modules()):
        if not isinstance(stage, nn.Sequential):
            continue
        kinds = {type(block) for block in stage}
        if len(kinds) == 1 and not issubclass(kinds.pop(), nn.Sequential):
            del stage[2:]
    return network


def test_no_family_is_forgotten() -> None:
    assert len(FAMILIES) == 10
    assert set(IN_FLOAT) <= set(FAMILIES)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_family_is_exported_and_quantized(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels = images(80, px=32)
    network: nn.Module = build(ModelSpec(arch, len(CLASSES), halvings=3))
    if not arch.startswith("wide-resnet"):  # all its blocks stand in one row
        network = shallow(network)
    batch = PREPROCESS.normalize(pixels[48:])
    module = warm(network, torch.from_numpy(PREPROCESS.normalize(pixels[:48])))

    exported = export_float(module, PREPROCESS, CLASSES)
    assert lint_float(exported) == []
    assert verify(module, exported, batch, relative=1e-4)["same_class"] == 1.0

    model = cpu_form(exported)
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
