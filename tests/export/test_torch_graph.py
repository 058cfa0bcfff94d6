"""The ONNX graph as a torch module: ONNX Runtime's numbers in float, and code for code those of the INT8 file."""

import weakref
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from kdedge.errors import ExportError
from kdedge.models.zoo import ModelSpec, build
from kdedge_export.cpu.cpu_form import cpu_form
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.sessions import open_session, run_onnx
from kdedge_export.table import U8, RangeTable, natural_weight_scales
from kdedge_export.training import torch_graph
from kdedge_export.training.fake_quant import round_u8
from kdedge_export.training.torch_graph import TorchGraph

from .conftest import CLASSES, SMALL, images, warm
from .test_families import shallow

BATCH = SMALL.normalize(images(48))
# In these, all between two roundings is sums and products. The others compute square roots and exponentials as well,
# where two libraries may differ in the last digit.
EXACT = ("mobilenet-v2", "shufflenet-v2")
FAMILIES = (*EXACT, "mobilenet-v3-small", "efficientnet-b0")


@pytest.fixture(scope="module")
def float_models(mobilenet_v2: tuple[nn.Module, onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
    models = {"mobilenet-v2": mobilenet_v2[1]}
    for arch in set(FAMILIES) - set(models):
        torch.manual_seed(0)
        module: nn.Module = shallow(build(ModelSpec(arch, len(CLASSES), halvings=2)))
        if arch not in EXACT:  # a code that differs makes others differ: in so few blocks they can still be counted
            blocks = module.get_submodule("backbone.features")[:4]  # type: ignore[operator]
            module = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(len(CLASSES)))
        models[arch] = export_float(warm(module, torch.from_numpy(BATCH)), SMALL, CLASSES)
    return models


def table_of(model: onnx.ModelProto) -> tuple[Plan, RangeTable]:
    """Nothing is clipped, but what behind an absorbed activation would be anyway."""
    plan = make_plan(model)
    with torch.inference_mode():
        _, seen = TorchGraph(model).watch(torch.from_numpy(BATCH), plan.tensors)
    ends = {name: (min(0.0, float(seen[name].min())), max(0.0, float(seen[name].max()))) for name in plan.tensors}
    spans = {name: ends[plan.same_scale.get(name, name)] for name in plan.tensors}
    return plan, RangeTable(spans, natural_weight_scales(model, plan.layers))


def in_powers_of_two(table: RangeTable) -> RangeTable:
    """Every scale is the next power of two: sums of products are then exact in float32, in whatever order."""

    def up(scale: Any) -> Any:
        return np.exp2(np.ceil(np.log2(scale)))

    spans = {}
    for name in table.spans:
        scale, zero_point = float(up(table.u8(name).scale)), table.u8(name).zero_point
        spans[name] = (-zero_point * scale, (255 - zero_point) * scale)
    return RangeTable(spans, {name: up(scales).astype(np.float32) for name, scales in table.weight_scales.items()})


def codes_of_file(int8: onnx.ModelProto, plan: Plan, batch: np.ndarray) -> dict[str, np.ndarray]:
    """The uint8 values of every quantized tensor of the file as written, but of those it has given more channels."""
    copy = onnx.ModelProto()
    copy.CopyFrom(int8)
    for name in plan.tensors:
        copy.graph.output.append(helper.make_tensor_value_info(f"{name}_q", TensorProto.UINT8, None))
    session = open_session(copy.SerializeToString(), optimize=False)
    return dict(zip(plan.tensors, session.run(None, {"input": batch})[1:], strict=True))


def codes_of_graph(graph: TorchGraph, plan: Plan, table: RangeTable, batch: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        _, found = graph.watch(torch.from_numpy(batch), [f"{name}_dq" for name in plan.tensors])
    codes = {}
    for name in plan.tensors:
        u8 = U8.over(plan.known.get(name, table.spans[name]))
        codes[name] = np.rint(found[f"{name}_dq"].numpy() / u8.scale) + u8.zero_point
    return codes


@pytest.mark.parametrize("arch", FAMILIES)
def test_in_float_it_is_onnx_runtime(arch: str, float_models: dict[str, onnx.ModelProto]) -> None:
    model = float_models[arch]
    with torch.inference_mode():
        found = TorchGraph(model)(torch.from_numpy(BATCH)).numpy()
    expected = run_onnx(model.SerializeToString(), BATCH)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("arch", EXACT)
def test_it_is_the_int8_file(arch: str, float_models: dict[str, onnx.ModelProto]) -> None:
    """One code that differed anywhere would be seen in the logits, which are exact sums of exact products."""
    model = float_models[arch]
    plan, table = table_of(model)
    table = in_powers_of_two(table)
    assert plan.kept_float == {}
    expected = run_onnx(write_int8(model, plan, table).SerializeToString(), BATCH[:16], optimize=False)
    in_float = run_onnx(model.SerializeToString(), BATCH[:16])
    with torch.inference_mode():
        found = TorchGraph(model, plan, table)(torch.from_numpy(BATCH[:16])).numpy()
    assert np.abs(expected - in_float).max() > 1e-3 * np.abs(in_float).max()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if arch not in EXACT])
