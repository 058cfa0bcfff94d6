"""The float graph as the CPU's INT8 file is planned on it: the same function, in operators with an integer kernel.

HardSwish becomes its definition, x * HardSigmoid(x): two integer kernels, and the gate in between has a name.
TensorRT knows the one operator better, so `trt_form` takes that step back.
"""

import onnx
from onnx import helper

from kdedge_export.graph import Graph, prune

__all__ = ["cpu_form", "trt_form"]

GATE = ":gate"


def cpu_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """A rewritten copy with the same outputs: HardSwish X is HardSigmoid `X:gate` and Mul X, all else as it was."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.extend(_apart(node) if node.op_type == "HardSwish" else [node])
    return _with_nodes(model, nodes)


def trt_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """A rewritten copy with the same outputs: what `cpu_form` took apart is one HardSwish X again."""
    graph = Graph(model)
    products = {node.name: node for node in graph.nodes if _is_whole(node, graph)}
    gates = {f"{name}{GATE}" for name in products}
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.name in products:
            nodes.append(helper.make_node("HardSwish", node.input[:1], node.output, name=node.name))
        elif node.name not in gates:
            nodes.append(node)
    return _with_nodes(model, nodes)


def _apart(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    gate = f"{node.name}{GATE}"
    return [
        helper.make_node("HardSigmoid", node.input, [gate], name=gate, alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", [node.input[0], gate], node.output, name=node.name),
    ]


def _is_whole(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether `node` is the Mul of a pair that `cpu_form` made."""
    gate = f"{node.name}{GATE}"
    maker = graph.producer.get(gate)
    return (
        node.op_type == "Mul"
        and maker is not None
        and maker.op_type == "HardSigmoid"
        and list(node.input) == [maker.input[0], gate]
        and graph.only_reader(gate) is node
    )


def _with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    prune(copy, nodes)
    onnx.checker.check_model(copy, full_check=True)
    return copy
