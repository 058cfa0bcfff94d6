"""The form of an exported graph, checked on every export; it stands in for the readers that we cannot run here.

A rule that does not hold is a mistake of ours, so it is told as a BugError.
"""

from collections.abc import Iterator

import numpy as np
import onnx

from kdedge.errors import BugError
from kdedge_export.cpu.plan import ELEMENTWISE, MOVES
from kdedge_export.float_form.rewrite import IR, OPSET
from kdedge_export.graph import Graph, attribute, input_channels
from kdedge_export.table import U8

__all__ = ["lint_float", "lint_int8", "require_clean"]

_ACTIVATIONS = ("Relu", "Clip", "HardSigmoid")
_INTEGER_OPS = ("Sigmoid", *ELEMENTWISE, *MOVES)
_GATE = U8.over((0.0, 1.0))


def require_clean(problems: list[str], file: str) -> None:
    if problems:
        raise BugError(f"{file} breaks {len(problems)} rules of its form, first: {'; '.join(problems[:5])}")


def lint_float(model: onnx.ModelProto) -> list[str]:
    """Rules of every file: opset 17, IR 8, float input and output with only the batch open, nothing of opset 18."""
    return list(_every_file(model))


def lint_int8(model: onnx.ModelProto, kept_float: frozenset[str] = frozenset()) -> list[str]:
    """Rules of the INT8 file for ONNX Runtime on a CPU; `kept_float` names the layers that may stay as they were."""
    graph = Graph(model)
    problems = list(_every_file(model))
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear":
            problems.extend(_quantize(node, graph))
        elif node.op_type == "DequantizeLinear":
            problems.extend(_dequantize(node, graph))
        elif node.op_type in ("Conv", "Gemm"):
            problems.extend(_weighted(node, graph, kept_float))
        elif node.op_type in _INTEGER_OPS and node.name not in kept_float:
            problems.extend(_follower(node, graph))
        elif node.op_type in ("HardSigmoid", "HardSwish") and node.name not in kept_float:
            problems.append(f"{node.name}: {node.op_type} has no integer kernel; an Add or a bias does its work")
    return problems


def _every_file(model: onnx.ModelProto) -> Iterator[str]:
    if [(each.domain, each.version) for each in model.opset_import] != [("", OPSET)]:
        yield f"opset is not {OPSET} alone"
    if model.ir_version != IR:
        yield f"IR version is {model.ir_version}, not {IR}"
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            yield f"{value.name} is not float32"
        if not dims or not dims[0].dim_param or any(not dim.dim_value for dim in dims[1:]):
            yield f"{value.name} has another open axis than the batch"
    for node in model.graph.node:
        if node.op_type == "ReduceMean" and len(node.input) > 1:
            yield f"{node.name} has its axes as an input, as in opset 18"
        if node.op_type == "Split" and attribute(node, "num_outputs") is not None:
            yield f"{node.name} has num_outputs, as in opset 18"
        if node.metadata_props or node.doc_string:
            yield f"{node.name} carries notes of the exporter"


def _quantize(node: onnx.NodeProto, graph: Graph) -> Iterator[str]:
    scale, zero = (graph.constant(name) for name in node.input[1:3])
    if scale is None or scale.ndim or not np.isfinite(scale) or scale <= 0:
        yield f"{node.name}: the scale is not one positive number"
    if zero is None or zero.ndim or zero.dtype != np.uint8:
        yield f"{node.name}: the zero point is not one uint8"
    readers = graph.readers(node.output[0])
    if not readers or any(each.op_type != "DequantizeLinear" for each in readers):
        yield f"{node.name}: it is not read by DequantizeLinear alone"
    if not all(_same_scale(node, each, graph) or _is_gate(node, each, graph) for each in readers):
        yield f"{node.name}: its DequantizeLinear has another scale, and it is no hard sigmoid's"
    producer = graph.producer.get(node.input[0])
    before = (
        graph.producer.get(producer.input[0]) if producer is not None and producer.op_type in _ACTIVATIONS else None
    )
    if before is not None and before.op_type in ("Conv", "Gemm", "Add") and _from_integers(before, graph):
        yield f"{node.name}: {before.op_type} {before.name} is kept from it by {producer.op_type if producer else ''}"


