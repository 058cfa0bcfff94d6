"""Layers compared on small graphs in which the error of one of them is planted, so its SQNR is known exactly."""

import json
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdedge.errors import DataError, ExportError
from kdedge_export.cpu.plan import make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.judging.divergence import compare_layers
from kdedge_export.table import RangeTable, natural_weight_scales

IMAGES = np.random.default_rng(0).normal(size=(4, 2, 6, 6)).astype(np.float32)
KINDS = ("Conv", "Relu", "Conv", "Relu", "Conv", "GlobalAveragePool", "Flatten")


def chain(*weights: np.ndarray, prefix: str = "") -> onnx.ModelProto:
    """input -> conv0 -> relu0 -> conv1 -> relu1 -> conv2 -> pool -> logits, 1 x 1 convolutions of two channels."""
    names = ["input", "conv0", "relu0", "conv1", "relu1", "conv2", "pool", "logits"]
    renamed = [name if name in ("input", "logits") else prefix + name for name in names]
    nodes = []
    for place, kind in enumerate(KINDS):
        extra = [f"w{names[place + 1][-1]}"] if kind == "Conv" else []
        nodes.append(helper.make_node(kind, [renamed[place], *extra], [renamed[place + 1]], name=renamed[place + 1]))
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2, 6, 6]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2]),
    ]
    constants = [numpy_helper.from_array(each.reshape(2, 2, 1, 1), f"w{i}") for i, each in enumerate(weights)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


EYE = np.eye(2, dtype=np.float32)
FLOAT = chain(EYE, EYE, EYE)


def test_equal_files_do_not_diverge() -> None:
    found = compare_layers(FLOAT, FLOAT, [IMAGES])
    assert [each.tensor for each in found.layers] == ["conv0", "relu0", "conv1", "relu1", "conv2", "pool", "logits"]
    assert {each.sqnr_db for each in found.layers} == {120.0}
    assert (found.first, found.images) == (None, 4)
    assert "no layer diverges" in found.text()


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_the_layer_that_errs_is_found(broken: int) -> None:
    """Its weight is off by a half: noise has a quarter of the signal's power, 6.02 dB; all behind inherits it."""
    weights = [EYE, EYE, EYE]
    weights[broken] = 1.5 * EYE
    found = compare_layers(FLOAT, chain(*weights), [IMAGES])
    assert found.first is not None
    assert found.first.tensor == found.steepest.tensor == f"conv{broken}"
    assert found.first.sqnr_db == pytest.approx(20 * math.log10(2), abs=1e-4)
    assert found.first.fall_db == pytest.approx(120 - 20 * math.log10(2), abs=1e-4)
    place = next(i for i, each in enumerate(found.layers) if each.tensor == f"conv{broken}")
    assert all(each.sqnr_db == 120.0 for each in found.layers[:place])
    assert all(each.fall_db == pytest.approx(0, abs=1e-3) for each in found.layers[place + 1 :])
    assert f"the first layer to diverge is conv{broken} (Conv, 6.0 dB" in found.text()


def test_the_threshold_and_the_steepest_fall_are_two_things() -> None:
    """A large fall early that stays above the threshold, and a small one behind it that crosses it."""
    weights = [np.float32(1.05) * EYE, EYE, np.float32(1.15) * EYE]
    found = compare_layers(FLOAT, chain(*weights), [IMAGES], threshold_db=14.5)
    assert found.steepest.tensor == "conv0"
    assert found.first is not None
    assert found.first.tensor == "conv2"
    assert found.first.sqnr_db == pytest.approx(-20 * math.log10(1.05 * 1.15 - 1), abs=1e-3)
    document = found.to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["first_to_diverge"]["tensor"], document["steepest_fall"]["tensor"]) == ("conv2", "conv0")


def test_any_number_of_images_at_a_time() -> None:
    other = chain(EYE, 1.5 * EYE, EYE)
    whole = compare_layers(FLOAT, other, [IMAGES])
    single = compare_layers(FLOAT, other, [IMAGES[i : i + 1] for i in range(4)])
    assert whole == single


