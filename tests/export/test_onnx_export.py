"""The float file says what torch says, by value, for every student family."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdedge.errors import ExportError
from kdedge_device.preprocess import Preprocess
from kdedge_export.cpu.lint import lint_float
from kdedge_export.float_form.onnx_export import export_float, verify
from kdedge_export.sessions import run_onnx

from .conftest import CLASSES, SMALL, images

Exported = tuple[nn.Module, onnx.ModelProto]


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3"])
def test_torch_and_onnx_agree(name: str, request: pytest.FixtureRequest) -> None:
    module, model = request.getfixturevalue(name)
    assert lint_float(model) == []
    batch = SMALL.normalize(images(7))
    with torch.inference_mode():
        expected = module(torch.from_numpy(batch)).numpy()
    found = run_onnx(model.SerializeToString(), batch)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    said = verify(module, model, batch)
    assert said["same_class"] == 1.0
    assert 0 < said["max_abs_difference"] <= said["tolerance"]


def test_the_file_is_self_describing(mobilenet_v2: Exported) -> None:
    _, model = mobilenet_v2
    assert [each.name for each in model.graph.input] == ["input"]
    assert [each.name for each in model.graph.output] == ["logits"]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, [dim.dim_value for dim in dims[1:]]) == ("batch", [3, 16, 16])
    note = json.loads({each.key: each.value for each in model.metadata_props}["kdedge"])
    assert Preprocess.from_json(note["preprocess"]) == SMALL
    assert note["classes"] == list(CLASSES)
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"Conv", "Clip", "Add", "GlobalAveragePool", "Flatten", "Gemm"}, "batch normalisation is folded"
    assert {"backbone.features.0.0", "head"} <= {node.name for node in model.graph.node}


def test_a_file_that_differs_is_refused(mobilenet_v2: Exported) -> None:
    module, model = mobilenet_v2
    other = onnx.ModelProto()
    other.CopyFrom(model)
    head = next(each for each in other.graph.initializer if each.name == "head.bias")
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) + np.float32(0.1), "head.bias"))
    with pytest.raises(ExportError, match=r"differs from the torch model by 0\.1"):
        verify(module, other, SMALL.normalize(images(4)))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_module_that_cannot_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="torch cannot export this model"):
        export_float(Branching(), SMALL, CLASSES)


def test_the_exporter_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    model = export_float(module, SMALL, CLASSES)
    assert capfd.readouterr() == ("", "")
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
