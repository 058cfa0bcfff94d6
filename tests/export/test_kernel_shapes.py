"""What write_int8 does to please kernels changes no value: zero channels, merged groups, columns, shuffles."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.aligned import aligned
from kdedge_export.cpu.columns import in_columns
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.cpu.unshuffled import unshuffled
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.graph import attribute
from kdedge_export.sessions import run_onnx
from kdedge_export.table import RangeTable, natural_weight_scales

from .conftest import CLASSES, SMALL, images

PIXELS = images(12)
BATCH = SMALL.normalize(PIXELS)


def exported(module: nn.Module, preprocess: Preprocess = SMALL) -> tuple[onnx.ModelProto, Plan, RangeTable]:
    torch.manual_seed(0)
    for each in module.modules():  # no bias is 0 by chance
        if isinstance(each, nn.Conv2d | nn.Linear) and each.bias is not None:
            nn.init.normal_(each.bias)
    model = export_float(module.eval(), preprocess, CLASSES)
    plan = make_plan(model)
    spans = dict.fromkeys(plan.tensors, (-1.0, 1.0))
    return model, plan, RangeTable(spans, natural_weight_scales(model, plan.layers))


def assert_same(first: onnx.ModelProto, second: onnx.ModelProto, batch: np.ndarray = BATCH) -> None:
    expected, found = (run_onnx(each.SerializeToString(), batch) for each in (first, second))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def weight(model: onnx.ModelProto, layer: str) -> np.ndarray:
    node = next(node for node in model.graph.node if node.name == layer)
    return onnx.numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == node.input[1]))


class Inverted(nn.Module):
    """Two inverted residuals of 24 channels inside with a squeeze-excite, joined by a sum of 12 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.narrow, self.last = nn.Conv2d(24, 12, 1), nn.Conv2d(12, 20, 3, padding=1, groups=4)
        self.head = nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.stem(x))
        deep = nn.functional.hardtanh(self.deep(torch.relu(self.wide(stem))), 0.0, 6.0)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(deep.mean((2, 3), keepdim=True)))))
        return self.head(self.last(stem + self.narrow(deep * gate)).mean((2, 3)))


def test_depthwise_convolutions_get_multiples_of_sixteen_channels() -> None:
    model, _, table = exported(Inverted())
    wider, new = aligned(model, table)
    onnx.checker.check_model(wider, full_check=True)
    assert_same(model, wider)
    shapes = {layer: weight(wider, layer).shape for layer in ("stem", "wide", "deep", "squeeze", "excite", "narrow")}
    assert shapes == {
        "stem": (12, 3, 3, 3),
        "wide": (32, 12, 1, 1),
        "deep": (32, 1, 3, 3),
        "squeeze": (6, 32, 1, 1),
        "excite": (32, 6, 1, 1),
        "narrow": (12, 32, 1, 1),
    }
    assert len(new.weight_scales["deep"]) == len(new.weight_scales["wide"]) == 32
    assert np.array_equal(new.weight_scales["deep"][:24], table.weight_scales["deep"])
    assert [node.name for node in wider.graph.node] == [node.name for node in model.graph.node]


def test_narrow_groups_are_merged() -> None:
    """Four groups of 3 channels become one of 12, six of 16 become three of 32."""
    model, _, table = exported(Inverted())
    assert weight(aligned(model, table)[0], "last").shape == (20, 12, 3, 3)
    merged = grouped(96, 48, 6)
    assert weight(merged, merged.graph.node[1].name).shape == (48, 32, 3, 3)
    assert attribute(merged.graph.node[1], "group") == 3


