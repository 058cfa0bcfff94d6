"""The INT8 file for ONNX Runtime on a CPU, written from a float model, a plan and a range table.

Activations U8 asymmetric, one scale a tensor; weights S8 symmetric, one scale an output channel; biases INT32. Weights
are stored as integers (a quarter of the bytes). Every quantized tensor is followed by QuantizeLinear and
DequantizeLinear, which ONNX Runtime folds into its integer kernels.

A HardSigmoid is a change of scale: with c = beta / alpha, the codes of x + c at scale 1 / (255 alpha) and zero point 0
are, saturation included, the codes of HardSigmoid(x) at scale 1 / 255. The + c is the bias of a Conv or Gemm in front,
else an Add of a constant; the scale changes between Q and DQ, so nothing computes it.
"""

import numpy as np
import onnx
from onnx import helper

from kdedge_export.calibration.ranges import quantize_weight
from kdedge_export.cpu.aligned import aligned
from kdedge_export.cpu.columns import in_columns
from kdedge_export.cpu.plan import Plan, hard_sigmoid
from kdedge_export.cpu.unshuffled import unshuffled
from kdedge_export.graph import Graph, constant_tensor, input_channels, prune
from kdedge_export.table import U8, RangeTable

__all__ = ["write_int8"]


def write_int8(model: onnx.ModelProto, plan: Plan, table: RangeTable) -> onnx.ModelProto:
    """A copy of the float `model` with the plan's layers in 8 bits. Inputs and outputs keep their names and types.

    Inner weights and tensors may have more channels than those of `model`, zeros where kernels are faster for it.
    """
    model, plan, table = unshuffled(model, plan, table)
    model, table = aligned(model, table)
    model, plan, table = in_columns(model, plan, table)
    writer = _Writer(model, plan, table)
    for name in writer.graph.inputs:
        writer.quantize(name)
    for node in writer.graph.nodes:
        writer.add(node)
    prune(writer.copy, writer.read())
    onnx.checker.check_model(writer.copy, full_check=True)
    return writer.copy


