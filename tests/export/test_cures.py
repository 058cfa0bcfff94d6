"""Cures: each against a slow independent version, or a defect that was planted for it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional

from kdedge.errors import ExportError
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.cpu_form import cpu_form
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.cures.adaround import adaround
from kdedge_export.cures.bias_correction import correct_bias
from kdedge_export.cures.cure import BY_CHANNEL, Cured, cure, partly_float
from kdedge_export.cures.equalize import MARGIN, equalize, pairs, peaks
from kdedge_export.cures.sensitivity import divergences, sensitivity, units
from kdedge_export.cures.taps import run, set_constant, tap
from kdedge_export.cures.walk import spread, weighted_layers
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.graph import Graph
from kdedge_export.table import U8, RangeTable

from .conftest import CLASSES, SMALL, images, warm

Batches = list[np.ndarray]


class Small(nn.Module):
    """Stem, depthwise, projection with a skip, a grouped strided layer, a head: every kind of weight once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU())
        self.narrow = nn.Conv2d(16, 8, 1, bias=False)
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(8, 32, 3, stride=2, groups=2), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.narrow(self.deep(self.stem(x)))
        return self.head(self.grouped(narrow + self.wide(narrow)).mean((2, 3)))


@pytest.fixture(scope="module")
def batches() -> Batches:
    """40 images in batches of 16, 16 and 8."""
    normal = SMALL.normalize(images(40))
    return [normal[:16], normal[16:32], normal[32:]]


@pytest.fixture(scope="module")
def small(batches: Batches) -> onnx.ModelProto:
    torch.manual_seed(0)
    return export_float(warm(Small(), torch.from_numpy(batches[0])), SMALL, CLASSES)


def table_of(model: onnx.ModelProto, plan: Plan | None = None) -> RangeTable:
    plan = plan or make_plan(model)
    return make_table("minmax", model, plan, calibrate(model, measured(plan), images(40), SMALL))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(each for each in model.graph.node if each.name == name)


def value(model: onnx.ModelProto, name: str, place: int = 1) -> np.ndarray:
    found = Graph(model).constant(node(model, name).input[place])
    assert found is not None
    return found


def altered(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray], place: int = 1) -> None:
    set_constant(model, node(model, name), place, change(value(model, name, place)))


# Cross-layer equalization


