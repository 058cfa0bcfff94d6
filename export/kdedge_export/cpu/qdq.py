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
from kdedge_export.graph import Graph, constant_tensor, input_channels, names_of, prune, unique
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
        self.taken = names_of(model)  # a layer may be called "c_q" beside another called "c"
        self.codes: dict[str, str] = {}  # tensor -> what its Q makes
        self.rounded: dict[str, str] = {}  # tensor -> what its DQ makes
        self.zeros: dict[tuple[str, int], str] = {}
        self.by_channel: dict[tuple[str, int], str] = {}
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
                copy.input[place] = self.rounded[name]
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
        found = self._u8(name)
        scale = self._constant(f"{name}_scale", np.array(found.scale, np.float32))
        zero_point = self._constant(f"{name}_zero_point", np.array(found.zero_point, np.uint8))
        maker = self.graph.producer.get(name)
        before = scale
        if maker is not None and maker.op_type == "HardSigmoid" and name in self.plan.made:
            shifted = np.array(found.scale / hard_sigmoid(maker)[0], np.float32)
            before = self._constant(f"{name}_shifted_scale", shifted)
        codes = self._own(f"{name}_q")
        quantizer = self._own(f"{name}_Q")
        self.codes[name] = codes
        self.nodes.append(helper.make_node("QuantizeLinear", [name, before, zero_point], [codes], name=quantizer))
        self.rounded[name] = self._restored(f"{name}_dq", [codes, scale, zero_point])

    def _u8(self, name: str) -> U8:
        return U8.over(self.plan.known[name]) if name in self.plan.known else self.table.u8(name)

    def _by_channel(self, node: onnx.NodeProto) -> str:
        """What a float Conv or Gemm reads of an 8-bit tensor: the same values, by one equal scale a channel.

        Behind a DequantizeLinear of one scale, ONNX Runtime quantizes the float weights of its reader by itself, with
        one scale for all of them (WeightBiasQuantization, from 1.22 or before): a layer left in float for its accuracy
        would lose it all, a depthwise one above all.
        """
        name, weight = node.input[0], self.graph.constant(node.input[1])
        channels = 0 if weight is None else input_channels(node, weight)
        if channels < 2:  # one scale is one scale, and a computed weight is left alone
            return self.rounded[name]
        if (name, channels) not in self.by_channel:
            found, wanted = self._u8(name), f"{name}_dq_{channels}"
            scales = self._constant(f"{wanted}_scale", np.full(channels, found.scale, np.float32))
            zeros = self._constant(f"{wanted}_zero_point", np.full(channels, found.zero_point, np.uint8))
            self.by_channel[name, channels] = self._restored(wanted, [self.codes[name], scales, zeros], axis=1)
        return self.by_channel[name, channels]

    def read(self) -> list[onnx.NodeProto]:
        """The nodes, without a DequantizeLinear that nobody reads: ONNX Runtime would run it."""
        wanted = {name for node in self.nodes for name in node.input} | set(self.graph.outputs)
        return [node for node in self.nodes if node.op_type != "DequantizeLinear" or node.output[0] in wanted]

    def _shift(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """x + beta / alpha, the constant as one code of its own scale."""
        alpha, beta = hard_sigmoid(node)
        shift = f"{node.name}_shift"
        inputs = [
            self._constant(f"{shift}_q", np.array(beta > 0, np.uint8)),
            self._constant(f"{shift}_scale", np.array(abs(beta / alpha) or 1.0, np.float32)),
            self._constant(f"{shift}_zero_point", np.array(beta < 0, np.uint8)),
        ]
        added = self._restored(f"{shift}_dq", inputs)
        return helper.make_node("Add", [self.rounded[node.input[0]], added], node.output, name=node.name)

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
        shared = (str(codes.dtype), len(scales))  # of a small network the zeros are several percent of the file
        if shared not in self.zeros:
            self.zeros[shared] = self._constant(f"zeros:{shared[0]}:{shared[1]}", np.zeros(len(scales), codes.dtype))
        inputs = [self._constant(name, codes), self._constant(f"{name}_scale", scales), self.zeros[shared]]
        return self._restored(f"{name}_dq", inputs, axis=0)

    def _restored(self, wanted: str, inputs: list[str], **along: int) -> str:
        """A DequantizeLinear of (codes, scale, zero point); the name of what it makes."""
        made = self._own(wanted)
        name = self._own(f"{wanted.removesuffix('_dq')}_DQ")
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [made], name=name, **along))
        return made

    def _own(self, wanted: str) -> str:
        name = unique(wanted, self.taken)
        self.taken.add(name)
        return name

    def _constant(self, wanted: str, value: "np.typing.NDArray[np.generic]") -> str:
        name = self._own(wanted)
        self.copy.graph.initializer.append(constant_tensor(name, value))
        return name