def test_groups_stay_where_zeros_would_cost_more() -> None:
    """25 groups of 16 come out even at 80 only, and 55 of 8 would take more bytes than a layer may grow by."""
    for channels, groups in ((400, 25), (440, 55)):
        same = grouped(channels, channels, groups)
        assert weight(same, same.graph.node[1].name).shape == (channels, channels // groups, 3, 3)
        assert attribute(same.graph.node[1], "group") == groups


def grouped(channels: int, made: int, groups: int) -> onnx.ModelProto:
    """A grouped convolution between a plain one and a head, aligned, proven to be the same function."""
    layers = [nn.Conv2d(3, channels, 1), nn.Conv2d(channels, made, 3, groups=groups), nn.AdaptiveAvgPool2d(1)]
    model, _, table = exported(nn.Sequential(*layers, nn.Flatten(), nn.Linear(made, 10)))
    found, _ = aligned(model, table)
    assert_same(model, found)
    return found


def test_shared_weights_keep_their_channels() -> None:
    module = Inverted()
    model, _, table = exported(module)
    deep = next(node for node in model.graph.node if node.name == "deep")
    model.graph.node.append(helper.make_node("Identity", [deep.input[1]], ["elsewhere"], name="elsewhere"))
    same, _ = aligned(model, table)
    assert weight(same, "deep").shape == (24, 1, 3, 3)
    assert_same(model, same)


STEMS = [(3, 2, 1, 3), (7, 2, 3, 3), (3, 1, 1, 3), (5, 1, 2, 1), (1, 1, 0, 3), (5, 4, 2, 1)]


@pytest.mark.parametrize(("kernel", "stride", "padding", "channels"), STEMS)
def test_a_stem_works_on_groups_of_columns(kernel: int, stride: int, padding: int, channels: int) -> None:
    preprocess = Preprocess(16, 16, channels, "squash", (0.5,) * channels, (0.25,) * channels)
    stem = nn.Conv2d(channels, 6, kernel, stride, padding)
    module = nn.Sequential(stem, nn.ReLU(), nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model, plan, table = exported(module, preprocess)
    grouped, new_plan, new_table = in_columns(model, plan, table)
    onnx.checker.check_model(grouped, full_check=True)
    batch = preprocess.normalize(images(4, channels=channels))
    assert_same(model, grouped, batch)
    first = model.graph.node[0].name
    copies = 4 // stride
    assert weight(grouped, first).shape[:2] == (6 * copies, 4 * channels)
    assert np.array_equal(new_table.weight_scales[first], np.tile(table.weight_scales[first], copies))
    assert set(plan.tensors) < set(new_plan.tensors)
    assert new_table.spans.keys() == set(new_plan.tensors)


@pytest.mark.parametrize(
    "stem",
    [
        nn.Conv2d(3, 6, 3),  # 14 columns of 16: groups do not fit
        nn.Conv2d(3, 6, 3, 3, 1),
        nn.Conv2d(3, 6, 3, padding=2, dilation=2),
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
    ],
    ids=["valid", "stride-3", "dilated", "grouped"],
)
def test_a_stem_that_does_not_fit_stays(stem: nn.Conv2d) -> None:
    model, plan, table = exported(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)))
    same, new_plan, _ = in_columns(model, plan, table)
    assert new_plan == plan
    assert [node.op_type for node in same.graph.node] == [node.op_type for node in model.graph.node]


class Unit(nn.Module):
    """ShuffleNetV2's unit; `depthwise`: the one that halves the image, and reads shuffled channels depthwise."""

    def __init__(self, channels: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        inner = channels if halve else channels // 2
        stride = 2 if halve else 1
        self.one, self.two = nn.Conv2d(inner, inner, 1), nn.Conv2d(inner, inner, 3, stride, 1, groups=inner)
        self.three = nn.Conv2d(inner, inner, 1)
        self.aside = nn.Conv2d(inner, inner, 3, 2, 1, groups=inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = (x, x) if self.halve else x.chunk(2, 1)
        right = torch.relu(self.three(self.two(torch.relu(self.one(right)))))
        joined = torch.cat([torch.relu(self.aside(left)) if self.halve else left, right], 1)
        count, channels, height, width = joined.size()
        parts = joined.view(count, 2, channels // 2, height, width).transpose(1, 2)
        return parts.reshape(count, channels, height, width)


class Shuffled(nn.Module):
    """Units of 6 channels (odd halves), one that halves, units of 12, and what reads the last."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.units = nn.Sequential(*(Unit(6, False) for _ in range(3)), Unit(6, True), *(Unit(12, False) for _ in "ab"))
        self.last, self.head = last, nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.units(torch.relu(self.stem(x)))).mean((2, 3)))


def test_shuffles_vanish() -> None:
    model, plan, table = exported(Shuffled(nn.Conv2d(12, 12, 1)))
    found, new_plan, new_table = unshuffled(model, plan, table)
    onnx.checker.check_model(found, full_check=True)
    assert_same(model, found)
    assert not {node.op_type for node in found.graph.node} & {"Reshape", "Transpose"}
    assert sum(node.op_type == "Reshape" for node in model.graph.node) == 12
    made = {name for node in found.graph.node for name in node.output} - set(found.graph.output[0].name)
    assert made - {node.output[0] for node in model.graph.node} <= set(new_plan.tensors) & new_table.spans.keys()
    joined = [node for node in found.graph.node if node.op_type == "Concat"]
    for node in joined:
        spans = [new_table.spans[name] for name in node.input]
        assert new_table.spans[node.output[0]] == (min(low for low, _ in spans), max(high for _, high in spans))


def test_the_int8_file_without_shuffles_is_near() -> None:
    model, plan, _ = exported(Shuffled(nn.Conv2d(12, 12, 1)))
    table = make_table("minmax", model, plan, calibrate(model, measured(plan), PIXELS, SMALL))
    int8 = write_int8(model, plan, table)
    assert not any(attribute(node, "perm") == [0, 2, 1, 3, 4] for node in int8.graph.node)
    expected, found = (run_onnx(each.SerializeToString(), BATCH) for each in (model, int8))
    assert np.abs(found - expected).max() <= 0.05 * np.ptp(expected)


def test_a_shuffle_that_more_than_convolutions_read_stays() -> None:
    """A sigmoid of shuffled channels needs them in their order: nothing is touched."""
    model, plan, table = exported(Shuffled(nn.Sequential(nn.Sigmoid(), nn.Conv2d(12, 12, 1))))
    assert unshuffled(model, plan, table) == (model, plan, table)


def test_without_shuffles_joins_stay_as_they_are() -> None:
    class Fire(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Linear(10, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1).mean((2, 3)))

    model, plan, table = exported(Fire())
    assert unshuffled(model, plan, table) == (model, plan, table)
