"""The INT8 file for TensorRT 8.5 to 10.x (and OpenVINO), written from a float model, a plan and a range table.

Activations S8 symmetric, one scale a tensor; weights S8 symmetric, one scale an output channel, left as floats in front
of their own Q/DQ: TensorRT 8.5 refuses INT8 initializers. Biases stay float: it refuses an INT32 bias too. Every Q and
DQ has its zero point, which TensorRT up to 8.6 demands. The body is FP32; TensorRT chooses FP16 where that is faster.

Without graph optimizations ONNX Runtime computes this file with the device's numerics (`emulate.py`).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from kdedge.errors import BugError
from kdedge_export.graph import Graph, constant_tensor, prune
from kdedge_export.table import RangeTable
from kdedge_export.trt.plan import TrtPlan
from kdedge_export.trt.rules import weight_axis

__all__ = ["insert_pairs", "write_trt"]

Scales = npt.NDArray[np.float32]


def write_trt(model: onnx.ModelProto, plan: TrtPlan, table: RangeTable) -> onnx.ModelProto:
    """A copy of the float `model`, opset 17 and IR 8, with Q/DQ where `plan` has them.

    Inputs and outputs keep their names and types, and the batch stays open. BugError where the table lacks a tensor.
    """
    return insert_pairs(model, plan, plan.scales(table), table.weight_scales)


def insert_pairs(
    model: onnx.ModelProto, plan: TrtPlan, scales: Mapping[str, float], weight_scales: Mapping[str, Scales]
) -> onnx.ModelProto:
    """`model` with Q/DQ at `scales` (of tensors) and `weight_scales` (of layers, float32 [output channels])."""
    writer = _Writer(model, plan, scales, weight_scales)
    for name in writer.graph.inputs:
        writer.quantize(name)
    for node in writer.graph.nodes:
        writer.add(node)
    prune(writer.copy, writer.nodes)
    onnx.checker.check_model(writer.copy, full_check=True)
    return writer.copy


class _Writer:
    def __init__(
        self, model: onnx.ModelProto, plan: TrtPlan, scales: Mapping[str, float], weight_scales: Mapping[str, Scales]
    ) -> None:
        self.copy = onnx.ModelProto()
        self.copy.CopyFrom(model)
        self.graph = Graph(model)
        self.plan = plan
        self.scales = scales
        self.weight_scales = weight_scales
        self.nodes: list[onnx.NodeProto] = []

    def add(self, node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for place in self.plan.reads.get(node.name, ()):
            copy.input[place] = f"{node.input[place]}_dq"
        if node.name in self.plan.weighted:
            copy.input[1] = self._weight(node)
        self.nodes.append(copy)
        for name in node.output:
            self.quantize(name)

    def quantize(self, name: str) -> None:
        """Q and DQ behind the tensor `name`, where the plan wants them."""
        if name in self.scales:
            self._pair(name, np.array(self.scales[name], np.float32))

    def _weight(self, node: onnx.NodeProto) -> str:
        weight = self.graph.constant(node.input[1])
        scales = self.weight_scales.get(node.name)
        axis = weight_axis(node)
        if weight is None or scales is None or len(scales) != weight.shape[axis]:
            raise BugError(f"{node.name} is planned as INT8 for TensorRT, but the range table has no scales for it")
        shape = [1] * weight.ndim
        shape[axis] = -1
        steps = scales.astype(np.float64).reshape(shape)
        # Already on the grid, so that no rounding of the reader decides; TensorRT's weights end at -127, not at -128.
        codes = np.clip(np.rint(weight / steps), -127, 127)
        # Named after the layer: two layers that share a weight may still need two scales.
        name = f"{node.name}.weight_rounded"
        self._constant(name, (codes * steps).astype(np.float32))
        return self._pair(name, scales, axis)

    def _pair(self, name: str, scale: npt.NDArray[np.float32], axis: int | None = None) -> str:
        self._constant(f"{name}_scale", scale)
        self._constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8))
        parameters = [f"{name}_scale", f"{name}_zero_point"]
        along = {} if axis is None else {"axis": axis}
        quantize = helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}_q"], name=f"{name}_Q", **along)
        restore = helper.make_node(
            "DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_dq"], name=f"{name}_DQ", **along
        )
        self.nodes.extend([quantize, restore])
        return f"{name}_dq"

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> None:
        self.copy.graph.initializer.append(constant_tensor(name, value))