def test_gates_and_swishes_round_alike_but_at_borders(arch: str, float_models: dict[str, onnx.ModelProto]) -> None:
    model = cpu_form(float_models[arch])
    plan, table = table_of(model)
    expected = codes_of_file(write_int8(model, plan, table), plan, BATCH[:16])
    codes = codes_of_graph(TorchGraph(model, plan, table), plan, table, BATCH[:16])
    alike = [name for name in plan.tensors if codes[name].shape == expected[name].shape]
    assert len(alike) >= 0.75 * len(plan.tensors)
    differ = np.concatenate([(codes[name] != expected[name]).ravel() for name in alike])
    assert differ.mean() <= 0.02  # a rounding forgotten or too many is seen in half of them


def test_what_is_left_in_float_is_not_rounded(float_models: dict[str, onnx.ModelProto]) -> None:
    model, x = float_models["mobilenet-v2"], torch.from_numpy(BATCH[:4])
    plan, table = table_of(model)
    graph = TorchGraph(model, plan, table)
    with torch.inference_mode():
        rounded = graph(x)
        graph.float_tensors, graph.float_layers = frozenset(plan.tensors), plan.layers
        found = graph(x)
        graph.float_layers = frozenset()
        weights_rounded = graph(x)
        expected = TorchGraph(model)(x)
    assert torch.equal(found, expected)
    assert not torch.equal(weights_rounded, expected)
    assert not torch.equal(weights_rounded, rounded)


def test_a_tensor_is_let_go_of_once_it_is_rounded(
    float_models: dict[str, onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads it unrounded: to keep all of them would take the memory of the whole network at once."""
    model = float_models["mobilenet-v2"]
    plan, table = table_of(model)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def rounds(x: torch.Tensor, u8: U8) -> torch.Tensor:
        nonlocal most
        alive.append(weakref.ref(x))
        most = max(most, sum(each() is not None for each in alive))
        return round_u8(x, u8)

    graph = TorchGraph(model, plan, table)
    monkeypatch.setattr(torch_graph, "round_u8", rounds)
    with torch.inference_mode():
        graph(torch.from_numpy(BATCH[:2]))
    assert len(alive) == len(plan.tensors) > 30
    assert most <= 2, "the image, which the caller holds, and the one that is being rounded"


def test_tensors_called_like_rounded_ones() -> None:
    """The keys of rounded tensors are looked up: the graph may have one called "a_dq"."""
    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32)[:, :, None, None], "a.weight")
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], name="a"),
        helper.make_node("Conv", ["a", "a.weight"], ["a_dq"], name="a_dq"),
        helper.make_node("Add", ["a", "a_dq"], ["logits"], name="add"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 4, 4]) for name in ("input", "logits")]
    model = helper.make_model(helper.make_graph(nodes, "one", value[:1], value[1:], [weight]))
    plan = Plan(layers=frozenset({"a", "a_dq"}), tensors=("input", "a"), made=frozenset({"a"}))
    spans = {"input": (-1.0, 1.0), "a": (-0.5, 0.5)}
    graph = TorchGraph(model, plan, RangeTable(spans, natural_weight_scales(model, plan.layers)))
    x = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    with torch.inference_mode():
        found, seen = graph.watch(x, ["a_dq", "a_dq_2"])
    a = round_u8(round_u8(x, U8.over((-1.0, 1.0))), U8.over((-0.5, 0.5)))
    assert torch.equal(seen["a_dq_2"], a)
    assert torch.allclose(seen["a_dq"], a, atol=1e-6)
    assert torch.allclose(found, 2 * a, atol=1e-6)


def test_parameters_are_the_files_weights_and_go_back_into_it(float_models: dict[str, onnx.ModelProto]) -> None:
    model = float_models["mobilenet-v2"]
    graph = TorchGraph(model)
    assert {"head.weight", "head.bias"} <= set(graph.weights)
    assert len(graph.weights) == 2 * sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node)
    for one, other in zip(graph.to_onnx(model).graph.initializer, model.graph.initializer, strict=True):
        assert np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    with torch.no_grad():
        graph.weights["head.bias"] += 1.0
    before, after = (run_onnx(each.SerializeToString(), BATCH[:4]) for each in (model, graph.to_onnx(model)))
    assert np.allclose(after, before + 1.0, atol=1e-5)


def test_an_unknown_operator_is_named() -> None:
    node = helper.make_node("Erf", ["input"], ["logits"], name="gelu")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("input", "logits")]
    model = helper.make_model(helper.make_graph([node], "one", value[:1], value[1:]))
    with pytest.raises(ExportError, match="gelu is a Erf"):
        TorchGraph(model)
