"""The INT8 file: its form, that ONNX Runtime really fuses it, and its numbers."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from kdedge.errors import BugError
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import CALIBRATORS, make_table, measured
from kdedge_export.cpu.cpu_form import cpu_form
from kdedge_export.cpu.lint import lint_int8, require_clean
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.cures.walk import weighted_layers
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.graph import Graph
from kdedge_export.sessions import run_onnx
from kdedge_export.table import U8, RangeTable, natural_weight_scales

from .conftest import CLASSES, SMALL, images, network, warm

Exported = tuple[nn.Module, onnx.ModelProto]


def int8_of(model: onnx.ModelProto, calibrator: str = "minmax") -> tuple[onnx.ModelProto, Plan, RangeTable]:
    plan = make_plan(model)
    table = make_table(calibrator, model, plan, calibrate(model, measured(plan), images(48), SMALL))
    return write_int8(model, plan, table), plan, table


def fused(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators of the graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)


def test_mobilenet_v2_is_integers_from_end_to_end(mobilenet_v2: Exported, tmp_path: Path) -> None:
    _, model = mobilenet_v2
    before = Counter(node.op_type for node in model.graph.node)
    int8, plan, _ = int8_of(model)
    assert lint_int8(int8) == []
    assert plan.kept_float == {}
    found = fused(int8, tmp_path)
    assert found["QLinearConv"] == before["Conv"] == 52
    assert found["QLinearAdd"] == before["Add"] == 10
    assert (found["QLinearGlobalAveragePool"], found["QGemm"]) == (1, 1)
    assert not set(found) & {"Conv", "Add", "Clip", "Gemm", "DequantizeLinear"}
    assert found["QuantizeLinear"] == 1, "the input alone"


def test_mobilenet_v3_is_integers_up_to_the_last_hard_swish(mobilenet_v3: Exported, tmp_path: Path) -> None:
    """Behind the first linear layer a hard-swish stays in float: few values, and the classes are read from them."""
    form = cpu_form(mobilenet_v3[1])
    before = Counter(node.op_type for node in form.graph.node)
    int8, plan, _ = int8_of(form)
    assert lint_int8(int8, frozenset(plan.kept_float)) == []
    assert Counter(node.op_type for node in form.graph.node if node.name in plan.kept_float) == {
        "HardSigmoid": 1,
        "Mul": 1,
    }
    found = fused(int8, tmp_path)
    assert found["QLinearConv"] == before["Conv"] == 52
    assert found["QLinearMul"] == before["Mul"] - 1 == 18 + 9
    assert found["QLinearAdd"] == before["Add"] + 18, "a hard-swish's gate is an Add, a squeeze-excite's nothing at all"
    assert found["QGemm"] == 2
    assert (found["Mul"], found["HardSigmoid"], found["QuantizeLinear"]) == (1, 1, 2)
    assert not set(found) & {"Conv", "Gemm", "Relu", "DequantizeLinear", "GlobalAveragePool"}


def test_hard_swish_as_one_operator_stays_in_float(mobilenet_v3: Exported) -> None:
    _, model = mobilenet_v3
    int8, plan, _ = int8_of(model)
    assert lint_int8(int8, frozenset(plan.kept_float)) == []
    kept = {node.name for node in model.graph.node if node.op_type == "HardSwish"}
    assert kept <= set(plan.kept_float)


class Residual(nn.Module):
    """Every kind of quantized layer once or twice: convolution, ReLU6, depthwise, sum, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, made: int, groups: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(channels, made, 3, padding=1, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(made), nn.ReLU6())

        self.stem, self.deep = block(3, 16), block(16, 16, groups=16)
        self.narrow = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.last, self.head = block(16, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        return self.head(self.last(stem + self.narrow(self.deep(stem))).mean((2, 3)))


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("calibrator", sorted(CALIBRATORS))
def test_int8_is_near_float(calibrator: str) -> None:
    """Within 3 % of the spread of the logits, over images that calibration has not seen."""
    torch.manual_seed(0)
    pixels = images(96)
    module = warm(Residual(), torch.from_numpy(SMALL.normalize(pixels[:48])))
    model = export_float(module, SMALL, CLASSES)
    int8, plan, _ = int8_of(model, calibrator)
    assert plan.kept_float == {}
    batch = SMALL.normalize(pixels[48:])
    content = int8.SerializeToString()
    expected, found = run_onnx(model.SerializeToString(), batch), run_onnx(content, batch)
    assert relative_rms(found, expected) <= 0.03
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.95
    assert relative_rms(run_onnx(content, batch, optimize=False), found) <= 0.01, "as written, operator by operator"


def test_no_further_from_float_than_onnx_runtimes_own_quantizer(mobilenet_v2: Exported, tmp_path: Path) -> None:
    """Same network, images and calibrator; a random deep network magnifies every rounding, hence no fixed bound."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    model, pixels = mobilenet_v2[1], images(96)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"input": SMALL.normalize(pixels[i : i + 8])} for i in range(0, 48, 8)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    onnx.save(model, str(tmp_path / "float.onnx"))
    theirs = tmp_path / "theirs.onnx"
    quantize_static(
        str(tmp_path / "float.onnx"),
        str(theirs),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    batch = SMALL.normalize(pixels[48:])
    expected = run_onnx(model.SerializeToString(), batch)
    ours = relative_rms(run_onnx(int8_of(model)[0].SerializeToString(), batch), expected)
    assert ours <= 1.1 * relative_rms(run_onnx(theirs.read_bytes(), batch), expected)


def oracle_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, ranges: tuple[U8, U8]) -> np.ndarray:
    """Fake quantization of a 1 x 1 convolution in float64: input, weight per channel, output."""
    quantized_x = ranges[0].apply(x)
    scales = np.abs(weight.reshape(len(weight), -1)).max(1) / 127
    quantized_w = np.clip(np.rint(weight / scales.reshape(-1, 1, 1, 1)), -127, 127) * scales.reshape(-1, 1, 1, 1)
    made = np.einsum("nchw,oc->nohw", quantized_x, quantized_w[:, :, 0, 0]) + bias.reshape(1, -1, 1, 1)
    return ranges[1].apply(np.clip(made, 0.0, 6.0))


def test_one_layer_by_value() -> None:
    """A 1 x 1 convolution and ReLU6 against the formula of section 'form' in quantization.json."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 1)
    with torch.no_grad():
        conv.weight.mul_(6)
    module = nn.Sequential(conv, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10)).eval()
    model = export_float(module, SMALL, CLASSES)
    int8, plan, table = int8_of(model)
    layer, activation = model.graph.node[0], model.graph.node[1]
    assert plan.absorbed == {activation.name: (0.0, 6.0)}
    assert table.u8(activation.output[0]).zero_point == 0
    assert table.u8(activation.output[0]).high <= 6.0 * (1 + 1e-6)
    watched = onnx.ModelProto()
    watched.CopyFrom(int8)
    name = f"{activation.output[0]}_dq"
    watched.graph.output.insert(0, onnx.helper.make_tensor_value_info(name, 1, None))
    batch = SMALL.normalize(images(4))
    found = run_onnx(watched.SerializeToString(), batch, optimize=False)
    pair = (table.u8(layer.input[0]), table.u8(activation.output[0]))
    expected = oracle_conv(batch, conv.weight.detach().numpy(), conv.bias.detach().numpy(), pair)
    off = np.abs(found - expected)
    assert off.max() <= pair[1].scale * 1.001, "never more than the next code"
    assert (off > pair[1].scale / 2).mean() < 0.001, "and that only where float32 and float64 round differently"


