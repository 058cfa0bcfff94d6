"""The INT8 file for strongly typed TensorRT (11.x): the same Q/DQ, the body in FP16, opset 20 and IR 10.

TensorRT 11 runs every tensor in the type that the graph gives it, so a float32 body would run in float32. A scale must
have the type of what it scales (QuantizeLinear, opset 19 to 22), so scales are float16 too. Rounding a scale costs
nothing but a slightly other grid, since Q and DQ share it; weights are rounded to codes of that very grid, and the same
codes are read back, below half's normal range as well.
"""

import numpy as np
import numpy.typing as npt
import onnx
from onnx import defs, helper

from kdedge.errors import ExportError
from kdedge_export.graph import attribute, constant_tensor, names_of, unique
from kdedge_export.table import RangeTable
from kdedge_export.trt.fp16 import HALF_MAX, half_body
from kdedge_export.trt.plan import TrtPlan
from kdedge_export.trt.qdq import insert_pairs

__all__ = ["TYPED_IR", "TYPED_OPSET", "to_opset_20", "write_trt_fp16"]

TYPED_OPSET, TYPED_IR = 20, 10
HALF_SMALLEST = 2.0**-24
# Between 17 and 20 these gained types, or an input or attribute that is left out here.
_UNCHANGED = ("AveragePool", "Cast", "Constant", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Shape")
_REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare")


def write_trt_fp16(model: onnx.ModelProto, plan: TrtPlan, table: RangeTable) -> onnx.ModelProto:
    """A copy of the float `model` (opset 17) with Q/DQ where `plan` has them and an FP16 body, float32 at its ends.

    ExportError names a tensor or a weight that does not fit into half.
    """
    scales = {name: float(_half_scales(name, np.float32(scale))) for name, scale in plan.scales(table).items()}
    weights = {name: _half_scales(f"{name}.weight", table.weight_scales[name]) for name in plan.weighted}
    return half_body(to_opset_20(insert_pairs(model, plan, scales, weights)))


def _half_scales(name: str, scales: npt.NDArray[np.float32] | np.float32) -> npt.NDArray[np.float32]:
    """The nearest float16 of `scales` that clips nothing, as float32: never 0, and the code 127 fits into half too.

    Below half's normal range the nearest may be a tenth smaller, and the largest values would lie beyond the code 127.
    """
    largest = 127 * float(np.max(scales))
    if not largest <= HALF_MAX:
        raise ExportError(
            f"The values of {name} reach {largest:.4g}, and FP16 ends at {HALF_MAX:g}. "
            "Export for TensorRT without FP16, or train with weight decay."
        )
    nearest = np.maximum(np.asarray(scales, np.float16), np.float16(HALF_SMALLEST))
    clips = 127 * np.asarray(scales, np.float32) > 127.5 * nearest.astype(np.float32)
    return np.asarray(np.where(clips, np.nextafter(nearest, np.float16(np.inf)), nearest), np.float32)


def to_opset_20(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model`, which is of opset 17. ExportError for an operator that means something else at 20."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "Split" and len(node.input) < 2:
            node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
        elif node.op_type in _REDUCTIONS:
            _axes_to_input(node, copy)
        elif not _is_unchanged(node):
            raise ExportError(
                f"{node.op_type} {node.name} has another meaning in opset {TYPED_OPSET}, which strongly typed TensorRT "
                "needs. Rewrite that layer, or export for TensorRT without FP16."
            )
    copy.opset_import[0].version = TYPED_OPSET
    copy.ir_version = TYPED_IR
    return copy


def _is_unchanged(node: onnx.NodeProto) -> bool:
    before, after = (defs.get_schema(node.op_type, version).since_version for version in (17, TYPED_OPSET))
    only_gained = node.op_type == "Split" or (node.op_type == "Pad" and len(node.input) <= 3)
    return bool(before == after or only_gained or node.op_type in _UNCHANGED)


def _axes_to_input(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    axes = attribute(node, "axes")
    if axes is None:
        return
    name = unique(f"{node.name}_axes", names_of(model))
    model.graph.initializer.append(constant_tensor(name, np.array(axes, np.int64)))
    node.input.append(name)
    kept = [each for each in node.attribute if each.name != "axes"]
    del node.attribute[:]
    node.attribute.extend(kept)
