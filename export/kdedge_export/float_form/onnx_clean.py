"""One spelling of a foreign file before its graph is looked at: no functions, one float type, opset 17 at least."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, inliner, numpy_helper, version_converter

from kdedge.errors import ExportError
from kdedge_export.float_form.onnx_file import opset_of, tensors_of, type_name
from kdedge_export.float_form.rewrite import OPSET

__all__ = ["inlined", "one_opset", "one_type"]

_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def inlined(original: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without functions, notes, and initializers that are inputs too (as before IR 4)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(inliner.inline_local_functions(original) if original.functions else original)
    constants = {each.name for each in copy.graph.initializer}
    inputs = [each for each in copy.graph.input if each.name not in constants]
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    del copy.graph.value_info[:]
    copy.ir_version = max(copy.ir_version, 4)
    taken = {each.name for each in copy.graph.node}
    for index, node in enumerate(copy.graph.node):
        if not node.name:
            node.name = f"{node.op_type}_{index}" if f"{node.op_type}_{index}" not in taken else ""
    return copy


def one_type(model: onnx.ModelProto, notes: list[str]) -> onnx.ModelProto:
    """float16, bfloat16 and float64 become float32, in weights, casts, inputs and outputs."""
    found = {type_name(each.data_type) for each in tensors_of(model.graph) if each.data_type in _FLOATS}
    for tensor in tensors_of(model.graph):
        if tensor.data_type in _FLOATS:
            values = np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for each in node.attribute:
            if each.name in ("to", "dtype") and each.i in _FLOATS:
                each.i = TensorProto.FLOAT
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    if found:
        notes.append(f"Its {' and '.join(sorted(found))} weights became float32.")
    return model


def one_opset(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    if opset_of(model) >= OPSET:
        return model
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises RuntimeError, and what else its operators do
        raise ExportError(
            f"{path} has opset {opset_of(model)}, which cannot be brought to {OPSET} "
            f"({' '.join(str(error).split())[:200]}). Export the model again, at opset {OPSET}."
        ) from None
    return converted