def test_relu6_that_is_read_twice_is_still_absorbed() -> None:
    """ResNet's join: one activation feeds a convolution and the skip; the skip must see the clipped values."""
    module = network("resnet18", halvings=1)
    model = export_float(module, SMALL, CLASSES)
    int8, plan, _ = int8_of(model)
    assert lint_int8(int8) == []
    assert not {node.op_type for node in int8.graph.node} & {"Relu", "Clip"}
    assert len(plan.absorbed) == sum(node.op_type == "Relu" for node in model.graph.node)
    batch = SMALL.normalize(images(16))
    expected, found = (run_onnx(each.SerializeToString(), batch) for each in (model, int8))
    assert relative_rms(found, expected) <= 0.1


class Shared(nn.Module):
    """A sum read by an activation and, unclipped, by something else; a clip that 8 bits cannot do; a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(nn.functional.max_pool2d(torch.relu(first), 2))
        pooled = nn.functional.avg_pool2d(first, 2)
        return self.head((torch.clamp(second, 0.5, 2.0) * pooled).mean((2, 3)))


def test_activations_are_absorbed_only_where_that_changes_nothing() -> None:
    torch.manual_seed(0)
    model = export_float(warm(Shared(), torch.randn(8, 3, 16, 16)), SMALL, CLASSES)
    int8, plan, _ = int8_of(model)
    assert plan.absorbed == {}
    kinds = Counter(node.op_type for node in int8.graph.node)
    assert (kinds["Relu"], kinds["Clip"]) == (1, 1)
    assert lint_int8(int8, frozenset(plan.kept_float)) == []
    batch = SMALL.normalize(images(16))
    expected, found = (run_onnx(each.SerializeToString(), batch) for each in (model, int8))
    assert np.abs(found - expected).max() <= 0.05 * np.ptp(expected)


def test_max_pool_and_flatten_hand_on_the_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    int8, plan, table = int8_of(export_float(module.eval(), SMALL, CLASSES))
    assert lint_int8(int8) == []
    assert len(plan.same_scale) == 2
    for name, source in plan.same_scale.items():
        assert table.spans[name] == table.spans[source]
    assert not set(fused(int8, tmp_path)) & {"Conv", "Gemm", "Relu", "DequantizeLinear"}


def first(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.name == name)


def replace(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    found = initializer(model, name)
    found.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(found).copy()), name))


def break_scale(model: onnx.ModelProto) -> None:
    replace(model, first(model, "QuantizeLinear").input[1], lambda value: -value)


def break_zero_point(model: onnx.ModelProto) -> None:
    replace(model, first(model, "QuantizeLinear").input[2], lambda value: value.astype(np.int8))


def break_weight(model: onnx.ModelProto) -> None:
    name = next(each.name for each in model.graph.initializer if each.name.endswith("weight_q"))
    replace(model, name, lambda value: np.full_like(value, -128))


def break_axis(model: onnx.ModelProto) -> None:
    node = next(each for each in model.graph.node if each.attribute and each.op_type == "DequantizeLinear")
    node.attribute[0].i = 1


def break_bias(model: onnx.ModelProto) -> None:
    name = next(each.name for each in model.graph.initializer if each.name.endswith("bias_q_scale"))
    replace(model, name, lambda value: value * 2)


def break_output(model: onnx.ModelProto) -> None:
    conv = first(model, "Conv")
    model.graph.node.append(onnx.helper.make_node("Relu", [conv.output[0]], ["elsewhere"], name="extra"))


def break_input(model: onnx.ModelProto) -> None:
    first(model, "Conv").input[0] = "input"


def break_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


def break_add(model: onnx.ModelProto) -> None:
    add = first(model, "Add")
    add.input[0] = add.input[0].removesuffix("_dq")


BREAKS = [
    (break_scale, "scale is not one positive number"),
    (break_zero_point, "zero point is not one uint8"),
    (break_weight, "a weight is -128"),
    (break_axis, "along axis 0"),
    (break_bias, "units of input scale x weight scale"),
    (break_output, "not quantized at once"),
    (break_input, "is not dequantized"),
    (break_opset, "opset is not 17"),
    (break_add, "input of Add is not dequantized"),
]


@pytest.mark.parametrize(("damage", "told"), BREAKS, ids=[each[0].__name__ for each in BREAKS])
def test_the_linter_finds(damage: Callable[[onnx.ModelProto], None], told: str, mobilenet_v2: Exported) -> None:
    int8, _, _ = int8_of(mobilenet_v2[1])
    assert lint_int8(int8) == []
    damage(int8)
    problems = lint_int8(int8)
    assert any(told in problem for problem in problems), problems
    with pytest.raises(BugError, match=r"model\.int8\.onnx breaks"):
        require_clean(problems, "model.int8.onnx")


def test_the_linter_finds_an_activation_in_the_way(mobilenet_v2: Exported) -> None:
    int8, _, _ = int8_of(mobilenet_v2[1])
    conv = first(int8, "Conv")
    rounds = next(node for node in int8.graph.node if node.input[0] == conv.output[0])
    rounds.input[0] = "clipped"
    int8.graph.node.append(onnx.helper.make_node("Clip", [conv.output[0]], ["clipped"], name="clip"))
    assert any("kept from it by Clip" in problem for problem in lint_int8(int8))


def test_a_layer_left_in_float_is_float(mobilenet_v2: Exported) -> None:
    """Behind one scale ONNX Runtime quantizes a float layer itself, all its weights by one scale: depthwise is lost."""
    _, model = mobilenet_v2
    shapes = {each.name: tuple(each.dims) for each in model.graph.initializer}
    depthwise = next(n.name for n in model.graph.node if n.op_type == "Conv" and shapes[n.input[1]][1] == 1)
    plan = make_plan(model, frozenset({depthwise}))
    full = make_plan(model)
    found = calibrate(model, measured(full), images(48), SMALL)
    int8 = write_int8(model, plan, make_table("minmax", model, full, found))
    assert lint_int8(int8, frozenset(plan.kept_float)) == []
    batch = SMALL.normalize(images(8))
    content = int8.SerializeToString()
    assert relative_rms(run_onnx(content, batch), run_onnx(content, batch, optimize=False)) < 0.05
    node = next(each for each in int8.graph.node if each.name == depthwise)
    source = next(each for each in int8.graph.node if node.input[0] in each.output)
    node.input[0] = "one_scale"
    int8.graph.node.append(
        onnx.helper.make_node("DequantizeLinear", [source.input[0], "input_scale", "input_zero_point"], ["one_scale"])
    )
    assert any("would quantize its weights" in told for told in lint_int8(int8, frozenset(plan.kept_float)))


def test_layers_called_like_what_the_writer_adds() -> None:
    """Names are the user's own: "c" beside "c_q", "c_dq", "c_scale", and a weight like that of the file's own."""
    module = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)], nn.Flatten(), nn.Linear(768, 10))
    model = export_float(warm(module, torch.randn(4, 3, 16, 16)), SMALL, CLASSES)
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    names = ["c", "c_q", "c_dq", "c_scale", "c_zero_point", "input_q"]
    renamed = {node.name: name for node, name in zip(convs, names, strict=True)}
    renamed |= {node.output[0]: name for node, name in zip(convs, names, strict=True)}
    renamed |= {convs[1].input[1]: "c.weight_q", convs[2].input[1]: "c.weight_q_scale"}
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for node in other.graph.node:
        node.name = renamed.get(node.name, node.name)
        for names_of_node in (node.input, node.output):
            for place, name in enumerate(names_of_node):
                names_of_node[place] = renamed.get(name, name)
    for each in other.graph.initializer:
        each.name = renamed.get(each.name, each.name)
    batch = SMALL.normalize(images(8))
    expected, found = (int8_of(each)[0] for each in (model, other))
    assert lint_int8(found) == []
    assert np.array_equal(*(run_onnx(each.SerializeToString(), batch) for each in (expected, found)))
    layer = convs[3].name
    floats = []
    for each, left in ((model, layer), (other, renamed[layer])):
        _, plan, table = int8_of(each)
        part = make_plan(each, frozenset({left}))
        floats.append(run_onnx(write_int8(each, part, table).SerializeToString(), batch))
        assert plan.layers > part.layers
    assert np.array_equal(*floats), "with a layer left in float, which reads scales by channel"


def most_bytes(model: onnx.ModelProto, plan: Plan) -> float:
    """A quarter of the weights in 8 bits, all else as in FP32, and the overhead that export/README.md states."""
    graph = Graph(model)
    weights = [graph.constant(node.input[1]) for node in weighted_layers(model, plan)]
    quantized = sum(each.nbytes for each in weights if each is not None)
    channels = sum(len(each) for each in weights if each is not None)
    return quantized / 4 + model.ByteSize() - quantized + 8 * channels + 1024 * len(graph.nodes) + 100_000


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3"])
def test_the_size_of_the_file(name: str, request: pytest.FixtureRequest) -> None:
    """All in 8 bits, and with every fifth layer in float."""
    model = cpu_form(request.getfixturevalue(name)[1])
    plan = make_plan(model)
    mixed = make_plan(model, frozenset(node.name for node in weighted_layers(model, plan)[::5]))
    table = RangeTable(dict.fromkeys(plan.tensors, (-1.0, 1.0)), natural_weight_scales(model, plan.layers))
    whole, partly = (write_int8(model, each, table).ByteSize() for each in (plan, mixed))
    assert whole <= most_bytes(model, plan)
    assert whole < partly <= most_bytes(model, mixed)