def _same_scale(quantize: onnx.NodeProto, dequantize: onnx.NodeProto, graph: Graph) -> bool:
    """One for one, or told once for each channel, which is how a float layer has to read it."""
    for mine, theirs in zip(quantize.input[1:3], dequantize.input[1:3], strict=True):
        one, each = graph.constant(mine), graph.constant(theirs)
        if one is None or each is None or not (each == one).all():
            return False
    return True


def _is_gate(quantize: onnx.NodeProto, dequantize: onnx.NodeProto, graph: Graph) -> bool:
    """A hard sigmoid: what a Conv, Gemm or Add made is cut to 256 codes from 0 on, and read as 0 to 1."""
    producer = graph.producer.get(quantize.input[0])
    scale, zero = (graph.constant(name) for name in dequantize.input[1:3])
    before = graph.constant(quantize.input[2])
    if producer is None or producer.op_type not in ("Conv", "Gemm", "Add"):
        return False
    if scale is None or zero is None or before is None or scale.ndim:
        return False
    return bool(scale == np.float32(_GATE.scale) and zero == before == _GATE.zero_point)


def _dequantize(node: onnx.NodeProto, graph: Graph) -> Iterator[str]:
    codes, scale, zero = (graph.constant(name) for name in node.input[:3])
    if codes is None:
        return
    if codes.ndim == 0:  # the shift of a hard sigmoid
        exact = zero is not None and (int(codes), int(zero)) in ((1, 0), (0, 1), (0, 0))
        if codes.dtype != np.uint8 or not exact or scale is None or not scale > 0:
            yield f"{node.name}: a constant to add is not one code of its own scale"
        return
    if scale is None or scale.shape != (len(codes),) or attribute(node, "axis", 1) != 0:
        yield f"{node.name}: not one scale for each output channel along axis 0"
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"{node.name}: a scale is not positive"
    if codes.dtype not in (np.int8, np.int32) or zero is None or zero.dtype != codes.dtype or zero.any():
        yield f"{node.name}: a constant is not symmetric int8 or int32"
    if codes.dtype == np.int8 and codes.size and int(codes.min()) < -127:
        yield f"{node.name}: a weight is -128"


def _from_integers(node: onnx.NodeProto, graph: Graph) -> bool:
    read = node.input[:1] if node.op_type in MOVES else node.input
    return all(
        (producer := graph.producer.get(name)) is not None and producer.op_type == "DequantizeLinear"
        for name in read
        if name
    )


def _weighted(node: onnx.NodeProto, graph: Graph, kept_float: frozenset[str]) -> Iterator[str]:
    if node.name in kept_float:
        yield from _float_reader(node, graph)
        return
    if not _from_integers(node, graph):
        yield f"{node.name}: an input, weight or bias of it is not dequantized"
        return
    sources = [graph.producer[name] for name in node.input if name]
    scales = [graph.constant(source.input[1]) for source in sources]
    if len(scales) == 3 and not np.array_equal(scales[2], np.float32(scales[0]) * scales[1]):  # type: ignore[operator,arg-type]
        yield f"{node.name}: the bias is not in units of input scale x weight scale"
    reader = graph.only_reader(node.output[0])
    if node.op_type == "Conv" and (reader is None or reader.op_type != "QuantizeLinear"):
        yield f"{node.name}: its output is not quantized at once"


def _float_reader(node: onnx.NodeProto, graph: Graph) -> Iterator[str]:
    """ONNX Runtime quantizes the weights of what reads a DequantizeLinear of one scale, with one scale for all."""
    source, weight = graph.producer.get(node.input[0]), graph.constant(node.input[1])
    if source is None or source.op_type != "DequantizeLinear" or weight is None or input_channels(node, weight) < 2:
        return
    scale = graph.constant(source.input[1])
    if scale is None or scale.size == 1:
        yield f"{node.name}: it is left in float behind one scale, so ONNX Runtime would quantize its weights"


def _follower(node: onnx.NodeProto, graph: Graph) -> Iterator[str]:
    if not _from_integers(node, graph):
        yield f"{node.name}: an input of {node.op_type} is not dequantized"
        return
    for name in node.output:
        reader = graph.only_reader(name)
        if reader is None or reader.op_type != "QuantizeLinear":
            yield f"{node.name}: the output of {node.op_type} is not quantized at once"
        elif node.op_type in MOVES:
            before = [graph.constant(each) for each in graph.producer[node.input[0]].input[1:3]]
            after = [graph.constant(each) for each in reader.input[1:3]]
            if any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True)):  # type: ignore[arg-type]
                yield f"{node.name}: {node.op_type} changes the scale, though it only moves values"
