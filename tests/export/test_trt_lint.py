"""The linter of TensorRT files: each rule finds what was planted against it, in both forms."""

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdedge_export.trt import lint as trt_lint
from kdedge_export.trt import placement as trt_placement
from kdedge_export.trt.lint import RULES, Form, lint_trt
from kdedge_export.trt.placement import PLACEMENT
from kdedge_export.trt.plan import make_trt_plan
from kdedge_export.trt.qdq import write_trt
from kdedge_export.trt.typed import write_trt_fp16
from kdedge_export.trt.view import View

from .trt_toys import make_toy

Model = onnx.ModelProto


def file(form: Form) -> tuple[Model, frozenset[str]]:
    _, model, plan, table = make_toy()
    written = write_trt(model, plan, table) if form == "trt" else write_trt_fp16(model, plan, table)
    return written, frozenset(plan.kept_float)


def node(model: Model, kind: str, place: int = 0) -> onnx.NodeProto:
    return [each for each in model.graph.node if each.op_type == kind][place]


def named(model: Model, name: str) -> onnx.NodeProto:
    return next(each for each in model.graph.node if each.name == name)


def value(model: Model, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name)).copy()


def put(model: Model, name: str, array: np.ndarray) -> str:
    """An initializer, new or changed."""
    found = next((each for each in model.graph.initializer if each.name == name), None)
    (found or model.graph.initializer.add()).CopyFrom(numpy_helper.from_array(np.asarray(array), name))
    return name


def pair(model: Model, tensor: str, prefix: str = "planted") -> str:
    """Q and DQ of `tensor`, formed as they should be; what they give."""
    parameters = list(named(model, "input_Q" if "input_Q" in names(model) else "input_half_Q").input[1:])
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", [tensor, *parameters], [f"{prefix}_q"], name=f"{prefix}_Q"),
            helper.make_node("DequantizeLinear", [f"{prefix}_q", *parameters], [f"{prefix}_dq"], name=f"{prefix}_DQ"),
        ]
    )
    return f"{prefix}_dq"


def names(model: Model) -> set[str]:
    return {each.name for each in model.graph.node}


def raw(name: str) -> str:
    return name.removesuffix("_dq")


def body(model: Model) -> type[np.floating]:
    return np.float32 if model.opset_import[0].version == 17 else np.float16


def skips(model: Model) -> list[onnx.NodeProto]:
    """The sum with a plain skip, and the one of two convolutions."""
    return [node(model, "Add", 0), node(model, "Add", 1)]


def no_zero_point(model: Model) -> None:
    del node(model, "QuantizeLinear").input[2]


def unsigned_zero_point(model: Model) -> None:
    put(model, node(model, "DequantizeLinear").input[2], np.array(128, np.uint8))


def shifted_zero_point(model: Model) -> None:
    put(model, node(model, "QuantizeLinear").input[2], np.array(3, np.int8))


def zero_scale(model: Model) -> None:
    put(model, node(model, "QuantizeLinear").input[1], np.array(0, body(model)))


def scale_of_another_type(model: Model) -> None:
    name = node(model, "QuantizeLinear").input[1]
    put(model, name, value(model, name).astype(np.float16 if body(model) == np.float32 else np.float32))


def scales_by_channel(model: Model) -> None:
    put(model, node(model, "QuantizeLinear").input[1], np.ones(3, body(model)))


def zero_point_of_another_shape(model: Model) -> None:
    put(model, node(model, "QuantizeLinear").input[2], np.zeros(1, np.int8))


def one_scale_for_a_weight(model: Model) -> None:
    put(model, "mix.weight_rounded_scale", np.array(1, body(model)))


def weight_along_inputs(model: Model) -> None:
    named(model, "mix.weight_rounded_Q").attribute[0].i = 1


def fewer_zero_points(model: Model) -> None:
    put(model, "mix.weight_rounded_zero_point", np.zeros(31, np.int8))


def weight_of_minus_128(model: Model) -> None:
    weight = value(model, "mix.weight_rounded")
    weight[5] = -128 * value(model, "mix.weight_rounded_scale")[5]
    put(model, "mix.weight_rounded", weight)


