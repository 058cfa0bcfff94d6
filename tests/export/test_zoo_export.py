"""The exporter on every network of the zoo, by value against torch on real images, at any batch."""

import json
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdedge.data.sources import open_source
from kdedge.models.zoo import ARCHITECTURES, ModelSpec, build
from kdedge_device.preprocess import Preprocess
from kdedge_export.cpu.lint import lint_float
from kdedge_export.float_form.onnx_export import export_float, verify
from kdedge_export.float_form.onnx_import import import_onnx
from kdedge_export.graph import Graph
from kdedge_export.sessions import run_onnx

from .conftest import CLASSES, warm
from .test_families import shallow

ZOO = [*ARCHITECTURES, "wide-resnet-10-1"]
GREY = Preprocess(32, 32, 1, "squash", (0.3,), (0.38,))

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


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """float32 [120, 1, 32, 32]: handwritten digits."""
    pixels = open_source("digits").load(range(120), GREY).permute(0, 2, 3, 1).numpy()
    return GREY.normalize(np.ascontiguousarray(pixels))


def test_every_architecture_is_listed() -> None:
    assert set(WORDS) == set(ZOO)
    assert len(ZOO) == 14


@pytest.mark.parametrize("arch", ZOO)
def test_by_value_on_digits(arch: str, digits: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: nn.Module = build(ModelSpec(arch, len(CLASSES), channels=1, halvings=3))
    if not arch.startswith("wide-resnet"):  # all its blocks stand in one row
        network = shallow(network)
    module = warm(network, torch.from_numpy(digits[:88]))
    model = export_float(module, GREY, CLASSES)
    assert lint_float(model) == []
    assert verify(module, model, digits[88:], relative=1e-4)["same_class"] == 1.0
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
    assert Preprocess.from_json(note["preprocess"]) == GREY
    assert note["classes"] == list(CLASSES)


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.shared_data
def test_trained_weights_on_photographs(shared_data: Path, tmp_path: Path) -> None:
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