class _Writer:
    def __init__(self, model: onnx.ModelProto, plan: Plan, table: RangeTable) -> None:
        self.copy = onnx.ModelProto()
        self.copy.CopyFrom(model)
        self.graph = Graph(model)
        self.plan = plan
        self.table = table
        self.nodes: list[onnx.NodeProto] = []
        self.zeros: set[str] = set()
        self.by_channel: set[str] = set()
        self.absorbed = {
            node.input[0]: node.output[0] for node in self.graph.nodes if node.name in plan.absorbed
        }  # what a layer made -> what it makes now that its activation is gone

    def add(self, node: onnx.NodeProto) -> None:
        if node.name in self.plan.absorbed:
            return
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        quantized = node.name in self.plan.layers
        for place, name in enumerate(node.input):
            # A float reader of a float tensor has no use for its rounded form.
            if name in self.plan.tensors and (quantized or name in self.plan.made):
                copy.input[place] = f"{name}_dq"
        if quantized and node.op_type in ("Conv", "Gemm"):
            self._weights(node, copy)
        elif node.op_type in ("Conv", "Gemm") and copy.input[0] != node.input[0]:
            copy.input[0] = self._by_channel(node)
        elif quantized and node.op_type == "HardSigmoid":
            copy = self._shift(node)
        copy.output[0] = self.absorbed.get(node.output[0], node.output[0])
        self.nodes.append(copy)
        for name in copy.output:
            self.quantize(name)

    def quantize(self, name: str) -> None:
        """Q and DQ behind the tensor `name`, where the plan wants them."""
        if name not in self.plan.tensors:
            return
        found = U8.over(self.plan.known[name]) if name in self.plan.known else self.table.u8(name)
        self._constant(f"{name}_scale", np.array(found.scale, np.float32))
        self._constant(f"{name}_zero_point", np.array(found.zero_point, np.uint8))
        parameters = [f"{name}_scale", f"{name}_zero_point"]
        maker = self.graph.producer.get(name)
        before = parameters
        if maker is not None and maker.op_type == "HardSigmoid" and name in self.plan.made:
            self._constant(f"{name}_shifted_scale", np.array(found.scale / hard_sigmoid(maker)[0], np.float32))
            before = [f"{name}_shifted_scale", f"{name}_zero_point"]
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *before], [f"{name}_q"], name=f"{name}_Q"))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_dq"], name=f"{name}_DQ")
        )

    def _by_channel(self, node: onnx.NodeProto) -> str:
        """What a float Conv or Gemm reads of an 8-bit tensor: the same values, by one equal scale a channel.

        Behind a DequantizeLinear of one scale, ONNX Runtime quantizes the float weights of its reader by itself, with
        one scale for all of them (WeightBiasQuantization, from 1.22 or before): a layer left in float for its accuracy
        would lose it all, a depthwise one above all.
        """
        name, weight = node.input[0], self.graph.constant(node.input[1])
        channels = 0 if weight is None else input_channels(node, weight)
        if channels < 2:  # one scale is one scale, and a computed weight is left alone
            return f"{name}_dq"
        made = f"{name}_dq_{channels}"
        if made not in self.by_channel:
            self.by_channel.add(made)
            found = U8.over(self.plan.known[name]) if name in self.plan.known else self.table.u8(name)
            self._constant(f"{made}_scale", np.full(channels, found.scale, np.float32))
            self._constant(f"{made}_zero_point", np.full(channels, found.zero_point, np.uint8))
            inputs = [f"{name}_q", f"{made}_scale", f"{made}_zero_point"]
            self.nodes.append(helper.make_node("DequantizeLinear", inputs, [made], name=f"{made}_DQ", axis=1))
        return made

    def read(self) -> list[onnx.NodeProto]:
        """The nodes, without a DequantizeLinear that nobody reads: ONNX Runtime would run it."""
        wanted = {name for node in self.nodes for name in node.input} | set(self.graph.outputs)
        return [node for node in self.nodes if node.op_type != "DequantizeLinear" or node.output[0] in wanted]

    def _shift(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """x + beta / alpha, the constant as one code of its own scale."""
        alpha, beta = hard_sigmoid(node)
        shift = f"{node.name}_shift"
        self._constant(f"{shift}_q", np.array(beta > 0, np.uint8))
        self._constant(f"{shift}_scale", np.array(abs(beta / alpha) or 1.0, np.float32))
        self._constant(f"{shift}_zero_point", np.array(beta < 0, np.uint8))
        inputs = [f"{shift}_q", f"{shift}_scale", f"{shift}_zero_point"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{shift}_dq"], name=f"{shift}_DQ"))
        return helper.make_node("Add", [f"{node.input[0]}_dq", f"{shift}_dq"], node.output, name=node.name)

    def _weights(self, node: onnx.NodeProto, copy: onnx.NodeProto) -> None:
        weight = self.graph.constant(node.input[1])
        assert weight is not None  # the plan left computed weights in float
        bias = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        activation = self.graph.only_reader(node.output[0])
        if activation is not None and activation.op_type == "HardSigmoid" and activation.name in self.plan.absorbed:
            alpha, beta = hard_sigmoid(activation)
            bias = np.float32(beta / alpha) + (bias if bias is not None else np.zeros(len(weight), np.float32))
            del copy.input[2:]
            copy.input.append("")
        input_scale = self.table.u8(node.input[0]).scale
        codes, scales, integers = quantize_weight(weight, self.table.weight_scales[node.name], bias, input_scale)
        # Named after the layer: two layers that share a weight may still need two scales.
        copy.input[1] = self._dequantized(f"{node.name}.weight_q", codes, scales)
        if integers is not None:
            copy.input[2] = self._dequantized(f"{node.name}.bias_q", integers, np.float32(input_scale) * scales)

    def _dequantized(
        self, name: str, codes: "np.typing.NDArray[np.generic]", scales: "np.typing.NDArray[np.float32]"
    ) -> str:
        self._constant(name, codes)
        self._constant(f"{name}_scale", scales)
        zeros = f"zeros:{codes.dtype}:{len(scales)}"  # shared: of a small network they are several percent of the file
        if zeros not in self.zeros:
            self.zeros.add(zeros)
            self._constant(zeros, np.zeros(len(scales), codes.dtype))
        inputs = [name, f"{name}_scale", zeros]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}_DQ", axis=0))
        return f"{name}_dq"

    def _constant(self, name: str, value: "np.typing.NDArray[np.generic]") -> None:
        self.copy.graph.initializer.append(constant_tensor(name, value))