def integer_weight(model: Model) -> None:
    put(model, "codes", np.zeros((32, 32, 1, 1), np.int8))
    named(model, "mix.weight_rounded_DQ").input[0] = "codes"


def another_scale_behind(model: Model) -> None:
    node(model, "DequantizeLinear").input[1] = put(model, "elsewhere", np.array(1, body(model)))


def codes_read_by_others(model: Model) -> None:
    model.graph.node.append(
        helper.make_node("Relu", [node(model, "QuantizeLinear").output[0]], ["other"], name="other")
    )


def integer_bias(model: Model) -> None:
    inputs = [put(model, "bias_codes", np.zeros(32, np.int32)), put(model, "bias_scale", np.array(1, body(model)))]
    zero = put(model, "bias_zero_point", np.array(0, np.int32))
    model.graph.node.append(helper.make_node("DequantizeLinear", [*inputs, zero], ["bias_dq"], name="bias_DQ"))
    named(model, "mix").input[2] = "bias_dq"


def between_layer_and_activation(model: Model) -> None:
    relu = node(model, "Relu")
    relu.input[0] = pair(model, relu.input[0])


def quantized_output(model: Model) -> None:
    pair(model, named(model, "head").output[0])


def reader_without_8_bits(model: Model) -> None:
    output = node(model, "Flatten").output[0]
    model.graph.node.append(helper.make_node("Exp", [pair(model, output)], ["exp"], name="exp"))


def float_input(model: Model) -> None:
    named(model, "mix").input[0] = raw(named(model, "mix").input[0])


def float_weight(model: Model) -> None:
    named(model, "mix").input[1] = raw(named(model, "mix").input[1])


def float_layer(model: Model) -> None:
    float_input(model)
    float_weight(model)


def float_pool(model: Model) -> None:
    pool = node(model, "GlobalAveragePool", -1)
    pool.input[0] = raw(pool.input[0])


def both_inputs(model: Model) -> None:
    add = skips(model)[0]
    place = next(place for place, name in enumerate(add.input) if not name.endswith("_dq"))
    add.input[place] = pair(model, add.input[place])


def branch_that_cannot_fuse(model: Model) -> None:
    add = skips(model)[0]
    place = next(place for place, name in enumerate(add.input) if not name.endswith("_dq"))
    model.graph.node.append(helper.make_node("Relu", [add.input[place]], ["second_reader"], name="second_reader"))


def float_skip(model: Model) -> None:
    for place, name in enumerate(skips(model)[0].input):
        skips(model)[0].input[place] = raw(name)


def shorter_way_fused(model: Model) -> None:
    add = skips(model)[1]
    for place, name in enumerate(add.input):
        add.input[place] = raw(name) if name.endswith("_dq") else pair(model, name)


def second_pair(model: Model) -> None:
    conv = named(model, "short")
    conv.input[0] = pair(model, raw(conv.input[0]))


def concat_of_two_scales(model: Model) -> None:
    name = f"{raw(node(model, 'Concat').input[1])}_scale"
    put(model, name, value(model, name) * body(model)(2))


def concat_of_a_float(model: Model) -> None:
    node(model, "Concat").input[0] = raw(node(model, "Concat").input[0])
    put(model, f"{node(model, 'Concat').input[0]}_scale", np.array(7, body(model)))


def another_scale_behind_a_split(model: Model) -> None:
    name = f"{raw(named(model, 'right').input[0])}_scale"
    put(model, name, value(model, name) * body(model)(2))


def float_pool_in_a_skip(model: Model) -> None:
    add = skips(model)[0]
    place = next(place for place, name in enumerate(add.input) if name.endswith("_dq"))
    pool = helper.make_node("MaxPool", [raw(add.input[place])], ["pooled"], name="pool", kernel_shape=[1, 1])
    model.graph.node.append(pool)
    add.input[place] = pair(model, "pooled")


def small_layer(model: Model) -> None:
    named(model, "lone").input[0] = pair(model, named(model, "lone").input[0])


