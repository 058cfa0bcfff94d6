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
from kdedge_export.graph import Graph, constant_tensor, names_of, prune, unique
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
        self.taken = names_of(model)  # a layer may be called "c_q" beside another called "c"
        self.rounded: dict[str, str] = {}  # tensor -> what its DQ makes

    def add(self, node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for place in self.plan.reads.get(node.name, ()):
            copy.input[place] = self.rounded[node.input[place]]
        if node.name in self.plan.weighted:
            copy.input[1] = self._weight(node)
        self.nodes.append(copy)
        for name in node.output:
            self.quantize(name)

    def quantize(self, name: str) -> None:
        """Q and DQ behind the tensor `name`, where the plan wants them."""
        if name in self.scales:
            self.rounded[name] = self._pair(name, np.array(self.scales[name], np.float32))

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
        name = self._constant(f"{node.name}.weight_rounded", (codes * steps).astype(np.float32))
        return self._pair(name, scales, axis)

    def _pair(self, name: str, scale: npt.NDArray[np.float32], axis: int | None = None) -> str:
        scales = self._constant(f"{name}_scale", scale)
        zeros = self._constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8))
        codes, values, quantizer, restorer = (self._own(f"{name}_{end}") for end in ("q", "dq", "Q", "DQ"))
        along = {} if axis is None else {"axis": axis}
        self.nodes += [
            helper.make_node("QuantizeLinear", [name, scales, zeros], [codes], name=quantizer, **along),
            helper.make_node("DequantizeLinear", [codes, scales, zeros], [values], name=restorer, **along),
        ]
        return values

    def _own(self, wanted: str) -> str:
        name = unique(wanted, self.taken)
        self.taken.add(name)
        return name

    def _constant(self, wanted: str, value: npt.NDArray[np.generic]) -> str:
        name = self._own(wanted)
        self.copy.graph.initializer.append(constant_tensor(name, value))
        return name
