"""Opset 18 and later -> opset 17 and IR 8, which all readers from ONNX Runtime 1.16 and TensorRT 8.5 on understand.

The version number is not the point: TensorRT 8.5 and 8.6 read opset 18's ReduceMean without its axes *input* and
average over everything, the batch included, without an error.
"""

import numpy as np
import onnx
from onnx import defs, helper

from kdedge.errors import ExportError
from kdedge_export.float_form.onnx_file import opset_of
from kdedge_export.graph import Graph, attribute, prune, unique

__all__ = ["IR", "OPSET", "to_opset_17"]

OPSET, IR = 17, 8
# From 18 on these have their axes as an input; rewritten here, as is Split's num_outputs.
_REDUCTIONS: tuple[str, ...] = (
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
)
_REDUCTIONS += ("ReduceLogSum", "ReduceLogSumExp")


def to_opset_17(model: onnx.ModelProto) -> onnx.ModelProto:
    """A rewritten copy. Nodes are named after their layers, and the exporter's notes are gone.

    ReduceMean over height and width becomes GlobalAveragePool (which has a quantized kernel), other ReduceMean carries
    its axes as an attribute, Split loses num_outputs.

    Raises ExportError for an operator that opset 17 does not have in the same form.
    """
    opset = opset_of(model)
    for node in model.graph.node:
        _require_known(node, opset)
    copy = onnx.ModelProto()
    copy.CopyFrom(onnx.shape_inference.infer_shapes(model))
    ranks = _ranks(copy)
    graph = Graph(copy)
    nodes: list[onnx.NodeProto] = []
    same: dict[str, str] = {}  # what a node without effect made -> what it made it of
    for node in graph.nodes:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        if _is_pointless(node, graph):
            same[node.output[0]] = node.input[0]
        elif node.op_type in _REDUCTIONS:
            nodes.extend(_reduce(node, graph, ranks))
        elif node.op_type == "Split":
            nodes.append(_split(node, copy))
        elif node.op_type == "Reshape":
            nodes.append(_reshape(node, graph))
        else:
            nodes.append(node)
    prune(copy, nodes)
    _strip(copy)
    del copy.opset_import[:]
    copy.opset_import.add(domain="", version=OPSET)
    copy.ir_version = IR
    return copy


def _require_known(node: onnx.NodeProto, opset: int) -> None:
    if node.domain not in ("", "ai.onnx"):
        raise ExportError(
            f"The operator {node.domain}.{node.op_type} is not part of ONNX; rewrite that layer of the model."
        )
    if node.op_type not in (*_REDUCTIONS, "Split") and not _known_before(node, opset):
        raise ExportError(
            f"The operator {node.op_type} of node {node.name} has no form in opset {OPSET}, which boards read; "
            "replace that layer of the model."
        )


def _known_before(node: onnx.NodeProto, opset: int) -> bool:
    """Whether opset 17 has every input and attribute that `node` uses: most operators only gained types since."""
    try:
        old, new = defs.get_schema(node.op_type, OPSET, ""), defs.get_schema(node.op_type, max(opset, OPSET), "")
    except defs.SchemaError:
        return False
    used = {each.name for each in node.attribute}
    fits = len(node.input) <= old.max_input and used <= set(old.attributes)
    return bool(old.since_version == new.since_version or (fits and node.op_type != "GridSample"))  # its modes changed


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    infos = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    return {
        each.name: len(each.type.tensor_type.shape.dim) for each in infos if each.type.tensor_type.HasField("shape")
    }


def _is_pointless(node: onnx.NodeProto, graph: Graph) -> bool:
    """A pooling over one pixel in steps of one: what is left of a halving that small images do without."""
    one = node.op_type in ("MaxPool", "AveragePool") and set(attribute(node, "kernel_shape")) == {1}
    moved = set(attribute(node, "strides", [1])) != {1} or any(attribute(node, "pads", []))
    return one and not moved and len(node.output) == 1 and node.output[0] not in graph.outputs


