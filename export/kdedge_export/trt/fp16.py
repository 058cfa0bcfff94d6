"""FP16 files: the body in half precision, the interface as it was. And what of a network does not fit into half.

The casts stand at the input and at the output, so that a caller feeds every file of a bundle the same float32 bytes; a
GPU runs them inside its first and last kernel.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdedge.errors import ExportError
from kdedge_export.graph import Graph, constant_tensor, names_of, unique
from kdedge_export.sessions import open_session

__all__ = ["HALF_MAX", "half_body", "overflowing", "write_fp16"]

HALF_MAX = 65504.0  # the largest float16
HEADROOM = 2.0  # images that were not looked at may reach further


def write_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float `model` with weights and body in half precision, opset 17 and IR 8 as before, float32 at its ends.

    ExportError names a weight that does not fit into half, or an operator that has no form in it.
    """
    return half_body(model)


def overflowing(model: onnx.ModelProto, batches: Iterable[npt.NDArray[np.float32]]) -> dict[str, float]:
    """The largest magnitude of each activation of the float `model` that comes near half's limit on real images.

    `batches`: float32 [N, C, H, W], normalised. Near is half of 65504, since other images may reach further.
    """
    known = onnx.shape_inference.infer_shapes(model)
    floats = [each.name for each in known.graph.value_info if each.type.tensor_type.elem_type == TensorProto.FLOAT]
    watched = [*floats, *(each.name for each in model.graph.output)]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in floats)
    session = open_session(copy.SerializeToString())
    largest = dict.fromkeys(watched, 0.0)
    for batch in batches:
        for name, value in zip(watched, session.run(watched, {session.get_inputs()[0].name: batch}), strict=True):
            largest[name] = max(largest[name], float(np.abs(value).max()))
    return {name: value for name, value in largest.items() if not value <= HALF_MAX / HEADROOM}


def half_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` in which every float32 tensor but inputs and outputs is a float16."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _halve_constants(copy)
    for node in copy.graph.node:
        if node.op_type == "Cast":
            for each in node.attribute:
                if each.name == "to" and each.i == TensorProto.FLOAT:
                    each.i = TensorProto.FLOAT16
    _cast_ends(copy)
    del copy.graph.value_info[:]
    try:
        onnx.checker.check_model(copy, full_check=True)
    except Exception as error:  # the checker raises three kinds
        raise ExportError(
            f"This model has no form in FP16: {str(error).strip().splitlines()[0]}. "
            "A network of convolutions, poolings and linear layers was expected; export it without FP16."
        ) from error
    return copy


def _halve_constants(model: onnx.ModelProto) -> None:
    bounds = {name for node in model.graph.node if node.op_type == "Clip" for name in node.input[1:]}
    for each in model.graph.initializer:
        if each.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(each)
            if each.name in bounds:  # half has nothing beyond its limit that would have to be clipped
                value = np.clip(value, -HALF_MAX, HALF_MAX)
            each.CopyFrom(constant_tensor(each.name, _half(each.name, value)))
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                value = numpy_helper.to_array(attribute.t)
                attribute.t.CopyFrom(constant_tensor(attribute.t.name, _half(node.output[0], value)))


def _half(name: str, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    largest = float(np.abs(value).max()) if value.size else 0.0
    if not largest <= HALF_MAX:
        raise ExportError(
            f"The constant {name} holds {largest:.4g}, and FP16 ends at {HALF_MAX:g}. "
            "Export without FP16, or train with weight decay."
        )
    return value.astype(np.float16)


def _cast_ends(model: onnx.ModelProto) -> None:
    """Cast behind each float32 input and in front of each float32 output; their names stay with the interface."""
    initializers, taken = Graph(model).initializers, names_of(model)
    inside: dict[str, str] = {}
    casts: list[onnx.NodeProto] = []
    for each in model.graph.input:
        if each.type.tensor_type.elem_type == TensorProto.FLOAT and each.name not in initializers:
            inside[each.name] = unique(f"{each.name}_half", taken)
            names = [each.name], [inside[each.name]]
            casts.append(helper.make_node("Cast", *names, name=f"{each.name}_to_half", to=TensorProto.FLOAT16))
    first = len(casts)
    for each in model.graph.output:
        if each.type.tensor_type.elem_type == TensorProto.FLOAT:
            inside[each.name] = unique(f"{each.name}_half", taken)
            names = [inside[each.name]], [each.name]
            casts.append(helper.make_node("Cast", *names, name=f"{each.name}_to_float", to=TensorProto.FLOAT))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = inside.get(name, name)
        for place, name in enumerate(node.output):
            node.output[place] = inside.get(name, name)
    nodes = [*casts[:first], *model.graph.node, *casts[first:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