def test_an_int8_file_is_compared_where_it_is_rounded() -> None:
    """By hand: the rounding of the input, and of the Conv with its absorbed Relu."""
    plan = make_plan(FLOAT)
    spans = {name: (0.0 if name.startswith("relu") else -4.0, 4.0) for name in plan.tensors}
    table = RangeTable(spans, natural_weight_scales(FLOAT, plan.layers))
    found = compare_layers(FLOAT, write_int8(FLOAT, plan, table), [IMAGES])
    sqnr = {each.tensor: each.sqnr_db for each in found.layers}
    assert "conv0" not in sqnr, "absorbed: the INT8 file has no such tensor"
    rounded = table.u8("input").apply(IMAGES)
    noise = ((rounded - IMAGES) ** 2).sum()
    assert sqnr["input"] == pytest.approx(10 * math.log10((IMAGES.astype(float) ** 2).sum() / noise), abs=1e-3)
    true = np.maximum(IMAGES, 0)
    noise = ((table.u8("relu0").apply(np.maximum(rounded, 0)) - true) ** 2).sum()
    assert sqnr["relu0"] == pytest.approx(10 * math.log10((true.astype(float) ** 2).sum() / noise), abs=0.1)
    assert next(each for each in found.layers if each.tensor == "relu0").fall_db == pytest.approx(
        sqnr["input"] - sqnr["relu0"]
    )


def test_padded_channels_are_cut_and_other_shapes_left_out() -> None:
    """conv0 gets two channels of zeros behind its own; relu0 too; in conv1 they meet zero weights."""
    padded = chain(EYE, EYE, EYE)
    del padded.graph.initializer[:2]
    wide, narrow = np.zeros((4, 2, 1, 1), np.float32), np.zeros((2, 4, 1, 1), np.float32)
    wide[:2, :, 0, 0], narrow[:, :2, 0, 0] = EYE, EYE
    padded.graph.initializer.extend([numpy_helper.from_array(wide, "w0"), numpy_helper.from_array(narrow, "w1")])
    found = compare_layers(FLOAT, padded, [IMAGES])
    assert {each.sqnr_db for each in found.layers} == {120.0}
    strided = chain(EYE, EYE, EYE)
    strided.graph.node[4].attribute.append(helper.make_attribute("strides", [2, 2]))
    found = compare_layers(FLOAT, strided, [IMAGES])
    assert "conv2" not in {each.tensor for each in found.layers}


def test_channels_in_another_order_are_no_divergence() -> None:
    """The other file swaps the channels of conv0 and relu0, and conv1 knows: two tensors that look like noise."""
    swap = EYE[::-1].copy()
    found = compare_layers(FLOAT, chain(swap, swap, EYE), [IMAGES])
    assert [each.tensor for each in found.layers] == ["conv1", "relu1", "conv2", "pool", "logits"]
    assert {each.sqnr_db for each in found.layers} == {120.0}
    lost = compare_layers(FLOAT, chain(swap, EYE, EYE), [IMAGES])  # the same, but conv1 does not know
    assert lost.first is not None
    assert lost.first.tensor == "conv0"


def test_broken_numbers_are_the_worst_and_stay_json() -> None:
    found = compare_layers(FLOAT, chain(EYE, np.float32(np.nan) * EYE, EYE), [IMAGES])
    assert found.first is not None
    assert (found.first.tensor, found.first.sqnr_db) == ("conv1", -120.0)
    json.dumps(found.to_json(), allow_nan=False)


def test_refusals() -> None:
    with pytest.raises(DataError, match="no images to compare layers on"):
        compare_layers(FLOAT, FLOAT, [])
    stranger = chain(EYE, EYE, EYE, prefix="other_")
    stranger.graph.node[-1].output[0] = "scores"
    stranger.graph.output[0].name = "scores"
    with pytest.raises(ExportError, match="no tensor in common"):
        compare_layers(FLOAT, stranger, [IMAGES])
