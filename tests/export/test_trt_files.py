"""The files for TensorRT by value, against a fake quantization in torch written by hand."""

import copy
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from kdedge.errors import BugError, ExportError
from kdedge_export.cpu.cpu_form import cpu_form, trt_form
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.sessions import run_onnx
from kdedge_export.table import RangeTable
from kdedge_export.trt.emulate import emulate
from kdedge_export.trt.lint import lint_trt
from kdedge_export.trt.plan import make_trt_plan
from kdedge_export.trt.qdq import write_trt
from kdedge_export.trt.typed import to_opset_20, write_trt_fp16

from .conftest import CLASSES, SMALL, images
from .test_int8 import relative_rms
from .trt_toys import FLOAT_LAYERS, ONE_SCALE, SITES, Everything, Toy, make_toy, minmax_table


@pytest.fixture
def toy() -> Toy:
    return make_toy()


def oracle(module: Everything, calibration: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Fake quantization by the formulas: symmetric, activations -128..127, weights -127..127 by output channel."""
    largest: dict[str, float] = {}

    def watch(site: str, tensor: torch.Tensor) -> torch.Tensor:
        largest[site] = float(tensor.abs().max())
        return tensor

    def quantize(site: str, tensor: torch.Tensor) -> torch.Tensor:
        reach = max(largest[each] for each in ONE_SCALE) if site in ONE_SCALE else largest[site]
        scale = np.float32(reach / 127).item()
        return torch.clamp(torch.round(tensor / scale), -128, 127) * scale

    rounded = copy.deepcopy(module)
    with torch.inference_mode():
        module.at = watch
        module(calibration)
        module.at = lambda site, tensor: tensor
        assert sorted(largest) == sorted(SITES)
        for name, layer in rounded.named_children():
            if name not in FLOAT_LAYERS:
                scales = layer.weight.flatten(1).abs().amax(1).div(127).view(-1, 1, 1, 1)
                layer.weight.copy_(torch.round(layer.weight / scales) * scales)
        rounded.at = quantize
        return rounded(x)


def test_the_trt_file_is_the_fake_quantization_by_hand(toy: Toy) -> None:
    """What is off is one code here and there, where sums of float32 in another order fall on the other side."""
    module, model, plan, table = toy
    batch = SMALL.normalize(images(32)[16:])
    expected = oracle(module, torch.from_numpy(SMALL.normalize(images(16))), torch.from_numpy(batch)).numpy()
    found = emulate(write_trt(model, plan, table).SerializeToString(), batch)
    exact = run_onnx(model.SerializeToString(), batch)
    assert relative_rms(exact, expected) >= 0.01, "the rounding is seen in the logits"
    assert relative_rms(found, expected) <= 0.1 * relative_rms(exact, expected)


def weight_codes(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    values = {each.name: numpy_helper.to_array(each).astype(np.float64) for each in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in values:
            weight, scale = values[node.input[0]], values[node.input[1]]
            found[node.input[0]] = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return found


def test_the_typed_file_has_the_same_scales_and_a_half_body(toy: Toy) -> None:
    _, model, plan, table = toy
    batch = SMALL.normalize(images(32)[16:])
    plain, typed = write_trt(model, plan, table), write_trt_fp16(model, plan, table)
    assert (typed.opset_import[0].version, typed.ir_version) == (20, 10)
    assert [each.data_type for each in typed.graph.initializer].count(onnx.TensorProto.FLOAT) == 0
    assert [each.type.tensor_type.elem_type for each in (*typed.graph.input, *typed.graph.output)] == [1, 1]
    for name, codes in weight_codes(plain).items():
        difference = np.abs(weight_codes(typed)[name] - codes)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 0.05, name
    exact, eight = run_onnx(model.SerializeToString(), batch), emulate(plain.SerializeToString(), batch)
    found = emulate(typed.SerializeToString(), batch)
    assert relative_rms(found, exact) <= 1.5 * relative_rms(eight, exact)
    assert relative_rms(found, eight) <= relative_rms(eight, exact)
    assert (found.argmax(1) == eight.argmax(1)).mean() >= 0.9


def test_scales_below_halfs_normal_range_keep_the_layer(toy: Toy) -> None:
    """One block 2^-12 times smaller, what reads it that much larger: float does not care, nor may the typed file."""
    module, _, _, _ = toy
    small = copy.deepcopy(module)
    with torch.no_grad():
        small.stem.weight.mul_(2.0**-12)
        small.stem.bias.mul_(2.0**-12)
        small.deep.weight.mul_(2.0**12)
        small.narrow.weight.mul_(2.0**-12)
        small.narrow.bias.mul_(2.0**-12)
        small.deep.bias.zero_()
        small.down1.weight.mul_(2.0**12)
        small.short.weight.mul_(2.0**12)
    model = export_float(small, SMALL, CLASSES)
    plan = make_trt_plan(model)
    table = minmax_table(model, plan, images(16), SMALL)
    assert min(plan.scales(table).values()) < 2.0**-14, "below half's smallest normal number"
    batch = SMALL.normalize(images(32)[16:])
    exact = run_onnx(model.SerializeToString(), batch)
    eight, typed = write_trt(model, plan, table), write_trt_fp16(model, plan, table)
    assert relative_rms(emulate(typed.SerializeToString(), batch), exact) <= 2 * relative_rms(
        emulate(eight.SerializeToString(), batch), exact
    )


@pytest.mark.parametrize("factor", [1.0, 2.0**-8, 2.0**-13, 1.37 * 2.0**-15])
def test_half_scales_clip_nothing(factor: float, toy: Toy) -> None:
    """Below half's normal range the nearest scale may be far smaller: then the largest weights would be cut off."""
    _, model, plan, table = toy
    scales = {name: each * np.float32(factor) for name, each in table.weight_scales.items()}
    small = onnx.ModelProto()
    small.CopyFrom(model)
    layers = {node.name: node.input[1] for node in small.graph.node if node.name in plan.weighted}
    for tensor in small.graph.initializer:
        if tensor.name in layers.values():
            weight = numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    before = {each.name: numpy_helper.to_array(each) for each in small.graph.initializer}
    typed = write_trt_fp16(small, plan, RangeTable(table.spans, scales))
    after = {each.name: numpy_helper.to_array(each).astype(np.float64) for each in typed.graph.initializer}
    for layer, name in layers.items():
        steps = after[f"{layer}.weight_rounded_scale"].reshape(-1, 1, 1, 1)
        lost = np.abs(after[f"{layer}.weight_rounded"] - before[name]) / steps
        assert lost.max() <= 0.57, "half a code, and what half's own digits lose"


def test_what_does_not_fit_into_half_is_named(toy: Toy) -> None:
    _, model, plan, table = toy
    name = plan.tensors[3]
    with pytest.raises(ExportError, match=f"values of {name} reach 7e"):
        write_trt_fp16(model, plan, table.with_spans({name: (0.0, 7e4)}))
    large = RangeTable(table.spans, {**table.weight_scales, "deep": table.weight_scales["deep"] * 1e6})
    with pytest.raises(ExportError, match=r"values of deep\.weight reach"):
        write_trt_fp16(model, plan, large)


def test_layers_called_like_what_the_writer_adds(toy: Toy) -> None:
    """Names are the user's own: "deep" beside "deep_q", "deep_scale", "deep_dq" and the like."""
    _, model, plan, table = toy
    names = {"stem": "c", "deep": "c_q", "narrow": "c_dq", "down1": "c_scale", "down2": "c_zero_point"}
    names |= {"short": "c.weight_rounded", "mix": "c.weight_rounded_q", "right": "input_half", "last": "input_q"}
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    for node in renamed.graph.node:
        node.name = names.get(node.name, node.name)
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
    other, spans = make_trt_plan(renamed), {names.get(name, name): span for name, span in table.spans.items()}
    scales = {names.get(name, name): each for name, each in table.weight_scales.items()}
    x = SMALL.normalize(images(4))
    for write in (write_trt, write_trt_fp16):
        expected = emulate(write(model, plan, table).SerializeToString(), x)
        found = emulate(write(renamed, other, RangeTable(spans, scales)).SerializeToString(), x)
        assert np.array_equal(found, expected)


def test_a_table_of_another_plan_is_a_mistake_of_ours(toy: Toy) -> None:
    _, model, plan, table = toy
    with pytest.raises(BugError, match="the range table does not have it"):
        write_trt(model, plan, RangeTable({}, table.weight_scales))
    with pytest.raises(BugError, match="has no scales for it"):
        write_trt(model, plan, RangeTable(table.spans, {}))


def test_learned_weight_scales_clip_at_127(toy: Toy) -> None:
    _, model, plan, table = toy
    half = RangeTable(table.spans, {name: each * np.float32(0.5) for name, each in table.weight_scales.items()})
    file = write_trt(model, plan, half)
    assert lint_trt(file, "trt", frozenset(plan.kept_float)) == []
    assert max(np.abs(each).max() for each in weight_codes(file).values()) == 127


class Moving(nn.Module):
    """A mean over one axis and a split into three, which change their form between the opsets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.relu(x).chunk(3, 1)
        return (parts[0] - parts[2]).mean(2)[:, 0, :10] + parts[1].amax((1, 2))[:, :10]


def test_opset_20_means_the_same() -> None:
    model = export_float(Moving(), SMALL, CLASSES)
    newer = to_opset_20(model)
    onnx.checker.check_model(newer, full_check=True)
    batch = SMALL.normalize(images(4))
    expected, found = (run_onnx(each.SerializeToString(), batch) for each in (model, newer))
    assert np.array_equal(expected, found)
    assert any(node.op_type == "Split" for node in newer.graph.node)


def test_an_operator_that_changed_its_meaning_is_refused() -> None:
    model = export_float(Moving(), SMALL, CLASSES)
    model.graph.node[0].op_type, model.graph.node[0].name = "ScatterND", "here"
    with pytest.raises(ExportError, match="ScatterND here has another meaning in opset 20"):
        to_opset_20(model)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3"])
def test_a_mobilenet_through_the_form_of_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    """What `cpu_form` took apart is whole again: the same plan as of the exported file, and a clean one."""
    model = request.getfixturevalue(name)[1]
    whole = trt_form(cpu_form(model))
    plan = make_trt_plan(whole)
    assert plan == make_trt_plan(model)
    counted = Counter(node.op_type for node in model.graph.node if node.name in plan.layers)
    assert counted["Conv"] == {"mobilenet_v2": 52, "mobilenet_v3": 34}[name]
    table = minmax_table(whole, plan, images(8), SMALL)
    for written, form in ((write_trt(whole, plan, table), "trt"), (write_trt_fp16(whole, plan, table), "trt-fp16")):
        assert lint_trt(written, form, frozenset(plan.kept_float)) == []
        assert np.isfinite(emulate(written.SerializeToString(), SMALL.normalize(images(2)))).all()
