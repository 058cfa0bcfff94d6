"""The choice per tensor against a slow oracle: the float network computed once more for each candidate."""

import numpy as np
import onnx
import pytest
from onnx import helper
from torch import nn

from kdedge.data.sources import open_source
from kdedge.errors import DataError
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.choose import Choice, choose_s8_spans, choose_spans_per_tensor, judged
from kdedge_export.calibration.histogram import Histogram
from kdedge_export.calibration.ranges import (
    CALIBRATORS,
    IMAGE_CALIBRATORS,
    S8_CALIBRATORS,
    Form,
    measured,
    seen,
    with_zero,
)
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.graph import Graph, constant_tensor
from kdedge_export.images import Part
from kdedge_export.sessions import open_session
from kdedge_export.table import U8, s8_scale

from .conftest import SMALL, images

Exported = tuple[nn.Module, onnx.ModelProto]


def made(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: str, outputs: str) -> onnx.ModelProto:
    """A model of opset 17 whose nodes are named after what they make."""
    for node in nodes:
        node.name = node.output[0]
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(inputs, 1, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info(outputs, 1, None)],
        [constant_tensor(name, value) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def shuffled() -> onnx.ModelProto:
    """What a ShuffleNet does between two convolutions: half of the channels goes on, then all are shuffled."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "w1": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "b1": rng.normal(size=8).astype(np.float32),
        "w2": rng.normal(size=(4, 4, 1, 1)).astype(np.float32),
        "w3": rng.normal(size=(4, 8, 1, 1)).astype(np.float32),
        "w4": rng.normal(size=(5, 4)).astype(np.float32),
        "b4": rng.normal(size=5).astype(np.float32),
        "groups": np.array([0, 2, 4, 16, 16], np.int64),
        "flat": np.array([0, 8, 16, 16], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["input", "w1", "b1"], ["conv1"], pads=[1, 1, 1, 1]),
        node("Relu", ["conv1"], ["relu1"]),
        node("Reshape", ["relu1", "groups"], ["grouped"]),
        node("Transpose", ["grouped"], ["turned"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["turned", "flat"], ["shuffled"]),
        node("Split", ["shuffled"], ["left", "right"], axis=1),
        node("Conv", ["left", "w2"], ["conv2"]),
        node("Concat", ["conv2", "right"], ["joined"], axis=1),
        node("Conv", ["joined", "w3"], ["conv3"]),
        node("GlobalAveragePool", ["conv3"], ["pooled"]),
        node("Flatten", ["pooled"], ["features"]),
        node("Gemm", ["features", "w4", "b4"], ["logits"], transB=1),
    ]
    nodes[5].name = "split"
    return made(nodes, weights, "input", "logits")


def gated() -> onnx.ModelProto:
    """A HardSwish taken apart: a convolution's output times a gate that is made of it."""
    weights = {"w1": np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["input", "w1"], ["conv1"]),
        helper.make_node("HardSigmoid", ["conv1"], ["gate"], alpha=1 / 6),
        helper.make_node("Mul", ["conv1", "gate"], ["swish"]),
    ]
    return made(nodes, weights, "input", "swish")


def outlier(weight: float) -> onnx.ModelProto:
    """A convolution of the input that weighs its green channel with `weight`."""
    weights = {"w": np.ones((4, 3, 1, 1), np.float32)}
    weights["w"][:, 1] = weight
    return made([helper.make_node("Conv", ["input", "w"], ["conv"])], weights, "input", "conv")