def product_of_integers(model: Model) -> None:
    node(model, "Mul").input[0] = pair(model, node(model, "Mul").input[0])


def quantized_gate(model: Model) -> None:
    named(model, "excite").input[0] = pair(model, named(model, "excite").input[0])


def constant_of_the_other_type(model: Model) -> None:
    put(model, "head.bias", value(model, "head.bias").astype(np.float16 if body(model) == np.float32 else np.float32))


def cast_inside(model: Model) -> None:
    conv = named(model, "lone")
    model.graph.node.append(helper.make_node("Cast", [conv.input[0]], ["cast"], name="cast", to=TensorProto.FLOAT16))
    conv.input[0] = "cast"


def another_opset(model: Model) -> None:
    model.opset_import[0].version = 18


def another_ir(model: Model) -> None:
    model.ir_version = 9


def axes_as_input(model: Model) -> None:
    inputs = [node(model, "Mul").output[0], put(model, "axes", np.array([2, 3]))]
    model.graph.node.append(helper.make_node("ReduceMean", inputs, ["mean"], name="mean"))


def parts_by_number(model: Model) -> None:
    node(model, "Split").attribute.append(helper.make_attribute("num_outputs", 2))


def half_input(model: Model) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def open_height(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


BOTH: tuple[Form, ...] = ("trt", "trt-fp16")
PLANTED: list[tuple[str, Callable[[Model], None], str, tuple[Form, ...]]] = [
    ("rule_1_zero_points", no_zero_point, "input.*_Q: the zero point", BOTH),
    ("rule_1_zero_points", unsigned_zero_point, "_DQ: the zero point", BOTH),
    ("rule_1_zero_points", shifted_zero_point, "not a constant int8 of zeros", BOTH),
    ("rule_1_scales", zero_scale, "a scale is not a positive constant", BOTH),
    ("rule_1_scales", scale_of_another_type, "the scale is float(16|32), not float(32|16)", BOTH),
    ("rule_2_activations", scales_by_channel, "a computed tensor has 3 scales", BOTH),
    ("rule_2_activations", zero_point_of_another_shape, "its scale and zero point differ in shape", BOTH),
    ("rule_2_weights", one_scale_for_a_weight, "mix: its weight has not one scale for each", BOTH),
    ("rule_2_weights", weight_along_inputs, "mix: its weight is not quantized along axis 0", BOTH),
    ("rule_2_weights", fewer_zero_points, "mix: scales and zero points of its weight differ", BOTH),
    ("rule_2_weight_range", weight_of_minus_128, "mix: a weight lies outside of -127 to 127", BOTH),
    ("rule_3_float_weights", integer_weight, "codes: an initializer of 8-bit integers", BOTH),
    ("rule_3_float_weights", integer_weight, "mix.weight_rounded_DQ: it reads no QuantizeLinear", BOTH),
    ("rule_3_float_weights", another_scale_behind, "its QuantizeLinear has another scale", BOTH),
    ("rule_3_float_weights", codes_read_by_others, "it is not read by DequantizeLinear alone", BOTH),
    ("rule_4_bias", integer_bias, "mix: its bias is quantized", BOTH),
    ("rule_5_activation", between_layer_and_activation, "Q/DQ stand between stem and its Relu", BOTH),
    ("rule_5_inputs_only", quantized_output, "planted_DQ: no layer reads it", BOTH),
    ("rule_5_inputs_only", reader_without_8_bits, "planted_DQ: Exp exp has no 8-bit input", BOTH),
    ("rule_5_whole_layers", float_input, "mix: its weight alone is quantized", BOTH),
    ("rule_5_whole_layers", float_weight, "mix: its input alone is quantized", BOTH),
    ("rule_5_whole_layers", float_layer, "mix: it is left in float, though INT8 pays", BOTH),
    ("rule_5_pools", float_pool, "it reads floats behind an INT8 layer", BOTH),
    ("rule_6_skip_only", both_inputs, "both inputs of the sum are quantized", BOTH),
    ("rule_6_skip_only", branch_that_cannot_fuse, "its float input is no quantized convolution of its own", BOTH),
    ("rule_6_skip", float_skip, "its skip is float, though narrow could be fused", BOTH),
    ("rule_6_longer_way", shorter_way_fused, "the branch with the longer way is the one", BOTH),
    ("rule_7_shared_pairs", second_pair, "2 times QuantizeLinear for one tensor", BOTH),
    ("rule_8_concat", concat_of_two_scales, "inputs and output are not all at one scale", BOTH),
    ("rule_8_concat", concat_of_a_float, "inputs and output are not all at one scale", BOTH),
    ("rule_8_moves", another_scale_behind_a_split, "hold its values at different scales", BOTH),
    ("rule_9_pool_in_skip", float_pool_in_a_skip, "pool: a pooling in a skip reads floats", BOTH),
    ("rule_10_small_layers", small_layer, "lone: it is quantized, though its 12 channels in groups", BOTH),
    ("rule_11_float_ops", product_of_integers, "Mul reads a quantized tensor", BOTH),
    ("rule_11_gates", quantized_gate, "excite: it belongs to a squeeze-and-excitation gate", BOTH),
    ("fact_2_types", constant_of_the_other_type, "head.bias: a constant of the other float type", BOTH),
    ("fact_2_types", cast_inside, "cast: a Cast inside the network", BOTH),
    ("fact_3_pins", another_opset, "opset is not (17|20) alone", BOTH),
    ("fact_3_pins", another_ir, "IR version is 9, not (8|10)", BOTH),
    ("fact_4_leftovers", axes_as_input, "mean: ReduceMean has its axes as an input", ("trt",)),
    ("fact_4_leftovers", parts_by_number, "Split has num_outputs", ("trt",)),
    ("fact_5_interface", half_input, "input is not float32", BOTH),
    ("fact_5_interface", open_height, "input has another open axis than the batch", BOTH),
]
CASES = [(*each[:3], form) for each in PLANTED for form in each[3]]


@pytest.mark.parametrize(("rule", "damage", "told", "form"), CASES, ids=[f"{c[1].__name__}-{c[3]}" for c in CASES])
def test_a_rule_finds_what_was_planted(rule: str, damage: Callable[[Model], None], told: str, form: Form) -> None:
    model, kept = file(form)
    assert lint_trt(model, form, kept) == []
    damage(model)
    check = next(each for each in RULES if each.__name__ == rule)
    assert [problem for problem in check(View(model, form, kept)) if re.search(told, problem)]
    prefix = str(check.__doc__).split(":")[0]
    assert any(problem.startswith(f"{prefix}: ") for problem in lint_trt(model, form, kept))


def test_no_rule_is_without_its_violation() -> None:
    written = {
        name for module in (trt_lint, trt_placement) for name in vars(module) if name.startswith(("rule_", "fact_"))
    }
    assert written == {rule.__name__ for rule in RULES} == {name for name, *_ in PLANTED}
    assert len(RULES) == 25
    assert set(PLACEMENT) < set(RULES)
    numbers = {int(rule.__name__.split("_")[1]) for rule in RULES if rule.__name__.startswith("rule")}
    assert numbers == set(range(1, 12)), "12 is a matter of measurement"
    for rule in RULES:
        kind, number = rule.__name__.split("_")[:2]
        assert str(rule.__doc__).startswith(f"{kind.capitalize()} {number}"), rule


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        ("mix", "Rule 5: mix: it is left in float, though INT8 pays"),
        ("GlobalAveragePool", "reads floats behind an INT8 layer"),
        ("Add", "Rule 6: Add_.*: its skip is float"),
    ],
)
def test_what_was_left_out_by_choice_may_be_float(layer: str, told: str) -> None:
    _, model, _, table = make_toy()
    chosen = layer if layer == "mix" else node(model, layer, -1).name
    plan = make_trt_plan(model, frozenset([chosen]))
    assert plan.kept_float[chosen] == "left in float by choice"
    written = write_trt(model, plan, table)
    kept = frozenset(plan.kept_float)
    assert lint_trt(written, "trt", kept) == []
    assert any(re.search(told, problem) for problem in lint_trt(written, "trt", kept - {chosen}))
