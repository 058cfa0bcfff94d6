"""Files in half precision: their ends, their numbers, and what does not fit."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from kdedge.errors import ExportError
from kdedge_export.cpu.lint import lint_float
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.sessions import run_onnx
from kdedge_export.trt.emulate import emulate
from kdedge_export.trt.fp16 import overflowing, write_fp16

from .conftest import CLASSES, SMALL, images
from .test_int8 import relative_rms
from .trt_toys import make_toy

Exported = tuple[nn.Module, onnx.ModelProto]


def test_half_is_near_float(mobilenet_v3: Exported) -> None:
    for model in (mobilenet_v3[1], make_toy()[1]):
        half = write_fp16(model)
        assert lint_float(half) == [], "opset 17, IR 8, float32 at its ends, an open batch"
        kinds = {each.data_type for each in half.graph.initializer}
        assert TensorProto.FLOAT16 in kinds
        assert TensorProto.FLOAT not in kinds
        assert [node.op_type for node in half.graph.node].count("Cast") == 2
        assert len(half.SerializeToString()) < 0.6 * len(model.SerializeToString())
        batch = SMALL.normalize(images(8))
        expected, found = run_onnx(model.SerializeToString(), batch), emulate(half.SerializeToString(), batch)
        assert 0 < relative_rms(found, expected) <= 0.02


class Clipped(nn.Module):
    """A clip far beyond half, and an activation that comes close to its end."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.conv, self.head, self.gain = nn.Conv2d(3, 4, 1), nn.Linear(4, 10), gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((torch.clamp(self.conv(x), -1e30, 1e30) * self.gain).mean((2, 3)) / self.gain)


def test_a_clip_beyond_half_ends_with_it() -> None:
    torch.manual_seed(0)
    model = export_float(Clipped(2.0).eval(), SMALL, CLASSES)
    half = write_fp16(model)
    bounds = [numpy_helper.to_array(each) for each in half.graph.initializer if each.name in clip_bounds(half)]
    assert sorted(float(each) for each in bounds) == [-65504.0, 65504.0]
    batch = SMALL.normalize(images(4))
    found, expected = emulate(half.SerializeToString(), batch), run_onnx(model.SerializeToString(), batch)
    assert relative_rms(found, expected) <= 0.02


def clip_bounds(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node if node.op_type == "Clip" for name in node.input[1:]}


def test_activations_that_come_near_the_end_of_half_are_told() -> None:
    torch.manual_seed(0)
    batches = np.split(SMALL.normalize(images(8)), 2)
    assert overflowing(make_toy()[1], batches) == {}
    model = export_float(Clipped(60000.0).eval(), SMALL, CLASSES)
    found = overflowing(model, batches)
    largest = {node.op_type for node in model.graph.node if node.output[0] in found}
    assert "Mul" in largest
    assert "Conv" not in largest
    assert min(found.values()) > 32752


def test_a_weight_that_does_not_fit_is_named() -> None:
    torch.manual_seed(0)
    module = Clipped(2.0).eval()
    with torch.no_grad():
        module.conv.weight[0, 0] = 7e4
    model = export_float(module, SMALL, CLASSES)
    with pytest.raises(ExportError, match=r"constant conv\.weight holds 7e\+04, and FP16 ends at 65504"):
        write_fp16(model)


def test_an_operator_without_a_form_in_half_is_told() -> None:
    _, model, _, _ = make_toy()
    damaged = onnx.ModelProto()
    damaged.CopyFrom(model)
    node = next(node for node in damaged.graph.node if node.op_type == "Sigmoid")
    node.op_type = "BitShift"
    with pytest.raises(ExportError, match="This model has no form in FP16"):
        write_fp16(damaged)