def values_of(model: onnx.ModelProto, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor of the model."""
    names = [name for node in model.graph.node for name in node.output]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    found = open_session(copy.SerializeToString()).run(names, {"input": batch})
    return dict(zip(names, found, strict=True)) | {"input": batch}


def convolved(model: onnx.ModelProto, node: onnx.NodeProto, error: np.ndarray) -> np.ndarray:
    """`node` alone, without its bias, on `error`."""
    weight = Graph(model).constant(node.input[1])
    assert weight is not None
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.input[:]
    alone.input.extend(["x", "w"])
    graph = helper.make_graph(
        [alone],
        "one",
        [helper.make_tensor_value_info("x", 1, error.shape)],
        [helper.make_tensor_value_info(node.output[0], 1, None)],
        [constant_tensor("w", weight)],
    )
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)
    return np.asarray(open_session(made.SerializeToString()).run(None, {"x": error})[0])


def oracle(
    model: onnx.ModelProto, plan: Plan, tensor: str, span: tuple[float, float], values: dict[str, np.ndarray]
) -> float:
    graph = Graph(model)
    total = 0.0
    for name in [tensor, *(each for each, source in plan.same_scale.items() if source == tensor)]:
        value = values[name]
        error = (U8.over(span).apply(value) - value).astype(np.float32)
        terms = set()
        for node in graph.readers(name):
            if node.op_type in ("Conv", "Gemm"):
                terms.add(share(convolved(model, node, error), values[node.output[0]]))
            elif node.op_type == "GlobalAveragePool":
                terms.add(share(error.mean((2, 3)), value.mean((2, 3))))
            elif node.op_type == "Mul":
                other = values[next(each for each in node.input if each != name)]
                terms.add(share(error * other, value * other))
            elif node.op_type == "HardSigmoid":
                gates = [np.clip(each / 6 + 0.5, 0, 1) for each in (value + error, value)]
                terms.add(share(gates[0] - gates[1], gates[1]))
            elif node.op_type not in ("MaxPool", "Flatten", "Reshape", "Transpose", "Split"):
                terms.add(share(error, value))
        total += sum(terms)
    return total


def span_of(
    model: onnx.ModelProto, plan: Plan, name: str, method: str, histograms: dict[str, Histogram]
) -> tuple[float, float]:
    return with_zero(CALIBRATORS[method](seen(plan, Graph(model), name, histograms[name])))


def share(error: np.ndarray, value: np.ndarray) -> float:
    return float((error.astype(np.float64) ** 2).sum() / (value.astype(np.float64) ** 2).sum())


def chosen(model: onnx.ModelProto, plan: Plan, count: int = 24) -> Choice:
    histograms = calibrate(model, measured(plan), images(count), SMALL)
    return choose_spans_per_tensor(model, plan, histograms, images(6), SMALL).by_values


def test_errors_are_those_of_the_readers(mobilenet_v2: Exported) -> None:
    _, model = mobilenet_v2
    plan = make_plan(model)
    found = chosen(model, plan)
    histograms = calibrate(model, measured(plan), images(24), SMALL)
    values = values_of(model, SMALL.normalize(images(6)))
    assert set(found.spans) == set(plan.tensors)
    assert set(found.methods) == set(measured(plan))
    judged = [name for name in measured(plan) if name in found.errors]
    several = [name for name in judged if len({str(each) for each in Graph(model).readers(name)}) > 1]
    assert several, "a tensor that a layer and an Add read"
    tried = [*judged[:4], several[0], judged[-1]]
    for name in tried:
        for method in found.errors[name]:
            span = span_of(model, plan, name, method, histograms)
            expected = oracle(model, plan, name, span, values)
            assert found.errors[name][method] == pytest.approx(expected, rel=1e-3), (name, method)
        best = min(found.errors[name].values())
        assert found.errors[name][found.methods[name]] == best
        assert found.spans[name] == span_of(model, plan, name, found.methods[name], histograms)


def test_images_in_any_order() -> None:
    model = shuffled()
    plan = make_plan(model)
    histograms = calibrate(model, measured(plan), images(8), SMALL)
    one, other = (
        choose_spans_per_tensor(model, plan, histograms, images(6)[order], SMALL)
        for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 1, 4, 3])
    )
    assert one == other


def test_no_images() -> None:
    with pytest.raises(DataError, match="no images to choose the ranges on"):
        judged(shuffled(), {}, images(0), SMALL)


def test_tensors_of_one_scale_are_chosen_together() -> None:
    model = shuffled()
    plan = make_plan(model)
    group = {"grouped", "turned", "shuffled", "left", "right"}
    assert {name for name, source in plan.same_scale.items() if source == "relu1"} == group
    found = chosen(model, plan, 8)
    values = values_of(model, SMALL.normalize(images(6)))
    histograms = calibrate(model, measured(plan), images(8), SMALL)
    assert set(found.errors) >= {"relu1", "conv2", "joined", "conv3", "pooled"}
    for name, errors in found.errors.items():
        for method, error in errors.items():
            span = span_of(model, plan, name, method, histograms)
            assert error == pytest.approx(oracle(model, plan, name, span, values), rel=1e-3), (name, method)
    assert {found.spans[name] for name in group} == {found.spans["relu1"]}
    assert found.to_json("left") == {}
    assert set(found.to_json("relu1")) == {"method", "errors"}


def test_a_factor_weighs_the_error() -> None:
    """Where the convolution is far below 0 the gate is 0, for both: what is clipped there is not missed."""
    model, plan = gated(), Plan(tensors=("conv1",))
    values = values_of(model, SMALL.normalize(images(6)))
    spans = {"wide": (-30.0, 30.0), "from -3": (-3.0, 30.0), "to 3": (-30.0, 3.0)}
    errors = judged(model, {"conv1": spans}, images(6), SMALL).summed
    for method, span in spans.items():
        assert errors["conv1"][method] == pytest.approx(oracle(model, plan, "conv1", span, values), rel=1e-3)
    assert errors["conv1"]["from -3"] < errors["conv1"]["wide"] < errors["conv1"]["to 3"]
    plan = Plan(tensors=("conv1",), enough={"conv1": (-3.0, np.inf)})
    histograms = calibrate(model, ["conv1"], images(24), SMALL)
    found = choose_spans_per_tensor(model, plan, histograms, images(6), SMALL)
    assert histograms["conv1"].low < -6
    assert found.by_values.spans["conv1"][0] == found.by_images.spans["conv1"][0] == -3.0


@pytest.mark.parametrize("form", ["u8", "s8"])
@pytest.mark.parametrize(("weight", "best"), [(0.0, "narrow"), (100.0, "wide")])
def test_what_no_reader_minds_is_clipped(weight: float, best: str, form: Form) -> None:
    """The same tensor and the same candidates: the readers decide."""
    pixels = images(4) // 8 + 112
    pixels[:, 3, 3, 1] = 255
    spans = {"input": {"wide": (-2.0, 2.0), "narrow": (-0.5, 0.5)}}
    for errors in judged(outlier(weight), spans, pixels, SMALL, form=form):
        assert min(errors["input"], key=errors["input"].__getitem__) == best


def test_spans_for_symmetric_codes() -> None:
    model = shuffled()
    names, followers = ["input", "relu1", "joined"], {"left": "relu1", "right": "relu1"}
    histograms = calibrate(model, names, images(24), SMALL)
    found, by_images = choose_s8_spans(model, names, followers, histograms, images(6), SMALL)
    values = values_of(model, SMALL.normalize(images(6)))
    assert set(found.spans) == set(found.methods) == set(names)
    for name in names:
        assert found.spans[name] == with_zero(S8_CALIBRATORS[found.methods[name]](histograms[name]))
        assert by_images.spans[name] == with_zero(IMAGE_CALIBRATORS[by_images.methods[name]](histograms[name]))
    span = with_zero(S8_CALIBRATORS["mse"](histograms["joined"]))
    scale = s8_scale(span)
    error = np.clip(np.rint(values["joined"] / scale), -128, 127) * scale - values["joined"]
    reader = next(node for node in model.graph.node if node.name == "conv3")
    expected = share(convolved(model, reader, error.astype(np.float32)), values["conv3"])
    assert found.errors["joined"]["mse"] == pytest.approx(expected, rel=1e-3)


def test_what_a_rare_image_needs_is_kept() -> None:
    """Three of 200 images have a bright green spot, which the two that judge have not, and which their reader minds."""
    model = outlier(1.0)
    plan = Plan(layers=frozenset({"conv"}), tensors=("input",))
    pixels = images(200) // 8 + 112
    pixels[::70, 3:6, 3:6, 1] = 255
    histograms = calibrate(model, ["input"], pixels, SMALL)
    found = choose_spans_per_tensor(model, plan, histograms, pixels[1:3], SMALL).by_values
    assert found.spans["input"][1] == pytest.approx(2.0, abs=0.1)
    assert "percentile-99.9" not in found.errors.get("input", {})
    ways = {method: way(histograms["input"]) for method, way in CALIBRATORS.items()}
    errors = judged(model, {"input": ways}, pixels[1:3], SMALL).summed["input"]
    assert ways[min(errors, key=errors.__getitem__)][1] < 1.0


def test_images_that_count_alike_are_not_outweighed() -> None:
    """One of 40 images is a thousand times as large as the others, and so is one of the six that judge."""
    node = helper.make_node
    nodes = [
        node("Mul", ["input", "input"], ["square"]),
        node("Mul", ["square", "input"], ["cube"]),
        node("Conv", ["cube", "w"], ["conv"]),
    ]
    model = made(nodes, {"w": np.ones((4, 3, 1, 1), np.float32)}, "input", "conv")
    plan = Plan(layers=frozenset({"conv"}), tensors=("cube",))
    pixels = images(46) // 32 + 116
    pixels[[3, 20]] = images(2)
    histograms = calibrate(model, ["cube"], pixels[6:], SMALL)
    by_values, by_images = choose_spans_per_tensor(model, plan, histograms, pixels[:6], SMALL)
    largest = (SMALL.normalize(pixels[21:]).astype(np.float64) ** 3).min()
    assert by_values.spans["cube"][1] - by_values.spans["cube"][0] > 4
    assert by_images.methods == {"cube": "images-95"}
    assert by_images.spans["cube"][0] == pytest.approx(largest, rel=1e-3)


def test_an_image_is_lost_once() -> None:
    """By images an error counts in units of the image's own values, and no more than all of them."""
    model = outlier(1.0)
    spans = {"input": {"wide": (-3.0, 3.0), "narrow": (-0.1, 0.1)}}
    pixels = images(4)
    found = judged(model, spans, pixels, SMALL)
    batch = SMALL.normalize(pixels)
    made = values_of(model, batch)["conv"]
    conv = model.graph.node[0]
    for method, span in spans["input"].items():
        error = convolved(model, conv, (U8.over(span).apply(batch) - batch).astype(np.float32))
        shares = [share(*pair) for pair in zip(error, made, strict=True)]
        assert found.alike["input"][method] == pytest.approx(np.mean(np.minimum(shares, 1)), rel=1e-3)
        assert found.summed["input"][method] == pytest.approx(share(error, made), rel=1e-3)


def test_equal_ranges_are_not_judged() -> None:
    ways = {"one": (0.0, 6.0), "other": (0.0, 6.0)}
    assert judged(shuffled(), {"relu1": ways}, images(2), SMALL) == ({}, {})


def test_parts_are_held_out_by_their_ids() -> None:
    source = open_source("digits")
    indices = np.arange(100, dtype=np.int64)
    part = Part("calibration", source, indices, np.full(100, -1), "sha")
    rest, held = part.hold_out()
    assert (len(rest), len(held)) == (88, 12)
    assert sorted([*rest.indices, *held.indices]) == list(indices)
    assert rest.sha256 is None
    turned = Part("calibration", source, indices[::-1].copy(), np.full(100, -1), "sha")
    assert set(turned.hold_out()[1].ids) == set(held.ids)
    assert turned.fingerprint != part.fingerprint
    assert [len(each) for each in part.hold_out(5)] == [95, 5]
    alone = Part("calibration", source, indices[:1], np.full(1, -1), "sha")
    assert [len(each) for each in alone.hold_out()] == [1, 1]