def uneven(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The same function with the channels behind the depthwise layer up to 200 times apart: the planted defect."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    factors = np.exp(rng.uniform(np.log(0.005), 0, 16)).astype(np.float32)
    altered(copy, "deep.0", lambda w: w * factors[:, None, None, None])
    altered(copy, "deep.0", lambda b: b * factors, place=2)
    altered(copy, "narrow", lambda w: w / factors[:, None, None])
    return copy


def test_equalization_keeps_the_values_and_evens_the_channels(small: onnx.ModelProto, batches: Batches) -> None:
    planted = uneven(small, np.random.default_rng(1))
    equal = equalize(planted, batches)
    before, after = run(planted, batches), run(equal, batches)
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()
    assert [each.name for each in equal.graph.node] == [each.name for each in planted.graph.node]
    assert make_plan(equal) == make_plan(planted)
    between = node(planted, "narrow").input[0]
    spreads = [np.log(peaks(model, [between], batches)[between]).std() for model in (planted, equal)]
    assert spreads[1] < 0.6 * spreads[0]


def test_equalization_brings_int8_nearer_to_float(small: onnx.ModelProto, batches: Batches) -> None:
    planted = uneven(small, np.random.default_rng(1))
    fp32 = run(small, batches)

    def error(model: onnx.ModelProto) -> float:
        return float(np.abs(run(write_int8(model, make_plan(model), table_of(model)), batches) - fp32).mean())

    assert error(equalize(planted, batches)) < 0.6 * error(planted)


def test_pairs_are_those_whose_channels_nobody_else_reads(small: onnx.ModelProto) -> None:
    found = {(each.first, each.second): each for each in pairs(small)}
    assert set(found) == {("stem.0", "deep.0"), ("deep.0", "narrow"), ("grouped.0", "head")}, "no residual branch"
    assert found["stem.0", "deep.0"].depthwise
    assert found["stem.0", "deep.0"].limit == 6.0
    assert found["deep.0", "narrow"].limit == np.inf


def test_a_channel_that_reaches_the_clip_is_left_alone(small: onnx.ModelProto, batches: Batches) -> None:
    planted = onnx.ModelProto()
    planted.CopyFrom(small)
    louder = np.where(np.arange(16) < 4, 20.0, 0.3).astype(np.float32)
    altered(planted, "stem.0", lambda w: w * louder[:, None, None, None])
    altered(planted, "stem.0", lambda b: b * louder, place=2)
    between = node(planted, "deep.0").input[0]
    equal = equalize(planted, batches)
    before, after = (peaks(model, [between], batches)[between] for model in (planted, equal))
    full = before >= 6.0 / MARGIN
    assert full[:4].all()
    assert not full.all()
    np.testing.assert_array_equal(value(equal, "stem.0")[full], value(planted, "stem.0")[full])
    assert (after[~full] <= 6.0 / MARGIN + 1e-4).all()
    assert (after[~full] > before[~full]).any()
    assert np.abs(run(equal, batches) - run(planted, batches)).max() <= 1e-4 * np.abs(run(planted, batches)).max()


def test_shared_weights_stay_those_of_the_other_layer() -> None:
    """Two layers with one weight: what is changed for one must not change the other."""
    weight = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="a"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="b"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 2, 4, 4])],
        [helper.make_tensor_value_info("b", 1, ["n", 2, 4, 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    set_constant(model, model.graph.node[0], 1, np.full((2, 2, 1, 1), 3.0))
    assert value(model, "a").max() == 3.0
    assert value(model, "b").max() == 1.0
    onnx.checker.check_model(model, full_check=True)


# Bias correction


def slow_network(model: onnx.ModelProto, plan: Plan, table: RangeTable, x: np.ndarray) -> dict[str, np.ndarray]:
    """What the layers of Small make in the quantized network, before rounding: by hand, in float64, layer by layer."""

    def rounded(name: str, values: np.ndarray) -> np.ndarray:
        return table.u8(plan.same_scale.get(name, name)).apply(values)

    def bias_of(name: str, scales: np.ndarray) -> np.ndarray:
        each = node(model, name)
        if len(each.input) < 3 or not each.input[2]:
            return np.zeros(len(scales))
        unit = table.u8(plan.same_scale.get(each.input[0], each.input[0])).scale * scales
        return np.rint(value(model, name, 2) / unit) * unit

    def layer(name: str, read: np.ndarray, stride: int = 1, padding: int = 0, groups: int = 1) -> np.ndarray:
        scales = table.weight_scales[name].astype(np.float64)
        weight = value(model, name)
        codes = np.clip(np.rint(weight / scales.reshape(-1, *[1] * (weight.ndim - 1)).astype(np.float32)), -127, 127)
        weight = codes * scales.reshape(-1, *[1] * (weight.ndim - 1))
        bias = bias_of(name, scales)
        if weight.ndim == 2:
            return read @ weight.T + bias
        tensors = (torch.from_numpy(np.asarray(each, np.float64)) for each in (read, weight, bias))
        return functional.conv2d(*tensors, stride, padding, 1, groups).numpy()

    made: dict[str, np.ndarray] = {}
    made["stem.0"] = layer("stem.0", rounded("input", x), padding=1)
    made["deep.0"] = layer("deep.0", rounded(node(model, "deep.0").input[0], made["stem.0"]), padding=1, groups=16)
    made["narrow"] = layer("narrow", rounded(node(model, "narrow").input[0], made["deep.0"]))
    narrow = rounded("narrow", made["narrow"])
    made["wide.0"] = layer("wide.0", narrow)
    total = narrow + rounded(Graph(model).only_reader("wide.0").output[0], made["wide.0"])  # type: ignore[union-attr]
    made["grouped.0"] = layer("grouped.0", rounded(node(model, "grouped.0").input[0], total), stride=2, groups=2)
    pooled = rounded(Graph(model).only_reader("grouped.0").output[0], made["grouped.0"]).mean((2, 3))  # type: ignore[union-attr]
    made["head"] = layer("head", rounded(node(model, "head").input[0], pooled))
    return made


def means(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean(tuple(axis for axis in range(values.ndim) if axis != 1)))


def coarse(table: RangeTable, times: float) -> RangeTable:
    """The planted defect: weights that keep few of their 127 steps, so that rounding shifts every mean."""
    return RangeTable(table.spans, {name: scales * np.float32(times) for name, scales in table.weight_scales.items()})


def test_every_layer_has_its_float_mean_again(small: onnx.ModelProto, batches: Batches) -> None:
    plan, table = make_plan(small), coarse(table_of(small), 12)
    whole = np.concatenate(batches)
    names = [each.name for each in weighted_layers(small, plan)]
    assert len(names) == 6
    wanted = {
        name: np.concatenate([each[name] for each in tap(small, [name], batches)]) for name in names if name != "head"
    }
    wanted["head"] = run(small, batches)
    corrected = correct_bias(small, plan, table, batches)
    before, after = (slow_network(model, plan, table, whole) for model in (small, corrected))
    for name in names:
        off = [np.abs(means(found[name]) - means(wanted[name])).max() for found in (before, after)]
        source = node(small, name).input[0]
        unit = table.u8(plan.same_scale.get(source, source)).scale * table.weight_scales[name].max()
        assert off[1] <= 0.5 * unit + 0.001 * wanted[name].std(), f"{name}: biases are whole numbers of {unit}"
        assert off[0] >= 5 * off[1], name
    assert np.abs(value(corrected, "narrow") - value(small, "narrow")).max() == 0, "weights are not touched"
    assert len(node(small, "narrow").input) == 2 or not node(small, "narrow").input[2], "it had no bias"
    assert len(value(corrected, "narrow", 2)) == 8, "and was given one"


def test_bias_correction_brings_int8_nearer_to_float(small: onnx.ModelProto, batches: Batches) -> None:
    plan, table = make_plan(small), coarse(table_of(small), 12)
    fp32 = run(small, batches)
    models = small, correct_bias(small, plan, table, batches)
    found = [np.abs(run(write_int8(each, plan, table), batches) - fp32).mean() for each in models]
    assert found[1] < 0.7 * found[0]


def test_images_that_ranges_cut_down_are_not_corrected_for(small: onnx.ModelProto, batches: Batches) -> None:
    """Two images are forty times as large as ranges are: biases stay those of the others."""
    plan, table = make_plan(small), coarse(table_of(small), 12)
    some = np.concatenate(batches)
    large = np.concatenate([some, 40 * some[:2]])
    one, other = (correct_bias(small, plan, table, [each]) for each in (some, large))
    before = [value(small, name, 2) for name in ("stem.0", "wide.0", "grouped.0")]
    after = [[value(each, name, 2) for name in ("stem.0", "wide.0", "grouped.0")] for each in (one, other)]
    for float_bias, alone, beside in zip(before, *after, strict=True):
        assert np.abs(alone - float_bias).max() > 0
        assert np.allclose(alone, beside, atol=1e-6)


def test_an_altered_model_is_corrected_towards_its_reference(small: onnx.ModelProto, batches: Batches) -> None:
    plan, table = make_plan(small), table_of(small)
    shifted = onnx.ModelProto()
    shifted.CopyFrom(small)
    altered(shifted, "wide.0", lambda b: b + 1, place=2)
    back = correct_bias(shifted, plan, table, batches, reference=small)
    assert np.abs(value(back, "wide.0", 2) - value(small, "wide.0", 2)).max() < 0.05


# AdaRound


def correlated(seed: int = 0) -> tuple[onnx.ModelProto, Batches]:
    """One layer whose inputs nearly agree: the roundings of its weights should cancel, which the nearest do not."""
    rng = np.random.default_rng(seed)
    common = rng.uniform(0.5, 1, (64, 1, 4, 4))
    x = (common + 0.02 * rng.standard_normal((64, 16, 4, 4))).astype(np.float32)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((8, 16, 1, 1), (10, 8, 1, 1))]
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], name="a"),
        helper.make_node("Relu", ["a"], ["r"], name="r"),
        helper.make_node("Conv", ["r", "b.weight"], ["logits"], name="b"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", 1, ["n", 16, 4, 4])],
        [helper.make_tensor_value_info("logits", 1, ["n", 10, 4, 4])],
        [numpy_helper.from_array(each, f"{name}.weight") for name, each in zip("ab", weights, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), [x[:32], x[32:]]


def table_for(model: onnx.ModelProto, plan: Plan, steps: int) -> RangeTable:
    """Weights of `steps` steps to each side, inputs in fine ones."""
    found = {
        each.name: np.abs(value(model, each.name)).reshape(len(value(model, each.name)), -1).max(1) / steps
        for each in weighted_layers(model, plan)
    }
    return RangeTable(dict.fromkeys(plan.tensors, (0.0, 4.0)), {k: v.astype(np.float32) for k, v in found.items()})


def output_error(model: onnx.ModelProto, rounded: onnx.ModelProto, table: RangeTable, x: np.ndarray) -> float:
    """Of the first layer, behind its Relu, by hand."""
    read = U8.over(table.spans["input"]).apply(x)
    scales = table.weight_scales["a"].astype(np.float64)[:, None, None, None]
    weight = np.rint(value(rounded, "a") / scales) * scales
    bias = value(rounded, "a", 2)[:, None, None] if len(node(rounded, "a").input) > 2 else 0.0
    made = np.maximum(np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], read) + bias, 0)
    wanted = np.maximum(np.einsum("oi,nihw->nohw", value(model, "a")[:, :, 0, 0], x), 0)
    return float(((made - wanted) ** 2).mean())


