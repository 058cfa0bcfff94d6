"""Swish, hard-swish and squeeze-excite in integers: the form they are planned on, and their values."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.cpu_form import cpu_form, trt_form
from kdedge_export.cpu.lint import lint_int8
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.sessions import run_onnx
from kdedge_export.table import U8, RangeTable

from .conftest import CLASSES, SMALL, images

BATCH = SMALL.normalize(images(6))
UNIT = U8.over((0.0, 1.0))


class Gated(nn.Module):
    """A convolution, an activation, a squeeze-excite with the gate `gate`, and a head."""

    def __init__(self, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.gate = nn.Conv2d(3, 16, 3, padding=1), activation, gate
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
        with torch.no_grad():
            self.first.weight.mul_(9)
            self.excite.weight.mul_(9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.first(x))
        gate = self.gate(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(self.last(x * gate).mean((2, 3)))


def gated(activation: nn.Module, gate: nn.Module) -> onnx.ModelProto:
    torch.manual_seed(0)
    return export_float(Gated(activation, gate).eval(), SMALL, CLASSES)


@pytest.fixture(scope="module")
def hard() -> onnx.ModelProto:
    return gated(nn.Hardswish(), nn.Hardsigmoid())


def quantized(form: onnx.ModelProto, left: frozenset[str] = frozenset()) -> tuple[onnx.ModelProto, Plan, RangeTable]:
    plan = make_plan(form, left)
    table = make_table("minmax", form, plan, calibrate(form, measured(plan), images(24), SMALL))
    int8 = write_int8(form, plan, table)
    assert lint_int8(int8, frozenset(plan.kept_float)) == []
    return int8, plan, table


def values(model: onnx.ModelProto, *names: str) -> list[np.ndarray]:
    """What the tensors are for BATCH, the graph run as it is written."""
    found = []
    for name in names:
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        watched.graph.output.insert(0, helper.make_tensor_value_info(name, 1, None))
        found.append(run_onnx(watched.SerializeToString(), BATCH, optimize=False))
    return found


def kinds(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def test_the_form_is_the_same_function_and_can_be_undone(hard: onnx.ModelProto) -> None:
    form = cpu_form(hard)
    swish = kinds(hard, "HardSwish")[0]
    assert not kinds(form, "HardSwish")
    assert {node.name for node in form.graph.node} == {*(node.name for node in hard.graph.node), f"{swish.name}:gate"}
    assert np.abs(values(form, swish.output[0])[0] - values(hard, swish.output[0])[0]).max() <= 1e-6
    expected = run_onnx(hard.SerializeToString(), BATCH)
    assert np.abs(run_onnx(form.SerializeToString(), BATCH) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert cpu_form(form).graph.node == form.graph.node
    undone = trt_form(form)
    assert [(node.op_type, node.name, *node.input) for node in undone.graph.node] == [
        (node.op_type, node.name, *node.input) for node in hard.graph.node
    ]
    assert undone.graph.initializer == hard.graph.initializer


def test_a_gate_that_something_else_reads_stays_apart(hard: onnx.ModelProto) -> None:
    form = cpu_form(hard)
    gate = kinds(form, "HardSigmoid")[0].output[0]
    form.graph.node.append(helper.make_node("Relu", [gate], ["elsewhere"], name="elsewhere"))
    assert not kinds(trt_form(form), "HardSwish")


def assert_rounded(found: np.ndarray, exact: np.ndarray, rounding: U8) -> None:
    """Every value is one of the 256, and none is nearer to what was to be rounded; ties may fall to either side."""
    codes = np.float64(found) / rounding.scale
    assert np.abs(codes - np.rint(codes)).max() < 1e-4
    clipped = np.clip(np.float64(exact), rounding.low, rounding.high)
    assert np.abs(found - clipped).max() <= rounding.scale * 0.501


def test_hard_swish_by_value(hard: onnx.ModelProto) -> None:
    """codes of x + 3 at 6 / 255 are those of the gate at 1 / 255; the product of the two rounded tensors is rounded."""
    form = cpu_form(hard)
    int8, plan, table = quantized(form)
    gate, product = kinds(form, "HardSigmoid")[0], kinds(form, "Mul")[0]
    x = gate.input[0]
    assert plan.known[gate.output[0]] == (0.0, 1.0)
    found_x, found_gate, found = values(int8, f"{x}_dq", f"{gate.output[0]}_dq", f"{product.output[0]}_dq")
    assert_rounded(found_gate, np.clip(np.float64(found_x) / 6 + 0.5, 0, 1), UNIT)
    assert found_gate.min() <= UNIT.scale
    assert found_gate.max() == pytest.approx(1.0)
    assert_rounded(found, np.float64(found_x) * found_gate, table.u8(product.output[0]))


def test_what_only_feeds_a_hard_swish_needs_nothing_below_minus_three(hard: onnx.ModelProto) -> None:
    form = cpu_form(hard)
    _, plan, table = quantized(form)
    x = kinds(form, "HardSigmoid")[0].input[0]
    assert plan.enough == {x: (pytest.approx(-3.0), np.inf)}
    assert values(form, x)[0].min() < -5
    assert table.spans[x][0] == pytest.approx(-3.0)
    # Where someone else reads it too, all of it counts.
    form.graph.node.insert(3, helper.make_node("Relu", [x], ["elsewhere"], name="elsewhere"))
    assert make_plan(form).enough == {}


@pytest.mark.parametrize(
    ("gate", "formula"),
    [
        (nn.Hardsigmoid(), lambda x: np.clip(x / 6 + 0.5, 0, 1)),
        (nn.Sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
    ],
    ids=["hard-sigmoid", "sigmoid"],
)
def test_squeeze_excite_by_value(gate: nn.Module, formula: Callable[[np.ndarray], np.ndarray]) -> None:
    form = cpu_form(gated(nn.ReLU(), gate))
    int8, plan, table = quantized(form)
    assert plan.kept_float == {}
    made = next(node for node in form.graph.node if node.op_type in ("HardSigmoid", "Sigmoid"))
    excite = next(node for node in form.graph.node if node.name == "excite")
    if isinstance(gate, nn.Hardsigmoid):  # the convolution rounds to it at once: 32-bit sums, then the 256 codes
        assert plan.absorbed[made.name] == (0.0, 1.0)
        assert not kinds(int8, "Add")
        (rounded,) = values(int8, f"{excite.input[0]}_dq")
        codes = np.rint(weights(form, excite) / table.weight_scales["excite"][:, None])
        exact = np.einsum("ncij,oc->noij", rounded, codes * table.weight_scales["excite"][:, None])
        exact = exact + bias(form, excite).reshape(1, -1, 1, 1)
    else:
        (exact,) = values(int8, f"{made.input[0]}_dq")
    (found,) = values(int8, f"{made.output[0]}_dq")
    assert_rounded(found, formula(np.float64(exact)), UNIT)

    product = kinds(form, "Mul")[0]
    x, scaled = values(int8, f"{product.input[0]}_dq", f"{product.output[0]}_dq")
    assert_rounded(scaled, np.float64(x) * found, table.u8(product.output[0]))


def weights(model: onnx.ModelProto, node: onnx.NodeProto) -> np.ndarray:
    return constant(model, node.input[1])[:, :, 0, 0].astype(np.float64)


def bias(model: onnx.ModelProto, node: onnx.NodeProto) -> np.ndarray:
    return constant(model, node.input[2]).astype(np.float64)


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return onnx.numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.5), (0.5, 0.0), (0.25, -0.5)])
def test_any_hard_sigmoid_is_a_change_of_scale(hard: onnx.ModelProto, alpha: float, beta: float) -> None:
    form = cpu_form(hard)
    for node in kinds(form, "HardSigmoid"):
        del node.attribute[:]
        node.attribute.extend([helper.make_attribute("alpha", alpha), helper.make_attribute("beta", beta)])
    int8, _, _ = quantized(form)
    gate = kinds(form, "HardSigmoid")[0]
    x, found = values(int8, f"{gate.input[0]}_dq", f"{gate.output[0]}_dq")
    assert_rounded(found, np.clip(alpha * np.float64(x) + beta, 0, 1), UNIT)
    expected, rounded = (run_onnx(each.SerializeToString(), BATCH) for each in (form, int8))
    assert np.abs(rounded - expected).max() <= 0.05 * np.ptp(expected)


@pytest.mark.parametrize("which", ["gate", "product"])
def test_one_hard_swish_is_left_in_float_by_either_name(hard: onnx.ModelProto, which: str) -> None:
    form = cpu_form(hard)
    gate = kinds(form, "HardSigmoid")[0]
    product = next(node for node in kinds(form, "Mul") if gate.output[0] in node.input)
    int8, plan, _ = quantized(form, frozenset({gate.name if which == "gate" else product.name}))
    assert {gate.name, product.name} <= set(plan.kept_float)
    assert "excite" in plan.layers
    assert kinds(int8, "HardSigmoid")[0].name == gate.name
    assert values(int8, gate.output[0])[0].max() <= 1.0


def test_silu_is_integers_and_near(hard: onnx.ModelProto) -> None:
    form = cpu_form(gated(nn.SiLU(), nn.Sigmoid()))
    int8, plan, _ = quantized(form)
    assert plan.kept_float == {}
    expected, found = (run_onnx(each.SerializeToString(), BATCH) for each in (form, int8))
    assert np.abs(found - expected).max() <= 0.03 * np.ptp(expected)


def change(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    found = next(each for each in model.graph.initializer if each.name == name)
    found.CopyFrom(onnx.numpy_helper.from_array(value, name))


def gate_scale(model: onnx.ModelProto, gate: str) -> None:
    change(model, f"{gate}_scale", np.array(0.5, np.float32))


def gate_zero_point(model: onnx.ModelProto, gate: str) -> None:
    change(model, f"{gate}_zero_point", np.array(3, np.uint8))


def shift(model: onnx.ModelProto, gate: str) -> None:
    change(model, f"{gate}_shift_q", np.array(200, np.uint8))


def unfused(model: onnx.ModelProto, gate: str) -> None:
    add = next(node for node in model.graph.node if node.name == gate)
    add.op_type = "HardSigmoid"
    del add.input[1:]


def float_product(model: onnx.ModelProto, gate: str) -> None:
    product = next(node for node in kinds(model, "Mul") if f"{gate}_dq" in node.input)
    product.input[0] = product.input[0].removesuffix("_dq")


BREAKS = [
    (gate_scale, "another scale, and it is no hard sigmoid's"),
    (gate_zero_point, "another scale, and it is no hard sigmoid's"),
    (shift, "a constant to add is not one code"),
    (unfused, "HardSigmoid has no integer kernel"),
    (float_product, "an input of Mul is not dequantized"),
]


@pytest.mark.parametrize(("damage", "told"), BREAKS, ids=[each[0].__name__ for each in BREAKS])
def test_the_linter_finds(damage: Callable[[onnx.ModelProto, str], None], told: str, hard: onnx.ModelProto) -> None:
    form = cpu_form(hard)
    int8, _, _ = quantized(form)
    damage(int8, kinds(form, "HardSigmoid")[0].name)
    problems = lint_int8(int8)
    assert any(told in problem for problem in problems), problems
