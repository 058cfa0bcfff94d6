"""Opset 18 -> 17: the same numbers, and a refusal where there is no same form."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdedge.errors import ExportError
from kdedge_export.cpu.lint import lint_float
from kdedge_export.float_form.rewrite import to_opset_17
from kdedge_export.sessions import run_onnx

X = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)


def model_18(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], output: list[object]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 5, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", *output])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    for node in nodes:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/home/someone/model.py")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def same(model: onnx.ModelProto) -> onnx.ModelProto:
    rewritten = to_opset_17(model)
    onnx.checker.check_model(rewritten, full_check=True)
    assert lint_float(rewritten) == []
    assert b"/home/someone" not in rewritten.SerializeToString()
    expected, found = (run_onnx(each.SerializeToString(), X) for each in (model, rewritten))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    return rewritten


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("axes", [[2, 3], [-2, -1], [3, 2]])
def test_mean_over_the_image_becomes_a_global_pooling(axes: list[int]) -> None:
    nodes = [helper.make_node("ReduceMean", ["input", "axes"], ["logits"], keepdims=1)]
    assert operators(same(model_18(nodes, {"axes": np.array(axes)}, [4, 1, 1]))) == ["GlobalAveragePool"]
    nodes = [helper.make_node("ReduceMean", ["input", "axes"], ["logits"], keepdims=0)]
    assert operators(same(model_18(nodes, {"axes": np.array(axes)}, [4]))) == ["GlobalAveragePool", "Flatten"]


def test_another_mean_keeps_its_axes_as_an_attribute() -> None:
    nodes = [helper.make_node("ReduceMean", ["input", "axes"], ["logits"], keepdims=0)]
    rewritten = same(model_18(nodes, {"axes": np.array([1])}, [5, 6]))
    assert operators(rewritten) == ["ReduceMean"]
    assert list(rewritten.graph.node[0].input) == ["input"]
    assert not rewritten.graph.initializer, "the axes are not left behind"


def test_every_reduction_has_its_axes_as_an_attribute() -> None:
    nodes = [helper.make_node("ReduceMax", ["input", "axes"], ["logits"], keepdims=0)]
    rewritten = same(model_18(nodes, {"axes": np.array([-1, 2])}, [4]))
    assert list(rewritten.graph.node[0].input) == ["input"]
    assert onnx.helper.get_attribute_value(rewritten.graph.node[0].attribute[0]) == [2, 3]


def test_a_pooling_over_one_pixel_is_left_out() -> None:
    pools = [
        helper.make_node("Relu", ["input"], ["relu"]),
        helper.make_node("MaxPool", ["relu"], ["same"], kernel_shape=[1, 1], strides=[1, 1]),
        helper.make_node("MaxPool", ["same"], ["fewer"], kernel_shape=[1, 1], strides=[2, 2]),
        helper.make_node("Sigmoid", ["fewer"], ["logits"]),
    ]
    assert operators(same(model_18(pools, {}, [4, 3, 3]))) == ["Relu", "MaxPool", "Sigmoid"]


def test_reshape_behind_a_pooling_becomes_flatten() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=1),
        helper.make_node("Reshape", ["mean", "shape"], ["logits"], allowzero=1),
    ]
    constants = {"axes": np.array([2, 3]), "shape": np.array([-1, 4])}
    assert operators(same(model_18(nodes, constants, [4]))) == ["GlobalAveragePool", "Flatten"]


def test_split_loses_num_outputs_where_parts_are_equal() -> None:
    def split(axis: int, parts: int) -> onnx.ModelProto:
        names = [f"part{i}" for i in range(parts)]
        nodes = [
            helper.make_node("Relu", ["input"], ["relu"]),
            helper.make_node("Split", ["relu"], names, axis=axis, num_outputs=parts),
            helper.make_node("Concat", [*reversed(names)], ["logits"], axis=axis),
        ]
        return model_18(nodes, {}, [4, 5, 6])

    assert "Split" in operators(same(split(1, 2)))
    model = split(1, 2)
    model.graph.node[1].input[0] = "input"
    del model.graph.node[0]
    assert operators(same(model)) == ["Split", "Concat"]
    with pytest.raises(ExportError, match="equal parts"):
        to_opset_17(split(2, 2))


def test_what_opset_17_lacks_is_refused_by_name() -> None:
    nodes = [helper.make_node("Mish", ["input"], ["logits"])]
    with pytest.raises(ExportError, match=r"operator Mish .* opset 17"):
        to_opset_17(model_18(nodes, {}, [4, 5, 6]))
    nodes = [helper.make_node("Pad", ["input", "pads", "", "axes"], ["logits"])]
    with pytest.raises(ExportError, match=r"operator Pad .* opset 17"):
        to_opset_17(model_18(nodes, {"pads": np.array([1, 1]), "axes": np.array([2])}, [4, 7, 6]))
    nodes = [helper.make_node("FastGelu", ["input"], ["logits"], domain="com.microsoft")]
    model = model_18(nodes, {}, [4, 5, 6])
    with pytest.raises(ExportError, match=r"com\.microsoft\.FastGelu is not part of ONNX"):
        to_opset_17(model)


def test_names_follow_the_layers() -> None:
    weight = np.ones((2, 4, 1, 1), np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "stem.0.weight"], ["getitem_7"]),
        helper.make_node("Relu", ["getitem_7"], ["relu_3"]),
        helper.make_node("Conv", ["relu_3", "stem.1.weight"], ["logits"]),
    ]
    constants = {"stem.0.weight": weight, "stem.1.weight": np.ones((2, 2, 1, 1), np.float32)}
    rewritten = same(model_18(nodes, constants, [2, 5, 6]))
    assert [node.name for node in rewritten.graph.node] == ["stem.0", "Relu_1", "stem.1"]
    assert [node.output[0] for node in rewritten.graph.node] == ["stem.0", "Relu_1", "logits"]


def test_no_name_is_given_twice() -> None:
    """A layer may be called what the next node without one would have been called."""
    nodes = [
        helper.make_node("Conv", ["input", "Conv_1.weight"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"]),
        helper.make_node("Split", ["b"], ["c", "d"], axis=1, num_outputs=2),
        helper.make_node("Conv", ["c", "Split_2:1.weight"], ["e"]),
        helper.make_node("Add", ["d", "e"], ["logits"]),
    ]
    shapes = {"Conv_1.weight": (2, 4, 1, 1), "w": (2, 2, 1, 1), "Split_2:1.weight": (1, 1, 1, 1)}
    constants = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    rewritten = same(model_18(nodes, constants, [1, 5, 6]))
    assert [node.name for node in rewritten.graph.node] == ["Conv_1", "Conv_1_2", "Split_2", "Conv_3", "Add_4"]
    made = [name for node in rewritten.graph.node for name in node.output]
    assert len({*made}) == len(made) == 6