def test_adaround_beats_the_nearest_where_inputs_are_correlated() -> None:
    model, batches = correlated()
    plan = make_plan(model)
    table = table_for(model, plan, steps=7)
    fresh = correlated()[1][1]
    found = adaround(model, plan, table, batches, steps=300)
    by_nearest = correct_bias(model, plan, table, batches)
    assert output_error(model, found, table, fresh) < 0.5 * output_error(model, by_nearest, table, fresh)
    assert output_error(model, found, table, fresh) < 0.2 * output_error(model, model, table, fresh)


@pytest.mark.parametrize("steps", [7, 127])
def test_adaround_moves_no_weight_by_more_than_a_code(small: onnx.ModelProto, batches: Batches, steps: int) -> None:
    """Depthwise, grouped, strided and linear layers; the weights are whole multiples of the table's scales."""
    plan = make_plan(small)
    table = RangeTable(table_of(small).spans, table_for(small, plan, steps).weight_scales)
    found = adaround(small, plan, table, batches, steps=20)
    moved = 0
    for each in weighted_layers(small, plan):
        weight, scales = value(small, each.name), table.weight_scales[each.name]
        shape = (-1, *[1] * (weight.ndim - 1))
        quotient = value(found, each.name) / scales.reshape(shape)
        codes, nearest = np.rint(quotient), np.rint(weight / scales.reshape(shape))
        np.testing.assert_array_equal(value(found, each.name), (codes * scales.reshape(shape)).astype(np.float32))
        assert np.abs(codes).max() <= 127
        assert np.abs(codes - nearest).max() <= 1
        moved += int((codes != nearest).sum())
    assert moved > 10
    again = adaround(small, plan, table, batches, steps=20)
    assert again.SerializeToString() == found.SerializeToString(), "the same for the same images"


