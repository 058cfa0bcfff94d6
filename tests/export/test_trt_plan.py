"""Where TensorRT's files carry Q/DQ, and why not elsewhere."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.graph import Graph
from kdedge_export.table import RangeTable
from kdedge_export.trt.plan import make_trt_plan
from kdedge_export.trt.qdq import write_trt
from kdedge_export.trt.rules import Pooled, why_weighted_float

from .conftest import CLASSES, SMALL
from .trt_toys import FLOAT_LAYERS, make_toy


def test_the_places_of_every_kind_of_layer() -> None:
    _, model, plan, _ = make_toy()
    graph = Graph(model)
    made_by = {name: graph.producer[name].op_type if name != "input" else "" for name in plan.tensors}
    # In the order of trt_toys.SITES: what stands behind an activation is quantized behind it.
    assert list(made_by.values()) == [
        *[
            "",
            "Relu",
            "Relu",
            "Relu",
            "Relu",
            "Conv",
            "Mul",
            "Split",
            "Split",
            "Relu",
            "Concat",
            "Reshape",
            "Relu",
            "Relu",
        ]
    ]
    assert {name for name in plan.kept_float if name in dict(make_toy()[0].named_children())} == set(FLOAT_LAYERS)
    assert plan.kept_float["excite"] == "it belongs to a squeeze-and-excitation gate"
    assert plan.kept_float["lone"] == "its 12 channels in groups are no multiple of 8"
    assert plan.kept_float["head"] == "at batch 1 it is a matrix times one vector"
    rest = {node.op_type for node in graph.nodes if node.name in plan.kept_float} - {"Conv", "Gemm"}
    assert rest == {"GlobalAveragePool", "Relu", "Sigmoid", "Mul"}, "the gate, and the activation behind a float layer"
    adds = [node for node in graph.nodes if node.op_type == "Add"]
    assert [adds[0].input[plan.reads[adds[0].name][0]], adds[1].input[plan.reads[adds[1].name][0]]] == [
        graph.producer["deep"].input[0],
        "short",
    ]


def test_what_is_joined_has_one_scale_that_holds_all() -> None:
    _, model, plan, table = make_toy()
    concat = next(node for node in model.graph.node if node.op_type == "Concat")
    (group,) = plan.groups
    assert set(group) == {plan.same_scale.get(name, name) for name in (*concat.input, *concat.output)}
    wider = table.with_spans({group[1]: (-50.0, 20.0)})
    scales = plan.scales(wider)
    assert {scales[name] for name in (*concat.input, *concat.output)} == {np.float32(50 / 127).item()}
    moved = [name for name in plan.tensors if plan.same_scale.get(name) in group]
    assert len(moved) == 3, "two halves and the shuffled tensor"
    assert {scales[name] for name in moved} == {np.float32(50 / 127).item()}


def test_leaving_a_layer_in_float_needs_no_new_calibration() -> None:
    """Any layer, one at a time: the whole plan's table has all that is asked for."""
    _, model, whole, table = make_toy()
    for name in sorted(whole.layers):
        plan = make_trt_plan(model, frozenset([name]))
        assert set(plan.measured) <= set(whole.measured), name
        assert name not in plan.layers or name in whole.kept_float or graph_moves(model, name)
        assert set(plan.scales(table)) == set(plan.tensors)
    write_trt(model, make_trt_plan(model, frozenset(["down2", "mix"])), table)


def graph_moves(model: onnx.ModelProto, name: str) -> bool:
    """Reshape, Split: they follow what stands around them."""
    return next(node for node in model.graph.node if node.name == name).op_type in ("Reshape", "Split")