def _reduce(node: onnx.NodeProto, graph: Graph, ranks: dict[str, int]) -> list[onnx.NodeProto]:
    source, output = node.input[0], node.output[0]
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        axes = graph.constant(node.input[1])
        if axes is None:
            raise ExportError(
                f"{node.op_type} {node.name} has computed axes; constant ones were expected. Rewrite that layer."
            )
    keep = bool(attribute(node, "keepdims", 1))
    if axes is None:  # over everything
        return [helper.make_node(node.op_type, [source], [output], name=node.name, keepdims=int(keep))]
    rank = ranks.get(source)
    chosen = sorted(int(axis) if axis >= 0 or rank is None else int(axis) + rank for axis in axes)
    if node.op_type == "ReduceMean" and rank == 4 and chosen == [2, 3]:
        if keep:
            return [helper.make_node("GlobalAveragePool", [source], [output], name=node.name)]
        pooled = unique(f"{output}_pooled", {*graph.producer, *graph.initializers})
        return [
            helper.make_node("GlobalAveragePool", [source], [pooled], name=node.name),
            helper.make_node("Flatten", [pooled], [output], name=f"{node.name}_flatten", axis=1),
        ]
    return [helper.make_node(node.op_type, [source], [output], name=node.name, axes=chosen, keepdims=int(keep))]


def _split(node: onnx.NodeProto, model: onnx.ModelProto) -> onnx.NodeProto:
    """Without sizes Split cuts equal parts; opset 18's num_outputs also allowed a shorter last one."""
    if len(node.input) > 1 and node.input[1]:
        return node
    axis = attribute(node, "axis", 0)
    known = [*model.graph.input, *model.graph.value_info]
    shapes = {each.name: each.type.tensor_type.shape.dim for each in known}
    dims = shapes.get(node.input[0])
    if dims is None or dims[axis].dim_value % len(node.output) or dims[axis].dim_value == 0:
        raise ExportError(f"Split {node.name} does not cut equal parts; torch.chunk into equal parts was expected.")
    return helper.make_node("Split", node.input[:1], node.output, name=node.name, axis=axis)


def _reshape(node: onnx.NodeProto, graph: Graph) -> onnx.NodeProto:
    """Behind a pooling that leaves 1 x 1, a reshape to [N, C] is a Flatten, which every quantizer passes through."""
    shape = graph.constant(node.input[1])
    producer = graph.producer.get(node.input[0])
    pooled = producer is not None and producer.op_type in ("ReduceMean", "GlobalAveragePool")
    if pooled and shape is not None and len(shape) == 2 and np.asarray(shape)[0] in (-1, 0):
        return helper.make_node("Flatten", node.input[:1], node.output, name=node.name, axis=1)
    return node


def _rename(model: onnx.ModelProto) -> None:
    """A node is called after the layer of its weights, else its operator; a tensor after the node that makes it."""
    graph = Graph(model)
    taken = {*graph.inputs, *graph.outputs, *graph.initializers}
    tensors: dict[str, str] = {}
    for index, node in enumerate(model.graph.node):
        weight = node.input[1] if len(node.input) > 1 and node.op_type in ("Conv", "Gemm") else ""
        layer = weight.removesuffix(".weight") if weight in graph.initializers else weight
        named = layer != weight and layer not in taken
        node.name = layer if named else unique(f"{node.op_type}_{index}", taken)
        taken.add(node.name)
        for place, name in enumerate(node.input):
            node.input[place] = tensors.get(name, name)
        for place, name in enumerate(node.output):
            if name and name not in graph.outputs:
                tensors[name] = node.name if place == 0 else unique(f"{node.name}:{place}", taken)
                taken.add(tensors[name])
                node.output[place] = tensors[name]


def _strip(model: onnx.ModelProto) -> None:
    """Layer names from weights. The notes hold stack traces with paths of this machine, in a field IR 8 lacks."""
    _rename(model)
    for node in model.graph.node:
        node.doc_string = ""
        node.ClearField("metadata_props")
    for each in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        each.doc_string = ""
        each.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    model.ClearField("functions")
    model.graph.name = "kdedge"
    model.doc_string = model.graph.doc_string = ""
    model.producer_name, model.producer_version = "kdedge", ""