def test_every_kind_of_layer_is_sampled_as_it_computes(small: onnx.ModelProto, batches: Batches) -> None:
    """AdaRound's unfolded layer makes what the layer itself makes, for padding, strides, groups and depthwise."""
    from kdedge_export.cures.adaround import _samples
    from kdedge_export.cures.walk import Layer, cure_layers

    seen: list[str] = []

    def fix(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The target is what the layer makes of its own inputs with its float weights, so the error must vanish.
        own = layer.operator.run(layer.read, layer.weight, *([] if layer.bias is None else [layer.bias]))
        assert isinstance(own, torch.Tensor)
        exact = Layer(layer.operator, layer.weight, layer.bias, layer.scales, layer.read, own, own, layer.limits)
        samples = _samples(exact, torch.Generator().manual_seed(3))
        groups = len(samples.read_GSI)
        error = samples.error(layer.weight.reshape(groups, -1, samples.read_GSI.shape[2]))
        assert float(error) <= 1e-9 * float((own**2).sum(1).mean()), layer.operator.node.name
        wrong = samples.error(1.1 * layer.weight.reshape(groups, -1, samples.read_GSI.shape[2]))
        assert float(wrong) > 1e-5 * float((own**2).sum(1).mean())
        seen.append(layer.operator.node.name)
        return layer.weight, layer.bias

    same = cure_layers(small, make_plan(small), table_of(small), batches, small, fix, 16)
    assert seen == ["stem.0", "deep.0", "narrow", "wide.0", "grouped.0", "head"]
    assert np.abs(run(same, batches) - run(small, batches)).max() == 0


# Sensitivity


def test_the_layer_with_the_planted_defect_comes_first(small: onnx.ModelProto, batches: Batches) -> None:
    plan, table = make_plan(small), table_of(small)
    bad = RangeTable(table.spans, {**table.weight_scales, "wide.0": table.weight_scales["wide.0"] * np.float32(100)})
    found = sensitivity(small, plan, bad, batches)
    assert found[0].layer == "wide.0"
    assert found[0].divergence > 3 * found[1].divergence
    assert sorted(each.layer for each in found) == sorted(each.name for each in weighted_layers(small, plan))
    assert all(each.divergence >= 0 for each in found)
    fp32, broken, mended = (
        run(model, batches)
        for model in (
            small,
            write_int8(small, plan, bad),
            write_int8(small, make_plan(small, frozenset({"wide.0"})), bad),
        )
    )
    assert divergences(fp32, mended).mean() < 0.5 * divergences(fp32, broken).mean(), "left in float it is cured"


def test_units_are_what_leaves_the_plan_together() -> None:
    weights = {"a.weight": (8, 3, 1, 1), "b.weight": (8, 8, 1, 1), "c.weight": (8, 8, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], name="a"),
        helper.make_node("HardSwish", ["a"], ["swish"], name="swish"),
        helper.make_node("Conv", ["swish", "b.weight"], ["b"], name="b"),
        helper.make_node("Relu", ["b"], ["relu"], name="relu"),
        helper.make_node("Add", ["swish", "relu"], ["sum"], name="sum"),
        helper.make_node("Conv", ["sum", "c.weight"], ["c"], name="c"),
        helper.make_node("GlobalAveragePool", ["c"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["logits"], name="flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", 1, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", 1, ["n", 8])],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()],
    )
    model = cpu_form(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    plan = make_plan(model)
    assert units(model, plan) == {
        "a": ("a", "swish:gate", "swish"),  # b still reads a rounded swish, so the sum has two 8-bit inputs
        "b": ("b", "relu", "sum"),
        "c": ("c", "pool"),
    }


def test_divergence_is_that_of_scipy() -> None:
    from scipy.special import softmax
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7, 5)).astype(np.float32) * 8
    expected = entropy(softmax(a.astype(float), 1), softmax(b.astype(float), 1), axis=1)
    np.testing.assert_allclose(divergences(a, b), expected, rtol=1e-6)


def test_images_are_taken_evenly() -> None:
    batches = [np.full((4, 1, 1, 1), place, np.float32) + np.arange(4).reshape(4, 1, 1, 1) / 10 for place in range(5)]
    found = spread(batches, 6)
    assert len(found) == 6
    assert len({int(each) for each in found.ravel()}) == 5, "one of every batch"
    np.testing.assert_array_equal(spread(batches, 100), np.concatenate(batches))


# All together


def cured(model: onnx.ModelProto, table: RangeTable, batches: Batches, until_points: float) -> Cured:
    held = [SMALL.normalize(images(56)[40:])]
    plan = make_plan(model)
    return cure(
        model,
        plan,
        table,
        batches,
        logits=lambda each, ranges: run(write_int8(each, plan, ranges), held),
        fp32=run(model, held),
        recalibrate=table_of,
        until_points=until_points,
    )


def test_a_cure_is_kept_where_it_helps_and_says_what_it_did(small: onnx.ModelProto, batches: Batches) -> None:
    table = coarse(table_of(small), 12)
    found = cured(small, table, batches, until_points=np.inf)
    assert [each.cure for each in found.effects] == [
        BY_CHANNEL,
        "bias correction",
        "cross-layer equalization, then bias correction",
    ], "AdaRound was not asked for"
    first = found.effects[1]
    assert first.kept
    assert first.divergence[1] < first.divergence[0]
    assert set(first.to_json()) == {"cure", "kept", "divergence", "disagreement_points", "seconds"}
    kept = [each.divergence[1] for each in found.effects if each.kept]
    assert kept == sorted(kept, reverse=True)


def test_a_cure_that_harms_is_not_kept(
    small: onnx.ModelProto, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases "corrected" into nonsense and channels "equalized" into nonsense: the first model and table come back."""
    table = table_of(small)

    def spoilt(model: onnx.ModelProto, *rest: object) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        altered(copy, "wide.0", lambda b: b + 10, place=2)
        return copy

    monkeypatch.setattr("kdedge_export.cures.cure.correct_bias", spoilt)
    found = cured(small, table, batches, until_points=np.inf)
    assert [each.kept for each in found.effects] == [True, False, False]
    assert found.model is small
    assert found.table is table


def test_a_network_torch_cannot_run_goes_uncured(
    small: onnx.ModelProto, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> onnx.ModelProto:
        raise ExportError("The node odd is an Odd.")

    monkeypatch.setattr("kdedge_export.cures.cure.correct_bias", refused)
    table = table_of(small)
    found = cured(small, table, batches, until_points=np.inf)
    assert (found.model is small, found.table is table) == (True, True)
    assert [each.cure for each in found.effects] == [BY_CHANNEL]


def test_a_layer_given_back_to_float_is_the_original_again(small: onnx.ModelProto, batches: Batches) -> None:
    """Its weights and its bias, also where it had none; what is still rounded is corrected anew."""
    plan, table = make_plan(small), coarse(table_of(small), 12)
    corrected = correct_bias(small, plan, table, batches)
    back = frozenset({"narrow", "wide.0"})
    part = make_plan(small, back)
    found = partly_float(corrected, small, part, table, batches, back)
    for name in back:
        np.testing.assert_array_equal(value(found, name), value(small, name))
    np.testing.assert_array_equal(value(found, "wide.0", 2), value(small, "wide.0", 2))
    assert [each for each in node(found, "narrow").input[2:] if each] == []
    assert np.abs(value(found, "grouped.0", 2) - value(small, "grouped.0", 2)).max() > 0
    fp32 = run(small, batches)
    errors = [np.abs(run(write_int8(each, part, table), batches) - fp32).mean() for each in (corrected, found)]
    assert errors[1] < errors[0]


def test_adaround_is_tried_while_the_budget_is_not_met(small: onnx.ModelProto, batches: Batches) -> None:
    found = cured(small, coarse(table_of(small), 30), batches, until_points=-1)
    assert found.effects[-1].cure == "AdaRound"
    best = [each.divergence[1] for each in found.effects if each.kept]
    assert best[-1] <= found.effects[1].divergence[0]


def test_what_one_scale_a_channel_does_is_told(small: onnx.ModelProto, batches: Batches) -> None:
    """By value: the file with one scale a weight is written here by hand. It is told, and never taken."""
    plan, table = make_plan(small), table_of(small)
    held = [SMALL.normalize(images(56)[40:])]
    scales = {name: np.full(len(each), each.max(), np.float32) for name, each in table.weight_scales.items()}
    coarse_file = write_int8(small, plan, replace(table, weight_scales=scales))
    found = cured(small, table, batches, until_points=np.inf)
    told = found.effects[0]
    fp32 = run(small, held)
    before, after = (
        float(divergences(fp32, run(each, held)).mean()) for each in (coarse_file, write_int8(small, plan, table))
    )
    assert (told.cure, told.kept) == (BY_CHANNEL, True)
    assert told.divergence == pytest.approx((before, after))
    assert before != pytest.approx(after)
    assert all((np.ptp(each) > 0) for name, each in found.table.weight_scales.items())