def test_the_switches() -> None:
    _, model, plan, _ = make_toy()
    pool = [node.name for node in model.graph.node if node.op_type == "GlobalAveragePool"][-1]
    assert pool in plan.layers
    assert make_trt_plan(model, pools=False).kept_float[pool] == "poolings are left in float by choice"
    assert "head" not in make_trt_plan(model, batch=8).layers, "ten rows are too few for tensor cores"

    class Swish(nn.Sequential):
        def __init__(self) -> None:
            layers = nn.Conv2d(3, 16, 3), nn.Hardswish(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(2304, 16)
            super().__init__(*layers)

    torch.manual_seed(0)
    model = export_float(Swish().eval(), SMALL, CLASSES)
    swish = next(node for node in model.graph.node if node.op_type == "HardSwish")
    assert make_trt_plan(model).kept_float[swish.name].startswith("8 bits in front of HardSwish")
    plan = make_trt_plan(model, hard_swish=True, batch=8)
    assert plan.tensors == ("input", "0", swish.output[0], plan.tensors[3])
    assert set(plan.layers) == {"0", swish.name, "2", "4"}
    table = RangeTable(dict.fromkeys(plan.measured, (-1.0, 1.0)), {name: np.ones(16, np.float32) for name in "024"})
    write_trt(model, plan, table)


def layer(kind: str, shape: tuple[int, ...], first: bool = False, batch: int = 1, **attributes: int) -> str:
    """The verdict on one layer with a weight of `shape`."""
    nodes = [helper.make_node("Relu", ["input"], ["x"], name="relu")]
    nodes.append(helper.make_node(kind, ["input" if first else "x", "w"], ["y"], name="layer", **attributes))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("input", 1, None)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.zeros(shape, np.float32), "w")],
    )
    view = Graph(helper.make_model(graph))
    return why_weighted_float(view.nodes[1], view, Pooled(view), batch)


@pytest.mark.parametrize(
    ("shape", "options", "told"),
    [
        ((16, 16, 1, 1), {}, ""),
        ((58, 58, 1, 1), {}, ""),  # ShuffleNetV2: with 16 and more on both sides any number will do
        ((24, 3, 3, 3), {"first": True}, ""),
        ((12, 3, 3, 3), {"first": True}, "neither its 3 input nor its 12 output channels are a multiple of 8"),
        ((8, 8, 3, 3), {}, "fewer than 16"),
        ((8, 8, 3, 3), {"first": True}, ""),
        ((8, 16, 1, 1), {}, ""),
        ((16, 12, 3, 1), {}, "not square"),
        ((32, 1, 3, 3), {"group": 32}, ""),
        ((32, 1, 5, 5), {"group": 32}, ""),
        ((58, 1, 3, 3), {"group": 58}, "58 channels in groups are no multiple of 8"),
        ((32, 1, 1, 3), {"group": 32}, "kernel is below 3"),
        ((48, 24, 1, 1), {"group": 2}, ""),
    ],
)
def test_small_convolutions_stay_float(shape: tuple[int, ...], options: dict[str, int], told: str) -> None:
    found = layer("Conv", shape, **options)
    assert (told in found) if told else found == ""


def test_small_products_and_transposed_convolutions() -> None:
    assert layer("Gemm", (100, 64), transB=1) == "at batch 1 it is a matrix times one vector"
    assert layer("Gemm", (100, 64), transB=1, batch=8) == ""
    assert "10 rows or columns are too few" in layer("Gemm", (10, 64), transB=1, batch=8)
    assert "x W^T + b" in layer("Gemm", (64, 100), batch=8)
    assert layer("ConvTranspose", (16, 8, 2, 2)) == ""
    assert "two axes" in layer("ConvTranspose", (16, 8, 2, 2), group=2)


class Upsampled(nn.Module):
    """A transposed convolution, a residual pooling, and two sums that nothing can be fused with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.up, self.head = nn.ConvTranspose2d(16, 24, 2, stride=2), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.stem(x))
        total = torch.relu(self.branch(stem) + nn.functional.max_pool2d(stem, 2))
        total = total + torch.sigmoid(total)
        return self.head((self.up(total) + 1.0).mean((2, 3)))


def test_a_pooling_in_the_skip_and_sums_without_a_branch() -> None:
    torch.manual_seed(0)
    model = export_float(Upsampled().eval(), SMALL, CLASSES)
    plan = make_trt_plan(model)
    pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
    assert pool.name in plan.layers
    assert plan.same_scale == {pool.output[0]: pool.input[0]}
    adds = [node.name for node in model.graph.node if node.op_type == "Add"]
    assert [name in plan.layers for name in adds] == [True, False, False]
    assert plan.kept_float[adds[2]] == "no quantized convolution of its own ends in it"
    transposed = next(node.name for node in model.graph.node if node.op_type == "ConvTranspose")
    assert transposed in plan.weighted
    scales = {name: np.full(16, 0.01, np.float32) for name in plan.weighted} | {
        transposed: np.full(24, 0.01, np.float32)
    }
    written = write_trt(model, plan, RangeTable(dict.fromkeys(plan.measured, (-4.0, 4.0)), scales))
    pair = [node for node in written.graph.node if node.name.startswith(f"{transposed}.weight_rounded")]
    assert [(node.op_type, node.attribute[0].i) for node in pair] == [("QuantizeLinear", 1), ("DequantizeLinear", 1)]
